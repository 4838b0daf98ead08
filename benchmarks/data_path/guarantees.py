"""How much does it cost to lose no request?

Two pipelines of the same plan: one keeps the inputs of each request, so that it can be repeated, and sends heartbeats;
the other has ``attempts=1`` (inputs are not kept) and no heartbeat for an hour. Both run at once and take turns, first
with the pipeline full, then one request at a time. Models as in data_path/throughput.py.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from runtime import Pipeline
from runtime.timings import Timings

TAKES = "5 min"

NEVER = Timings(beat_s=3600, silence_s=86400)


def measure(name: str, slices: int, seconds: float, scratch: Path) -> dict[str, Any]:
    """Measure both pipelines of one model."""
    plan = example_models.named_plan(name, scratch)
    inputs = harness.example(plan)
    row: dict[str, Any] = {"model": name}
    with (
        Pipeline.launch(plan, threads=1) as on,
        Pipeline.launch(plan, threads=1, attempts=1, timings=NEVER) as off,
    ):
        for what, take in (("per_s", harness.rate), ("latency_ms", harness.latency_ms)):
            contenders = {
                "on": lambda take=take: take(on, inputs, seconds),
                "off": lambda take=take: take(off, inputs, seconds),
            }
            taken = harness.in_turns(contenders, slices)
            row |= {f"{what}_{side}": statistics.median(values) for side, values in taken.items()}
            row[f"{what}_ratio"] = str(harness.ratio(taken["on"], taken["off"]))
    return row


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    models = ["resnet50", "ocr-recognizer", *example_models.CHAINS]
    parser.add_argument("names", nargs="*", default=models, metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of a slice")
    given = parser.parse_args()
    report = harness.Report(
        given, model="14", per_s_on="8.1f", per_s_off="9.1f", per_s_ratio="19", latency_ms_on="13.2f",
        latency_ms_off="14.2f", latency_ms_ratio="19",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        for name in given.names:
            report.row(measure(name, given.slices, given.seconds, Path(scratch)))


if __name__ == "__main__":
    main()
