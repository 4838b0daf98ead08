"""What it costs that nothing is lost: replay and signs of life on, beside off.

    python benchmarks/data_path/guarantees.py [NAME|MODEL.onnx ...] [--slices 20] [--seconds 0.5] [--json]

Off is ``attempts=1`` (inputs are not held) and no sign of life for an hour. Both pipelines run at once and take turns,
first with the pipeline full, then one request at a time. Models as of benchmarks/throughput.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from environment import benchmark, environment, environment_line

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.timings import Timings

NEVER = Timings(beat_s=3600, silence_s=86400)


def rate(pipeline: Pipeline, inputs: dict[str, Any], seconds: float) -> float:
    """Requests a second of a full pipeline."""
    futures, begun = [], time.perf_counter()
    while time.perf_counter() < begun + seconds or len(futures) < 3 * pipeline.inflight:
        futures.append(pipeline.submit(inputs))
    for future in futures:
        future.result()
    return len(futures) / (time.perf_counter() - begun)


def latency(pipeline: Pipeline, inputs: dict[str, Any], seconds: float) -> float:
    """Milliseconds of one request at a time: the median."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begun = time.perf_counter()
        pipeline.run(inputs)
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by bootstrap."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1950]


def measure(name: str, slices: int, seconds: float, scratch: Path) -> dict[str, Any]:
    """Both pipelines of one model."""
    model, dims = benchmark("data_path/throughput").model_of(name, scratch)
    plan = scratch / f"{model.stem}.plan"
    partition(model, stages=2, out=plan, dims=dims)
    inputs = load_npz(example_file(plan, load_plan(plan)))
    with ExitStack() as stack:
        on = stack.enter_context(Pipeline.launch(plan, threads=1))
        off = stack.enter_context(Pipeline.launch(plan, threads=1, attempts=1, timings=NEVER))
        found: dict[str, Any] = {"model": model.stem}
        for what, function in (("rate", rate), ("latency", latency)):
            pairs = []
            for number in range(slices + 1):
                order = (on, off) if number % 2 else (off, on)
                values = {id(pipeline): function(pipeline, inputs, seconds) for pipeline in order}
                pairs.append((values[id(on)], values[id(off)]))
            pairs = pairs[1:]
            found[f"{what}_on"], found[f"{what}_off"] = (statistics.median(c) for c in zip(*pairs, strict=True))
            found[f"{what}_ratio"] = interval([a / b for a, b in pairs])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["resnet50", "ocr-recognizer", "chain-1ms", "chain-0.3ms"])
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        for name in given.names:
            rows.append(measure(name, given.slices, given.seconds, Path(scratch)))
            if not given.json:
                row = rows[-1]
                rates = "{:.3f} ({:.3f}-{:.3f})".format(*row["rate_ratio"])
                times = "{:.3f} ({:.3f}-{:.3f})".format(*row["latency_ratio"])
                print(
                    f"| {row['model']} | {row['rate_on']:.1f} / {row['rate_off']:.1f} | {rates} | "
                    f"{row['latency_on']:.2f} / {row['latency_off']:.2f} | {times} |",
                    flush=True,
                )
    if given.json:
        print(json.dumps({"rows": rows, "environment": environment()}))
    else:
        print(environment_line())


if __name__ == "__main__":
    main()
