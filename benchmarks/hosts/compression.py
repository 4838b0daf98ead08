"""How much smaller does Zstandard make the int8 borders of trained models, and from which bandwidth on does it not pay?

Trained models are cut in several stages with --border int8, at places that depend on the costs of their ops alone. The
stages run on an input like those of hosts/borders.py, and the numbers that cross are compressed as nodes do it. Times
are processor time of one thread, the least of several. The last column is the bandwidth at which compressing, sending
and decompressing one after the other takes as long as sending alone; on slower links compression pays.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "models", "tests/support", "benchmarks/hosts")]

import borders
import numpy as np

from benchmarks import example_models, harness

TAKES = "1 min"

MODELS = ["ocr-recognizer", "ocr-detector", "ocr-classifier", "basic-pitch"]
TRIALS = 9


def crossing(name: str, stages: int, folder: Path) -> dict[str, Any]:
    """Return the int8 tensors that cross between the stages of a model, by name."""
    from onnxsplit.planning.examine import examine
    from onnxsplit.planning.options import CutOptions
    from onnxsplit.planning.planner import write_plan
    from onnxsplit.session import open_session

    model, _ = example_models.named(name, folder)
    given = borders.example(name, np.random.default_rng(0))
    options = CutOptions(stages=stages, rounds=0, border="int8")
    plan = write_plan(examine(model, costs="analytic", inputs=given, threads=1), folder / "c.plan", options).plan
    values = dict(given)
    for stage in plan.stages:
        session = open_session(folder / "c.plan" / stage.file, threads=1)
        values |= session.run({tensor: values[tensor] for tensor, _ in session.inputs})
    return {border.tensor: values[border.wire[0]] for border in plan.borders.tensors}


def least_ns(what: Callable[[], object]) -> int:
    """Return the least processor time of a call, in nanoseconds."""
    times = []
    for _ in range(TRIALS):
        begun = time.thread_time_ns()
        what()
        times.append(time.thread_time_ns() - begun)
    return min(times)


def figures(numbers: Any) -> dict[str, Any]:
    """Return the figures of one tensor."""
    from runtime.wire.compression import compressed, decompressed

    raw = numbers.tobytes()
    frame = compressed(raw)
    packing, unpacking = least_ns(lambda: compressed(raw)), least_ns(lambda: decompressed(frame, len(raw)))
    return {
        "bytes": len(raw),
        "zeros": raw.count(0) / len(raw),
        "ratio": len(raw) / len(frame),
        "compress_MB_s": len(raw) * 1e3 / packing,
        "decompress_MB_s": len(raw) * 1e3 / unpacking,
        "pays_below_Mbit_s": max(0, len(raw) - len(frame)) * 8e3 / (packing + unpacking),
    }


def main() -> None:
    """Print a row for each tensor."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--stages", type=int, default=4)
    given: argparse.Namespace = parser.parse_args()
    report = harness.Report(
        given, model="14", bytes="8", zeros="6.0%", ratio="6.2f", compress_MB_s="13.0f", decompress_MB_s="15.0f",
        pays_below_Mbit_s="17.0f",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        for number, name in enumerate(given.models.split(",")):
            folder = Path(scratch) / f"{number}"
            folder.mkdir()
            for numbers in crossing(name, given.stages, folder).values():
                report.row({"model": name, **figures(numbers)})


if __name__ == "__main__":
    main()
