"""The folder layout is the architecture: what each folder may import, and what stays free of effects."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("onnxsplit", "runtime")

# Each row imports from rows above it, and from itself. A name stands for a file or a folder.
OFFLINE = [
    "errors numbers files control_group memory machine_load effort drawing progress arguments file_cache own_runtime",
    "tensors distance npz plan plan_base plan_borders plan_decoder plan_target plan_verdict plan_summary plan_check "
    "plan_files cluster cluster_files host_costs",
    "binding providers string_value custom_ops session timed_worker timed step_inputs",
    "model partitioner",
    "cost",
    "stages",
    "decoder",
    "planning",
    "views export",
    "cli __main__",
]
ONLINE = [
    "errors timings time_buckets transition_table logs descriptors home background",
    "wire",
    "topology trace balance files deploy launcher guided",
    "memory",
    "node coordinator measure launch",
    "options requests testing",
    "launching text node_table",
    "starting opening",
    "recut",
    "pipeline_status pipeline_control",
    "pipeline torch_tensors services",
    "gateway",
    "load",
    "bench_load bench_rates",
    "bench bench_decode request_costs advise",
]
NEVER = [  # rules in addition to the rows
    ("runtime.node", "runtime.coordinator"),
    ("runtime.coordinator", "runtime.node"),
    ("runtime.measure", "runtime.coordinator"),
    ("runtime.measure", "runtime.node"),
    ("onnxsplit.partitioner", "onnxsplit.model"),
    ("runtime.gateway.http", "runtime.gateway.grpc"),
    ("runtime.gateway.grpc", "runtime.gateway.http"),
]
SHARED = {  # the parts of onnxsplit that the runtime may use, in addition to its version
    "errors", "numbers", "files", "memory", "machine_load", "drawing", "tensors", "distance", "npz", "plan",
    "plan_base", "plan_borders", "plan_decoder", "plan_files", "cluster", "cluster_files", "binding", "providers",
    "custom_ops", "session", "timed", "step_inputs", "arguments", "file_cache",
}  # fmt: skip

# Third-party libraries, and the only folders or files that import them.
HOMES = {
    "networkx": "onnxsplit.model onnxsplit.partitioner",
    "onnx": "onnxsplit.model onnxsplit.decoder onnxsplit.stages onnxsplit.export onnxsplit.cost onnxsplit.views "
    "onnxsplit.string_value",
    "onnxruntime": "onnxsplit.providers",
    "scipy": "onnxsplit.partitioner",
    "torch": "onnxsplit.export runtime.torch_tensors",
    "rich": "onnxsplit.cli",
    "click": "onnxsplit.cli",
    "zmq": "runtime.wire",
    "starlette": "runtime.gateway.http runtime.gateway.openai.routes runtime.services",
    "uvicorn": "runtime.gateway.server runtime.gateway.http",
    "grpc": "runtime.gateway.server runtime.gateway.grpc runtime.load.grpc",
    "tritonclient": "runtime.gateway.server runtime.gateway.grpc runtime.load.grpc",
    "httptools": "runtime.load.connections",
    "prometheus_client": "runtime.gateway.telemetry",
    "opentelemetry": "runtime.gateway.spans",
    "yaml": "runtime.deploy",
    "tokenizers": "runtime.text onnxsplit.export",
    "jinja2": "runtime.text",
    "llguidance": "runtime.guided.guide",
    "gguf": "onnxsplit.export.gguf",
    "ray": "runtime.launch",
    "zstandard": "runtime.wire",
}

# Modules that take and return values. Neither they nor the modules that they import wait or touch the system.
PURE = [
    *(
        "onnxsplit.partitioner",
        "onnxsplit.plan",
        "onnxsplit.plan_borders",
        "onnxsplit.plan_decoder",
        "onnxsplit.plan_target",
        "onnxsplit.plan_check",
        "onnxsplit.cluster",
        "onnxsplit.planning.candidates",
        "onnxsplit.stages.batch.linear",
        "onnxsplit.step_inputs",
        "onnxsplit.decoder.claim",
        "onnxsplit.decoder.names",
        "onnxsplit.step_inputs",
    ),
    *(
        "runtime.wire.messages",
        "runtime.guided.bounds",
        "runtime.topology",
        "runtime.transition_table",
        "runtime.requests.microbatch",
        "runtime.requests.generate_options",
        "runtime.text.detokenizer",
        "runtime.text.options",
        "runtime.text.stops",
        "runtime.text.tools",
        "runtime.trace",
        "runtime.time_buckets",
        "runtime.gateway.telemetry.minute",
        "runtime.gateway.telemetry.history",
        "runtime.gateway.telemetry.timeline",
    ),
    *("runtime.balance.replicas", "runtime.balance.autoscale"),
    *("runtime.recut.window", "runtime.recut.drift", "runtime.recut.gain", "runtime.recut.decision"),
    *("runtime.recut.learning", "runtime.recut.patience"),
    *("runtime.balance.policies", "runtime.balance.router", "runtime.memory.extents", "runtime.requests.normalize"),
    *("runtime.requests.arrays", "onnxsplit.plan_summary", "onnxsplit.plan_verdict", "onnxsplit.arguments"),
    *(
        "runtime.node.state",
        "runtime.node.events",
        "runtime.node.slots",
        "runtime.node.sampling",
        "runtime.node.steps",
        "runtime.node.stage_requests",
    ),
    *("runtime.coordinator.state", "runtime.coordinator.events", "runtime.coordinator.interpreter"),
    *("runtime.coordinator.requests", "runtime.coordinator.deadlines", "runtime.coordinator.diagnosis"),
    *("runtime.coordinator.roster", "runtime.coordinator.node_record", "runtime.coordinator.counters"),
    *("runtime.coordinator.refusals", "runtime.coordinator.links", "runtime.coordinator.reach"),
    *("runtime.coordinator.sequences", "runtime.coordinator.sequence_events", "runtime.coordinator.sequence_record"),
    *("runtime.coordinator.sequence_limits", "runtime.coordinator.scheduler", "runtime.coordinator.step_table"),
    *("runtime.coordinator.chains", "runtime.coordinator.chain_table", "runtime.coordinator.groups"),
    *("runtime.coordinator.prefixes", "runtime.coordinator.sequence_diagnosis"),
    *("runtime.coordinator.numbers", "runtime.coordinator.work"),
    *("runtime.coordinator.failure_detector", "runtime.testing"),
    *("runtime.load.patterns", "runtime.load.histogram", "runtime.load.windows", "runtime.load.driver"),
    *("runtime.load.point", "runtime.load.target"),
    *("runtime.gateway.protocol.inference", "runtime.gateway.protocol.parameters", "runtime.gateway.queue"),
    *("runtime.gateway.models.grace", "runtime.gateway.protocol.recuts", "runtime.recut.phases"),
    *("runtime.recut.same_model", "runtime.recut.result"),
    *("runtime.gateway.protocol.documents", "runtime.gateway.protocol.tensor_data", "runtime.gateway.protocol.text"),
    *("runtime.services.declare", "runtime.gateway.services.dispatch"),
    *("runtime.gateway.http.codec", "runtime.gateway.grpc.codec"),
    *("runtime.gateway.sequence_states", "runtime.gateway.models.states"),
    *("runtime.gateway.openai.figures", "runtime.gateway.openai.protocol", "runtime.gateway.openai.objects"),
    *("runtime.gateway.openai.errors", "runtime.gateway.openai.options", "runtime.gateway.openai.tool_calls"),
]
# Modules that touch nothing themselves, but describe objects whose modules do.
PURE_BUT_FOR_IMPORTS = [
    *("runtime.gateway.models.metadata", "runtime.gateway.http.openapi"),
    *("runtime.gateway.openai.answer", "runtime.gateway.openai.logprobs"),
    *("onnxsplit.decoder.traces", "onnxsplit.decoder.structure", "onnxsplit.decoder.pairing"),
    *("onnxsplit.decoder.state_claims", "onnxsplit.decoder.roles", "onnxsplit.decoder.scores"),
]
READS_THE_CLOCK = {"onnxsplit.partitioner", "onnxsplit.partitioner.search"}  # a search ends when its time is up
EFFECTS = {
    "asyncio", "fcntl", "mmap", "multiprocessing", "os", "select", "shutil", "socket", "subprocess", "tempfile",
    "threading", "time", "onnx", "onnxruntime", "zmq",
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Return the imports of a module, also inside functions, but without those for type checking alone."""
    tree = ast.parse(modules()[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            known = whole & modules().keys()
            found |= known or {node.module}
    return frozenset(found)


def within(module: str, places: str) -> bool:
    """Return whether a module is one of the files or in one of the folders."""
    return any(module == place or module.startswith(f"{place}.") for place in places.split())


def place_of(module: str) -> str:
    """Return the file or folder of its package that holds a module; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


@cache
def rows() -> dict[str, int]:
    """Return the row of every file and folder, by ``package.place``."""
    tables = {"onnxsplit": OFFLINE, "runtime": ONLINE}
    return {
        f"{package}.{place}": number
        for package, table in tables.items()
        for number, row in enumerate(table)
        for place in row.split()
    }


def may_import(module: str, imported: str) -> bool:
    """Return whether the rows and the rules allow an import between two modules of this repository."""
    if any(within(module, one) and within(imported, other) for one, other in NEVER):
        return False
    package, place = module.split(".")[0], place_of(module)
    other, other_place = imported.split(".")[0], place_of(imported)
    if not place or not other_place:  # the packages themselves: public names, imported lazily, and the version
        return True
    if package != other:
        return other_place in SHARED if package == "runtime" else place == "cli"
    return rows()[f"{other}.{other_place}"] <= rows()[f"{package}.{place}"]


def reached(module: str) -> dict[str, list[str]]:
    """Return every import that loading a module causes, with the chain of modules that leads to it."""
    ways: dict[str, list[str]] = {}
    queue = [(module, [module])]
    while queue:
        here, way = queue.pop(0)
        for imported in imports(here):
            if imported not in ways:
                ways[imported] = way
                if imported in modules() and imported not in PACKAGES:
                    queue.append((imported, [*way, imported]))
    return ways


def test_every_file_and_folder_has_a_row():
    missing = {f"{m.split('.')[0]}.{place_of(m)}" for m in modules() if place_of(m)} - rows().keys()
    assert not missing


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = [
        f"{module} imports {imported}"
        for module in modules()
        if within(module, package)
        for imported in imports(module)
        if imported in modules() and not may_import(module, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_library_has_its_home():
    wrong = [
        f"{module} imports {imported}"
        for module in modules()
        for imported in imports(module)
        if (homes := HOMES.get(imported.split(".")[0])) and not within(module, homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_modules_reach_nothing_outside():
    wrong = [
        f"{module} reaches {imported} by {' > '.join(way)}"
        for module in modules()
        if within(module, " ".join(PURE))
        for imported, way in reached(module).items()
        if imported.split(".")[0] in EFFECTS and not (imported == "time" and module in READS_THE_CLOCK)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_that_only_describe_import_no_effects_themselves():
    wrong = [f"{m} imports {i}" for m in PURE_BUT_FOR_IMPORTS for i in imports(m) if i.split(".")[0] in EFFECTS]
    assert not wrong


def test_files_do_not_import_each_other_in_a_circle():
    wrong = [m for m in modules() if m in reached(m) and m != "onnxsplit"]
    assert not wrong, wrong


def test_the_distribution_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(settings["packages"]) == folders


def test_the_distribution_holds_every_data_file():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    data = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == listed


def test_a_file_can_be_read_in_one_sitting_and_a_function_at_one_glance():
    long_files = [name for name, path in modules().items() if len(path.read_text().splitlines()) > 400]
    long_functions = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long_files + long_functions


def test_a_public_class_name_has_one_owner():
    owners: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in owners.items() if len(places) > 1}
