"""Whether a plan keeps what it promises: predicted against measured time of the slowest stage, and how even stages are.

    python benchmarks/cutting/prediction.py [NAME|MODEL.onnx ...] [--stages 2 4] [--json]

Predicted is what the corrected costs said when the cut was made; measured is a run of all stage files afterwards, at
the optimisation levels of the plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

from environment import benchmark, environment_line

from onnxsplit.planning.planner import partition

DEFAULT = ["resnet50", "bert", "ocr-detector", "ocr-recognizer", "ocr-classifier", "smart-turn"]


def main() -> None:
    """A row a model and number of stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=DEFAULT)
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    throughput = benchmark("data_path/throughput")
    if not given.json:
        print(environment_line())
        print(
            f"{'model':18} {'K':>2} {'predicted':>12} {'measured':>12} {'off by':>8} "
            f"{'over mean':>9} {'gap':>7} {'s':>6}"
        )
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name in given.names:
            model, dims = throughput.model_of(name, Path(folder))
            for stages in given.stages:
                begun = time.monotonic()
                plan = partition(model, stages=stages, out=Path(folder) / "m.plan", dims=dims)
                predicted = max(stage.predicted_time_ns for stage in plan.stages)
                times = [stage.measured_time_ns or 0 for stage in plan.stages]
                row = {
                    "model": name,
                    "stages": stages,
                    "predicted_ms": predicted / 1e6,
                    "measured_ms": max(times) / 1e6,
                    "off": max(times) / predicted - 1,
                    "over_mean": max(times) * stages / sum(times),
                    "gap": plan.prediction.gap,
                    "seconds": time.monotonic() - begun,
                }
                print(
                    json.dumps(row)
                    if given.json
                    else f"{name:18} {stages:2} {row['predicted_ms']:9.2f} ms {row['measured_ms']:9.2f} ms "
                    f"{row['off']:8.1%} {row['over_mean']:9.3f} {row['gap']:7.2%} {row['seconds']:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
