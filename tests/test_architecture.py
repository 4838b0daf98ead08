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
    ["onnxsplit.files", "onnxsplit.memory", "onnxsplit.numbers", "onnxsplit.drawing", "onnxsplit.formulas"],
    ["onnxsplit.tensors", "onnxsplit.plan", "onnxsplit.cluster", "onnxsplit.file_kinds"],
    ["onnxsplit.providers", "onnxsplit.string_value", "onnxsplit.custom_ops"],
    ["onnxsplit.session"],
    ["onnxsplit.timed"],
    ["onnxsplit.bodies"],
    ["onnxsplit.external", "onnxsplit.optimised"],
    ["onnxsplit.source", "onnxsplit.storage"],
    ["onnxsplit.domains"],
    ["onnxsplit.graph", "onnxsplit.opening"],
    ["onnxsplit.shape_rules"],
    ["onnxsplit.shapes", "onnxsplit.uncuttable"],
    ["onnxsplit.ends"],
    ["onnxsplit.inputs", "onnxsplit.atoms", "onnxsplit.precision"],
    ["onnxsplit.cost"],
    ["onnxsplit.partitioner"],
    ["onnxsplit.setting", "onnxsplit.options"],
    ["onnxsplit.examine"],
    ["onnxsplit.cut_at"],
    ["onnxsplit.choose"],
    ["onnxsplit.extract", "onnxsplit.multi_device", "onnxsplit.outcome", "onnxsplit.sweep", "onnxsplit.calibrate"],
    ["onnxsplit.inspection", "onnxsplit.annotate", "onnxsplit.report"],
    ["onnxsplit.describe"],
    ["onnxsplit.draft"],
    [
        "onnxsplit.verify",
        "onnxsplit.batch",
        "onnxsplit.planner",
        "onnxsplit.merge",
        "onnxsplit.doctor",
        "onnxsplit.place",
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
        "runtime.balance",
        "runtime.extents",
        "runtime.admission",
        "runtime.pinned",
        "runtime.table",
        "runtime.logs",
        "runtime.intake",
        "runtime.descriptors",
    ],
    ["runtime.messages", "runtime.board"],
    [
        "runtime.watch",
        "runtime.reach",
        "runtime.codec",
        "runtime.arena",
        "runtime.microbatch",
        "runtime.weights",
        "runtime.trace",
        "runtime.stage_cache",
        "runtime.health",
    ],
    ["runtime.options", "runtime.node_events", "runtime.roster", "runtime.router", "runtime.transport"],
    ["runtime.keys", "runtime.stats", "runtime.node_state", "runtime.coordinator_events"],
    [
        "runtime.coordinator_state",
        "runtime.file_server",
        "runtime.file_client",
        "runtime.launch",
        "runtime.stage_runner",
    ],
    ["runtime.payloads", "runtime.node_control", "runtime.link", "runtime.agent", "runtime.stage_files"],
    ["runtime.flow", "runtime.worker"],
    ["runtime.coordinator", "runtime.request", "runtime.node"],
    ["runtime.pipeline"],
    ["runtime.bench", "runtime.gateway.errors", "runtime.gateway.tally"],
    ["runtime.gateway.budget"],
    ["runtime.gateway.protocol", "runtime.gateway.line", "runtime.gateway.guard", "runtime.gateway.bodies"],
    [
        "runtime.gateway.http_codec",
        "runtime.gateway.regions",
        "runtime.gateway.entrance",
        "runtime.gateway.connections",
    ],
    ["runtime.gateway.grpc_codec", "runtime.gateway.openapi", "runtime.gateway.repository"],
    ["runtime.gateway.describe", "runtime.gateway.spans", "runtime.gateway.page"],
    ["runtime.gateway.service"],
    ["runtime.gateway.watcher"],
    ["runtime.gateway.metrics", "runtime.gateway.rpc"],
    ["runtime.gateway.web"],
    ["runtime.gateway.server", "runtime.gateway"],
]
HOMES = {
    "networkx": {"onnxsplit.graph", "onnxsplit.atoms", "onnxsplit.partitioner"},
    "onnx": {
        "onnxsplit.batch",
        "onnxsplit.bodies",
        "onnxsplit.external",
        "onnxsplit.optimised",
        "onnxsplit.source",
        "onnxsplit.storage",
        "onnxsplit.opening",
        "onnxsplit.ends",
        "onnxsplit.domains",
        "onnxsplit.merge",
        "onnxsplit.graph",
        "onnxsplit.shapes",
        "onnxsplit.precision",
        "onnxsplit.shape_rules",
        "onnxsplit.string_value",
        "onnxsplit.extract",
        "onnxsplit.cost.profiler",
        "onnxsplit.multi_device",
        "onnxsplit.annotate",
        "onnxsplit.export",
    },
    "onnxruntime": {"onnxsplit.providers"},
    "zmq": {"runtime.transport"},
    "torch": {"onnxsplit.export"},
    "scipy": {"onnxsplit.partitioner"},
    "rich": {"onnxsplit.cli"},
    "click": {"onnxsplit.cli"},
    "starlette": {"runtime.gateway.web"},
    "uvicorn": {"runtime.gateway.server", "runtime.gateway.connections"},
    "grpc": {"runtime.gateway.server", "runtime.gateway.rpc"},
    "tritonclient": {"runtime.gateway.server", "runtime.gateway.rpc", "runtime.gateway.grpc_codec"},
    "prometheus_client": {"runtime.gateway.metrics"},
    "opentelemetry": {"runtime.gateway.spans"},
    "yaml": {"runtime.launch.kubernetes"},
    "ray": {"runtime.launch.ray", "runtime.launch.ray_node"},
}
PURE = [
    "runtime.node_state",
    "runtime.coordinator_state",
    "runtime.coordinator_events",
    "runtime.node_events",
    "runtime.roster",
    "runtime.table",
    "runtime.watch",
    "runtime.reach",
    "runtime.router",
    "runtime.balance",
    "runtime.extents",
    "runtime.microbatch",
    "runtime.intake",
    "runtime.trace",
    "runtime.gateway.protocol",
    "runtime.gateway.http_codec",
    "runtime.gateway.grpc_codec",
    "runtime.gateway.line",
    "runtime.gateway.describe",
    "runtime.gateway.openapi",
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
