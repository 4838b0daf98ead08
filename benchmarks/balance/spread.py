"""Which way to use two nodes is best: stages, or replicas of the whole?

ResNet-50 with a free batch and the OCR recogniser run on two nodes with one thread each, as two stages (model parallel)
and as two replicas of one stage (data parallel). Rates are relative to their ceilings. Further rows have a batch of 16
rows in micro-batches of 1, 4 and 16, and ``--parallel hybrid --devices 3``, which uses stages and replicas on three
devices. Then the multi-task net and basic-pitch, split by task, are asked for one output; the row shows how many
requests each stage executed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import example_models, harness
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.bench import bench

TAKES = "8 min"

WAYS = {
    "two stages": {"stages": 2},
    "one stage, two replicas": {"parallel": "data", "devices": 2},
    "hybrid on three": {"parallel": "hybrid", "devices": 3},
}


def main() -> None:
    """Print the tables."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--models", type=Path, help="folder that keeps exported models")
    given = parser.parse_args()
    report = harness.Report(given)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        folder = Path(scratch)
        for name in ("resnet50", "ocr-recognizer"):
            model, dims = example_models.named(name, given.models or folder)
            for way, options in WAYS.items():
                plan = folder / "m.plan"
                made = partition(model, out=plan, dims=dims, **options)
                measured = bench(plan, slices=given.slices)
                row, ceiling = measured.rows[:2]
                over = harness.ratio(row.rates_per_s, ceiling.rates_per_s).median
                counts = [stage.replicas for stage in made.stages]
                say(report, f"{name}, {way} {counts}", per_s=row.per_s, over_ceiling=over)
                if way != "hybrid on three":
                    for rows, seconds in batches(plan).items():
                        say(report, f"  a batch of 16 in parts of {rows}", rows_per_s=16 / seconds)
        for name in ("multitask", "basic-pitch"):
            model, dims = example_models.named(name, given.models or folder)
            # A backbone and three heads.
            made = partition(model, out=folder / "t.plan", dims=dims, strategy="task", stages=4)
            inputs = harness.example(folder / "t.plan")
            with Pipeline.launch(folder / "t.plan") as pipeline:
                for output in made.outputs:
                    before = [node.requests for node in pipeline.stats()]
                    for _ in range(5):
                        pipeline.run(inputs, outputs=[output])
                    ran = [node.requests - b for node, b in zip(pipeline.stats(), before, strict=True)]
                    say(report, f"{name}, 5 requests for {output}", executed_by_stage=ran)


def batches(plan: Path) -> dict[int, float]:
    """Measure the seconds that a batch of 16 takes, by the rows of its parts, in turns."""
    loaded = load_plan(plan)
    axes = {name: loaded.tensors[name].batch_axis for name in loaded.inputs}
    if any(axis is None for axis in axes.values()):
        return {}
    example = harness.example(plan)
    batch = {name: np.concatenate([array] * 16, axis=axes[name]) for name, array in example.items()}
    with ExitStack() as stack:
        pipelines = {rows: stack.enter_context(Pipeline.launch(plan, micro_batch=rows)) for rows in (1, 4, 16)}

        def seconds(pipeline: Pipeline) -> float:
            begun = time.perf_counter()
            pipeline.run(batch)
            return time.perf_counter() - begun

        times = harness.in_turns({str(n): lambda p=p: seconds(p) for n, p in pipelines.items()}, 5)
    return {int(rows): statistics.median(taken) for rows, taken in times.items()}


def say(report: harness.Report, what: str, **figures: Any) -> None:
    """Print one line."""
    text = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    report.row({"what": what.strip(), **figures}, f"{what:60} {text}")


if __name__ == "__main__":
    main()
