"""Do stages take the time that their plan predicts?

Each row has the predicted and the measured time of the slowest stage, and the balance of the stages. The prediction is
by the corrected costs at the time of the cut. The measurement is a later run of all stage files, at the optimisation
levels of the plan.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.planning.planner import partition

TAKES = "6 min"

DEFAULT = ["resnet50", "bert", "ocr-detector", "ocr-recognizer", "ocr-classifier", "smart-turn"]


def main() -> None:
    """Print a row for each model and number of stages."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=DEFAULT, metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    given = parser.parse_args()
    report = harness.Report(
        given, model="18", stages="6", predicted_ms="12.2f", measured_ms="11.2f", off="6.1%", over_mean="9.3f",
        gap="7.2%", seconds="7.1f",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name in given.names:
            model, dims = example_models.named(name, Path(folder))
            for stages in given.stages:
                begun = time.monotonic()
                plan = partition(model, stages=stages, out=Path(folder) / "m.plan", dims=dims)
                predicted = max(stage.predicted_time_ns for stage in plan.stages)
                times = [stage.measured_time_ns or 0 for stage in plan.stages]
                report.row(
                    {
                        "model": name,
                        "stages": stages,
                        "predicted_ms": predicted / 1e6,
                        "measured_ms": max(times) / 1e6,
                        "off": max(times) / predicted - 1,
                        "over_mean": max(times) * stages / sum(times),
                        "gap": plan.prediction.gap,
                        "seconds": time.monotonic() - begun,
                    }
                )


if __name__ == "__main__":
    main()
