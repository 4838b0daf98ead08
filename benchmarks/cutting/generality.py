"""Which models can be cut, and do their stages give the whole model's results?

Each row has the result of `verify` for a model in 2, 3, 4 or 8 stages, or the reason why the model is refused, and the
time that cutting took. The models are the trained ones of `models/zoo.toml`, the nine light graphs that the onnx
package carries (with random weights, because with their constant weights all outputs are equal and a wrong cut would
pass), and the recipes, made small.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.errors import OnnxsplitError
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.stages.verify import verify

TAKES = "10 min"


def main() -> None:
    """Print a row for each model and number of stages."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 8])
    given = parser.parse_args()
    report = harness.Report(given)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-generality-") as scratch:
        for name, model, dims in example_models.every(given.names, Path(scratch)):
            begun = time.monotonic()
            subject = examine(model, dims=dims, threads=1)
            examined = time.monotonic() - begun
            for stages in given.stages:
                row: dict[str, Any] = {"model": name, "ops": len(subject.graph.ops), "stages": stages}
                begun = time.monotonic()
                try:
                    plan = Path(scratch) / "m.plan"
                    write_plan(subject, plan, CutOptions(stages=stages, rounds=0))
                    row |= {"cut_s": time.monotonic() - begun, "examine_s": examined}
                    comparisons = verify(plan, model)
                    row["verdict"] = "good" if all(c.good for c in comparisons) else "WRONG"
                    row["repeatable"] = all(c.repeatable for c in comparisons)
                    row["exact"] = all(c.exact for c in comparisons)
                    for figure in ("difference", "optimized", "moved"):
                        row[figure] = max(getattr(c, figure) for c in comparisons)
                except OnnxsplitError as error:
                    row["verdict"] = f"refused: {error}"
                report.row(row, text(row))


def text(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    head = f"{row['model']:22} {row['ops']:5} ops  K={row['stages']}  "
    if "exact" not in row:
        return head + row["verdict"][:160]
    off = "bit-equal" if row["exact"] else f"{row['difference']:.1e}"
    return (
        f"{head}{row['verdict']}  off: {off:9}  on: {row['optimized']:.1e}  optimisation alone: {row['moved']:.1e}  "
        f"examined in {row['examine_s']:.1f} s, cut and written in {row['cut_s']:.2f} s"
    )


if __name__ == "__main__":
    main()
