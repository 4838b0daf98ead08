"""The folder layout is the architecture: imports run one way, and each library has its home."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "modules.md"

ORDER = [
    # Each module imports only from rows above its own, or from its own package.
    ["onnxsplit", "onnxsplit.errors"],
    ["onnxsplit.files", "onnxsplit.memory", "onnxsplit.numbers", "onnxsplit.drawing", "onnxsplit.model.formulas"],
    ["onnxsplit.tensors", "onnxsplit.plan", "onnxsplit.cluster", "onnxsplit.model.file_kinds"],
    ["onnxsplit.providers", "onnxsplit.string_value", "onnxsplit.custom_ops"],
    ["onnxsplit.session"],
    ["onnxsplit.timed"],
    ["onnxsplit.model.bodies"],
    ["onnxsplit.model.external", "onnxsplit.model.optimised"],
    ["onnxsplit.source", "onnxsplit.storage"],
    ["onnxsplit.model.domains"],
    ["onnxsplit.model.graph", "onnxsplit.model.opening"],
    ["onnxsplit.model.shape_rules"],
    ["onnxsplit.model.shapes", "onnxsplit.model.uncuttable"],
    ["onnxsplit.model.ends"],
    ["onnxsplit.model.inputs", "onnxsplit.model.atoms", "onnxsplit.model.precision"],
    ["onnxsplit.cost"],
    ["onnxsplit.partitioner"],
    ["onnxsplit.planning.target", "onnxsplit.planning.options"],
    ["onnxsplit.planning.subject"],
    ["onnxsplit.planning.cut_at"],
    ["onnxsplit.planning.chooser"],
    [
        "onnxsplit.stages.extract",
        "onnxsplit.model.multi_device",
        "onnxsplit.planning.outcome",
        "onnxsplit.planning.sweep",
        "onnxsplit.planning.calibrate",
    ],
    ["onnxsplit.views.inspection", "onnxsplit.views.annotate", "onnxsplit.views.report"],
    ["onnxsplit.planning.plan_builder"],
    ["onnxsplit.planning.rounds"],
    [
        "onnxsplit.stages.verify",
        "onnxsplit.stages.batch",
        "onnxsplit.planning.planner",
        "onnxsplit.stages.merge",
        "onnxsplit.views.doctor",
        "onnxsplit.planning.place",
    ],
    ["onnxsplit.export"],
    ["runtime"],
    ["onnxsplit.cli", "onnxsplit.__main__"],
]
RUNTIME_MAY_USE = {
    "onnxsplit.errors", "onnxsplit.files", "onnxsplit.memory", "onnxsplit.numbers", "onnxsplit.plan",
    "onnxsplit.cluster", "onnxsplit.tensors", "onnxsplit.providers", "onnxsplit.custom_ops",
    "onnxsplit.session", "onnxsplit.timed", "onnxsplit.drawing", "onnxsplit",  # that for the version
}  # fmt: skip
RUNTIME_ORDER = [
    [
        "runtime.errors",
        "runtime.balance.policies",
        "runtime.memory.extents",
        "runtime.admission",
        "runtime.memory.pinned",
        "runtime.transition_table",
        "runtime.logs",
        "runtime.intake",
        "runtime.descriptors",
    ],
    ["runtime.wire.messages", "runtime.balance.board"],
    [
        "runtime.coordinator.failure_detector",
        "runtime.coordinator.reach",
        "runtime.wire.codec",
        "runtime.memory.arena",
        "runtime.microbatch",
        "runtime.node.weights",
        "runtime.trace",
        "runtime.files.cache",
        "runtime.node.health",
    ],
    [
        "runtime.options",
        "runtime.node.events",
        "runtime.coordinator.roster",
        "runtime.balance.router",
        "runtime.wire.sockets",
    ],
    ["runtime.wire.keys", "runtime.coordinator.status", "runtime.node.state", "runtime.coordinator.events"],
    [
        "runtime.coordinator.state",
        "runtime.files.server",
        "runtime.files.client",
        "runtime.launch",
        "runtime.node.stage_runner",
    ],
    [
        "runtime.memory.payloads",
        "runtime.node.control",
        "runtime.measure.link",
        "runtime.measure.agent",
        "runtime.files.stage",
    ],
    ["runtime.coordinator.request_io", "runtime.node.worker"],
    ["runtime.coordinator", "runtime.request", "runtime.node"],
    ["runtime.pipeline"],
    ["runtime.bench", "runtime.gateway.errors", "runtime.gateway.counters"],
    ["runtime.gateway.budget"],
    ["runtime.gateway.protocol", "runtime.gateway.queue", "runtime.gateway.guard", "runtime.gateway.http.bodies"],
    [
        "runtime.gateway.http.codec",
        "runtime.gateway.regions",
        "runtime.gateway.batcher",
        "runtime.gateway.http.connections",
    ],
    ["runtime.gateway.grpc.codec", "runtime.gateway.http.openapi", "runtime.gateway.repository"],
    ["runtime.gateway.metadata", "runtime.gateway.telemetry.spans", "runtime.gateway.http.page"],
    ["runtime.gateway.service"],
    ["runtime.gateway.telemetry.sampler"],
    ["runtime.gateway.telemetry.metrics", "runtime.gateway.grpc.servicer"],
    ["runtime.gateway.http.app"],
    ["runtime.gateway.server", "runtime.gateway"],
]
HOMES = {
    "networkx": {"onnxsplit.model.graph", "onnxsplit.model.atoms", "onnxsplit.partitioner"},
    "onnx": {
        "onnxsplit.stages.batch",
        "onnxsplit.model.bodies",
        "onnxsplit.model.external",
        "onnxsplit.model.optimised",
        "onnxsplit.source",
        "onnxsplit.model.storage",
        "onnxsplit.model.opening",
        "onnxsplit.model.ends",
        "onnxsplit.model.domains",
        "onnxsplit.stages.merge",
        "onnxsplit.model.graph",
        "onnxsplit.model.shapes",
        "onnxsplit.model.precision",
        "onnxsplit.model.shape_rules",
        "onnxsplit.string_value",
        "onnxsplit.stages.extract",
        "onnxsplit.cost.profiler",
        "onnxsplit.model.multi_device",
        "onnxsplit.views.annotate",
        "onnxsplit.export",
    },
    "onnxruntime": {"onnxsplit.providers"},
    "zmq": {"runtime.wire.sockets"},
    "torch": {"onnxsplit.export"},
    "scipy": {"onnxsplit.partitioner"},
    "rich": {"onnxsplit.cli"},
    "click": {"onnxsplit.cli"},
    "starlette": {"runtime.gateway.http.app"},
    "uvicorn": {"runtime.gateway.server", "runtime.gateway.http.connections"},
    "grpc": {"runtime.gateway.server", "runtime.gateway.grpc.servicer"},
    "tritonclient": {"runtime.gateway.server", "runtime.gateway.grpc.servicer", "runtime.gateway.grpc.codec"},
    "prometheus_client": {"runtime.gateway.telemetry.metrics"},
    "opentelemetry": {"runtime.gateway.telemetry.spans"},
    "yaml": {"runtime.deploy.kubernetes"},
    "ray": {"runtime.launch.ray", "runtime.launch.ray_node"},
}
PURE = [
    "runtime.node.state",
    "runtime.coordinator.state",
    "runtime.coordinator.events",
    "runtime.node.events",
    "runtime.coordinator.roster",
    "runtime.transition_table",
    "runtime.coordinator.failure_detector",
    "runtime.coordinator.reach",
    "runtime.balance.router",
    "runtime.balance.policies",
    "runtime.memory.extents",
    "runtime.microbatch",
    "runtime.intake",
    "runtime.trace",
    "runtime.gateway.protocol",
    "runtime.gateway.http.codec",
    "runtime.gateway.grpc.codec",
    "runtime.gateway.queue",
    "runtime.gateway.metadata",
    "runtime.gateway.http.openapi",
    *(
        f"onnxsplit.partitioner.{name}"
        for name in ("objective", "lineup", "orders", "slices", "downsets", "paths", "branch", "exchange", "contract")
    ),
]
IMPURE = {"zmq", "socket", "subprocess", "threading", "time", "os", "onnxruntime", "asyncio", "select"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in ("onnxsplit", "runtime"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports, inside functions too; those for type checking alone are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    known = modules()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return found


def room(module: str) -> str:
    """The row entry that a module belongs to."""
    return ".".join(module.split(".")[:2]) if module.startswith("onnxsplit.") else module


def row_of(name: str, order: list[list[str]]) -> int:
    for number, row in enumerate(order):
        if any(name == entry or name.startswith(f"{entry}.") for entry in row if entry != "onnxsplit"):
            return number
    return 0


@pytest.fixture(scope="module")
def imported_by() -> dict[str, set[str]]:
    """What each module imports."""
    return {module: imports(path) for module, path in sorted(modules().items())}


def goes_up(module: str, imported: str) -> bool:
    """Whether an import breaks the order of the rows, or what the runtime may use of onnxsplit."""
    if imported.split(".")[0] not in ("onnxsplit", "runtime"):
        return False
    if not module.startswith("runtime"):
        return module != "onnxsplit" and row_of(imported, ORDER) > row_of(module, ORDER)
    if imported.startswith("onnxsplit"):
        return imported not in RUNTIME_MAY_USE
    return module != "runtime" and row_of(imported, RUNTIME_ORDER) > row_of(module, RUNTIME_ORDER)


def within(module: str, homes: Iterable[str]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def test_imports_run_one_way(imported_by):
    wrong = [f"{m} imports {i}" for m, found in imported_by.items() for i in found if goes_up(m, i)]
    assert not wrong, "\n".join(wrong)


def test_each_library_has_its_home(imported_by):
    wrong = [
        f"{module} imports {imported}"
        for module, found in imported_by.items()
        for imported in found
        if (homes := HOMES.get(imported.split(".")[0])) is not None and not within(module, homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_modules_touch_nothing(imported_by):
    wrong = [f"{module} imports {imported}" for module in PURE for imported in imported_by[module] & IMPURE]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_row(imported_by):
    placed = [entry for order in (ORDER, RUNTIME_ORDER) for row in order for entry in row]
    wrong = [module for module in imported_by if not within(module, placed)]
    assert not wrong, "\n".join(wrong)


def test_the_drawing_shows_the_imports_as_they_are():
    assert DRAWING.read_text() == drawing(), "run: python tests/test_architecture.py"


def drawing() -> str:
    """A Mermaid graph of the rooms and who imports whom."""
    known = modules()
    one = lambda module: "runtime.gateway" if module.startswith("runtime.gateway") else room(module)  # noqa: E731
    arrows = sorted(
        {
            (one(module), one(imported))
            for module, path in known.items()
            for imported in imports(path)
            if imported in known
            and one(module) != one(imported)
            and room(imported) not in ("onnxsplit", "onnxsplit.errors", "runtime.errors")
        }
    )
    lines = ["# Modules and their imports", ""]
    lines += [
        "Drawn from the code by `python tests/test_architecture.py`; a test holds it to the code. An arrow points at"
    ]
    lines += ["what is imported. `errors` is imported by all and left out.", "", "```mermaid", "graph TD"]
    for package in ("onnxsplit", "runtime"):
        lines.append(f"  subgraph {package}")
        rooms = {one(m) for m in known if m.startswith(f"{package}.")} - {f"{package}.errors"}
        lines += [f"    {name}[{name.split('.')[1]}]" for name in sorted(rooms)]
        lines.append("  end")
    lines += [f"  {source} --> {target}" for source, target in arrows]
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    DRAWING.write_text(drawing())
