"""Ways to use two nodes: stages, replicas of the whole; batches in parts; and what a task split leaves idle.

    python benchmarks/balance/spread.py [--slices 12] [--models FOLDER] [--json]

ResNet-50 with a free batch and the OCR recogniser, each on two nodes of a thread, as two stages (model parallel) and as
two replicas of one stage (data parallel), over their ceilings; a batch of 16 rows in micro-batches of 1, 4 and 16;
``--parallel hybrid --devices 3``: stages and replicas on three. Then the multi-task net and basic-pitch, split by task,
asked for one output: how many requests each stage executed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import numpy as np
from environment import benchmark, environment, environment_line

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.bench import bench

WAYS = {
    "two stages": {"stages": 2},
    "one stage, two replicas": {"parallel": "data", "devices": 2},
    "hybrid on three": {"parallel": "hybrid", "devices": 3},
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model_of = benchmark("data_path/throughput").model_of
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        folder = Path(scratch)
        if not given.json:
            print(environment_line())
        for name in ("resnet50", "ocr-recognizer"):
            model, dims = model_of(name, given.models or folder)
            for way, options in WAYS.items():
                plan = folder / "m.plan"
                made = partition(model, out=plan, dims=dims, **options)
                report = bench(plan, slices=given.slices)
                row, ceiling = report.rows[:2]
                counts = [stage.replicas for stage in made.stages]
                say(given.json, f"{name}, {way} {counts}", per_s=row.per_s, over_ceiling=ceiling.ratio)
                if way != "hybrid on three":
                    for rows, seconds in batches(plan).items():
                        say(given.json, f"  a batch of 16 in parts of {rows}", rows_per_s=16 / seconds)
        for name in ("multitask", "basic-pitch"):
            model, dims = model_of(name, given.models or folder)
            # A backbone and three heads.
            made = partition(model, out=folder / "t.plan", dims=dims, strategy="task", stages=4)
            inputs = load_npz(example_file(folder / "t.plan", made))
            with Pipeline.launch(folder / "t.plan") as pipeline:
                for output in made.outputs:
                    before = [node.requests for node in pipeline.stats()]
                    for _ in range(5):
                        pipeline.run(inputs, outputs=[output])
                    ran = [node.requests - b for node, b in zip(pipeline.stats(), before, strict=True)]
                    say(given.json, f"{name}, 5 requests for {output}", executed_by_stage=ran)


def batches(plan: Path) -> dict[int, float]:
    """Seconds that a batch of 16 takes in parts of so many rows, taken in turns."""
    loaded = load_plan(plan)
    axes = {name: loaded.tensors[name].batch_axis for name in loaded.inputs}
    if any(axis is None for axis in axes.values()):
        return {}
    example = load_npz(example_file(plan, loaded))
    batch = {name: np.concatenate([array] * 16, axis=axes[name]) for name, array in example.items()}
    times: dict[int, list[float]] = {1: [], 4: [], 16: []}
    pipelines = {rows: Pipeline.launch(plan, micro_batch=rows) for rows in times}
    try:
        for number in range(6):
            for rows, pipeline in pipelines.items():
                begun = time.perf_counter()
                pipeline.run(batch)
                if number:
                    times[rows].append(time.perf_counter() - begun)
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    return {rows: statistics.median(taken) for rows, taken in times.items()}


def say(as_json: bool, what: str, **figures) -> None:
    """One line."""
    if as_json:
        print(json.dumps({"what": what.strip(), **figures, "environment": environment()}), flush=True)
    else:
        text = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{what:60} {text}", flush=True)


if __name__ == "__main__":
    main()
