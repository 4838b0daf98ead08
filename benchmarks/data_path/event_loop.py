"""How long do requests keep an event loop from its other tasks?

Tasks send requests one after the other, each with ``await pipeline.arun(...)``, or with
``asyncio.wrap_future(pipeline.submit(...))``, which blocks the loop while the pipeline has no room. Meanwhile another
task sleeps for a millisecond again and again; what it sleeps longer is the stall. Both ways take turns on one pipeline.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import example_models, harness
from onnxsplit import Pipeline

TAKES = "3 min"

_TICK_S = 0.001


async def stalls_ms(
    pipeline: Pipeline, inputs: dict[str, Any], tasks: int, requests: int, way: str
) -> dict[str, float]:
    """Send the requests of all tasks one way; return the rate, and percentiles of the stalls in milliseconds."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late.append((time.perf_counter() - begun - _TICK_S) * 1e3)

    async def send() -> None:
        for _ in range(requests):
            await (pipeline.arun(inputs) if way == "arun" else asyncio.wrap_future(pipeline.submit(inputs)))

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.1)
    late.clear()
    begun = time.perf_counter()
    await asyncio.gather(*(send() for _ in range(tasks)))
    took_s = time.perf_counter() - begun
    ticking.cancel()
    return {"per_s": tasks * requests / took_s, "p50": float(np.median(late)), "p99": float(np.percentile(late, 99))}


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=["ocr-recognizer", "resnet50", *example_models.CHAINS])
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1, help="requests of each task in a slice")
    parser.add_argument("--slices", type=int, default=5)
    given = parser.parse_args()
    columns = {f"{figure}_{way}": "13.1f" for way in ("arun", "submit") for figure in ("per_s", "p50", "p99")}
    report = harness.Report(given, model="16", **columns)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        for name in given.names:
            plan = example_models.named_plan(name, Path(scratch))
            inputs = harness.example(plan)
            with Pipeline.launch(plan, threads=1) as pipeline:
                contenders = {
                    way: lambda way=way: asyncio.run(
                        stalls_ms(pipeline, inputs, given.tasks, given.requests, way)  # noqa: B023
                    )
                    for way in ("arun", "submit")
                }
                taken = harness.in_turns(contenders, given.slices)
            row: dict[str, Any] = {"model": name}
            for way, slices in taken.items():
                row |= {
                    f"{figure}_{way}": statistics.median(one[figure] for one in slices)
                    for figure in ("per_s", "p50", "p99")
                }
            report.row(row)


if __name__ == "__main__":
    main()
