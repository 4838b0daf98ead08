"""Can models of all frameworks be exported, and are they right after a cut in two?

Each model is exported, compared with its framework, cut in two, and compared with the whole. A framework that is not
installed has a row that says so; `make test-export` makes an environment with all of them. Each model is small and made
here (tests/support/frameworks.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import frameworks
import onnx

from benchmarks import harness
from onnxsplit.errors import OnnxsplitError, PartitionError
from onnxsplit.export import export
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify

TAKES = "2 min"


def measure(model: frameworks.Model, folder: Path) -> dict[str, Any]:
    """Export and cut one model, and return its row."""
    row: dict[str, Any] = {"model": model.name}
    missing = [name for name in model.needs if find_spec(name) is None]
    if missing:
        return row | {"result": f"not installed: {', '.join(missing)}"}
    (folder / "made").mkdir()
    source = model.make(folder / "made")
    begun = time.monotonic()
    try:
        done = export(source, folder / "out.onnx", **model.options)
    except OnnxsplitError as error:
        return row | {"result": str(error)[:200]}
    row["seconds"] = time.monotonic() - begun
    row["framework"] = done[0].framework
    row["difference"] = max(max(one.differences.values()) for one in done)
    cuts = []
    for number, one in enumerate(done):
        proto = onnx.load(one.path)
        named = {d.dim_param for value in proto.graph.input for d in value.type.tensor_type.shape.dim}
        dims = {name: size for name, size in model.dims.items() if name in named}
        plan = folder / f"{number}.plan"
        try:
            partition(one.path, stages=2, out=plan, costs="analytic", dims=dims)
        except PartitionError as error:
            cuts.append("one op" if "form 1 parts" in str(error) else str(error)[:100])
            continue
        comparisons = list(verify(plan, one.path))
        worst = max(comparison.difference for comparison in comparisons)
        cuts.append(f"{worst:.1e}" + ("" if all(one.good for one in comparisons) else " DIFFERENT"))
    return row | {"result": "exported", "cut": ", ".join(cuts)}


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only models whose names contain one of these")
    given = parser.parse_args()
    report = harness.Report(given, model="40", framework="14", seconds="7.1f", difference="10.1e", cut="8", result="8")
    for model in frameworks.models():
        if not given.words or any(word.lower() in model.name.lower() for word in given.words):
            with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
                report.row(measure(model, Path(folder)))


if __name__ == "__main__":
    main()
