"""What does the runtime itself cost as stages are added?

The stages are in a row, take 1, 5 or 20 ms each, and have 4 KiB between them. They sleep, so that they do not compete
for processors. Throughput is relative to that of one stage (1 / its time), and the latency of one request to the sum of
the stages. The time of a stage is its measured sleep, on average.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
from onnx import helper

from benchmarks import harness
from benchmarks.example_models import saved
from onnxsplit.planning.planner import partition
from onnxsplit.session import quiet_environment
from runtime import Pipeline

TAKES = "4 min"

GIVEN = {"t0": np.ones((1, 1024), np.float32)}


def plan_of(stages: int, folder: Path) -> Path:
    """Make a plan of trivial ops in a row, one per stage."""
    nodes = [helper.make_node("Neg", [f"t{n}"], [f"t{n + 1}"]) for n in range(stages)]
    model = saved(folder / "m.onnx", nodes, ("t0", f"t{stages}"), [1, 1024], [])
    cuts = [f"t{n}" for n in range(1, stages)]
    partition(model, out=folder / "plan", costs="analytic", **({"cut_at": cuts} if cuts else {"stages": 1}))
    return folder / "plan"


@contextmanager
def running(plan: Path, stages: int, seconds: float, folder: Path):
    """Open a pipeline of sleeping nodes."""
    address = f"ipc://{folder / 'control'}"
    script = str(Path(__file__).with_name("sleeping_node.py"))
    with ExitStack() as stack:
        nodes = [
            subprocess.Popen(
                [sys.executable, script, address, str(stage), str(seconds)],
                env=quiet_environment(),
            )
            for stage in range(stages)
        ]
        for node in nodes:
            stack.callback(node.wait)
        yield stack.enter_context(Pipeline.listen(plan, bind=address, start_timeout=60))


def measure(stages: int, seconds: float, span: float) -> dict[str, float]:
    """Measure the row of one number of stages and one stage time."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        folder = Path(scratch)
        with running(plan_of(stages, folder), stages, seconds, folder) as pipeline:
            for _ in range(5):
                pipeline.run(GIVEN)
            latencies = []
            for _ in range(max(10, int(span / 2 / seconds / stages))):
                begun = time.perf_counter()
                pipeline.run(GIVEN)
                latencies.append(time.perf_counter() - begun)
            alone = sum(node.run_ns for node in pipeline.stats()) / 1e9
            done: list[float] = []
            end = time.monotonic() + span
            futures = []
            while time.monotonic() < end:
                futures.append(pipeline.submit(GIVEN))
                futures[-1].add_done_callback(lambda _: done.append(time.monotonic()))
            for future in futures:
                future.result()
            steady = done[pipeline.inflight : -pipeline.inflight]
            rate = (len(steady) - 1) / (steady[-1] - steady[0])
            slowest = max(node.run_ns for node in pipeline.stats()) / 1e9
    latency = statistics.median(latencies)
    return {
        "stages": stages,
        "stage_ms": seconds * 1e3,
        "slept_ms": slowest * 1e3,
        "per_s": rate,
        "of_one_stage": rate * slowest,
        "latency_ms": latency * 1e3,
        "sum_of_stages_ms": alone * 1e3,
        "added_a_hop_us": (latency - alone) / (stages + 1) * 1e6,
    }


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds under full load, for each row")
    parser.add_argument("--stages", type=int, nargs="+", default=list(range(1, 9)))
    given = parser.parse_args()
    report = harness.Report(
        given, stage_ms="8.0f", stages="6", slept_ms="8.3f", per_s="7.1f", of_one_stage="12.3f", latency_ms="10.2f",
        sum_of_stages_ms="16.2f", added_a_hop_us="14.0f",
    )  # fmt: skip
    for milliseconds in (1, 5, 20):
        for stages in given.stages:
            report.row(measure(stages, milliseconds / 1e3, given.seconds))


if __name__ == "__main__":
    main()
