"""How long do requests take under each balancing policy, when three replicas differ?

Nodes, sockets and policies are real. Runs sleep instead of computing, so that three replicas work independently on two
cores. A run takes a time per row of the batch, multiplied by the slowness of its replica at that moment.

    slow        one replica is ten times slower
    transient   each replica in turn is five times slower for half a second of every one and a half
    mixed       batches of 1 and, one in ten, of 16

Latency is measured under random arrivals (Poisson) at about 60 % of the replicas' capacity, throughput with the
pipeline kept full. Policies take turns.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import build
import numpy as np

from benchmarks import harness
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.launch.local import LocalLauncher
from runtime.wire.messages.control import POLICIES

TAKES = "12 min"

REPLICAS = 3
CASES = {"slow": (5.0, 250.0), "transient": (5.0, 300.0), "mixed": (4.0, 170.0)}  # ms a row, arrivals a second


class SleepingLauncher(LocalLauncher):
    """Starts nodes whose runs sleep."""

    module = "sleeping_node"

    def __init__(self, case: str) -> None:
        super().__init__(memory_bytes=64 << 20)
        self.case = case

    def start(self, **of: Any) -> Any:
        """Start a node that finds its module and its case."""
        paths = [str(Path(__file__).parent), str(harness.ROOT)]
        os.environ.update(SLEEPING=json.dumps([self.case, CASES[self.case][0]]), PYTHONPATH=os.pathsep.join(paths))
        return super().start(**of)


def batches(case: str, count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Make the requests of a case."""
    source = random.Random(1)
    sizes = [16 if case == "mixed" and source.random() < 0.1 else 1 for _ in range(count)]
    return [{"x": np.ones((size, 32), np.float32)} for size in sizes]


def latencies(pipeline: Pipeline, case: str, seconds: float, seed: int) -> list[float]:
    """Measure the times of requests that arrive at random, in milliseconds."""
    source, times, lock = random.Random(seed), [], threading.Lock()
    rate = CASES[case][1]
    given = batches(case, int(seconds * rate))
    futures, at = [], time.perf_counter()
    for one in given:
        at += source.expovariate(rate)
        time.sleep(max(0.0, at - time.perf_counter()))
        begun = at  # the time that a request waits to be sent counts, too

        def done(_: Any, begun: float = begun) -> None:
            with lock:
                times.append((time.perf_counter() - begun) * 1e3)

        future = pipeline.submit(one)
        future.add_done_callback(done)
        futures.append(future)
    for future in futures:
        future.result()
    return times


def throughput(pipeline: Pipeline, case: str, seconds: float) -> float:
    """Measure the rows per second of a full pipeline, with twelve requests at once."""
    given = batches(case, 400)
    room, rows, end = threading.Semaphore(12), 0, time.perf_counter() + seconds
    begun, number, lock = time.perf_counter(), 0, threading.Lock()

    def done(size: int) -> None:
        nonlocal rows
        with lock:
            rows += size
        room.release()

    while time.perf_counter() < end:
        room.acquire()
        one = given[number % len(given)]
        number += 1
        pipeline.submit(one).add_done_callback(lambda future: done(len(future.result()["y"])))
    per_s = rows / (time.perf_counter() - begun)
    for _ in range(12):
        room.acquire()
    return per_s


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--rounds", type=int, default=3, help="number of turns of each policy")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of each load in a round")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--policies", nargs="*", default=["round-robin", *(p for p in POLICIES if p != "round-robin")])
    given = parser.parse_args()
    report = harness.Report(
        given, case="9", policy="14", p50_ms="7.1f", p99_ms="7.1f", mean_ms="7.1f", rows_per_s_full="15.0f"
    )
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = Path(scratch) / "m.plan"
        partition(build.save(build.chain(2), Path(scratch)), stages=2, out=plan, costs="analytic", dims={"batch": 1})
        for case in given.cases:
            times: dict[str, list[float]] = {policy: [] for policy in given.policies}
            rates: dict[str, list[float]] = {policy: [] for policy in given.policies}
            for number in range(given.rounds):
                for policy in given.policies:
                    with Pipeline.launch(
                        plan,
                        launcher=SleepingLauncher(case),
                        replicas={1: REPLICAS},
                        balance=policy,
                        inflight=2000,
                        micro_batch=0,
                        threads=1,
                    ) as pipeline:
                        latencies(pipeline, case, 1.0, 99)  # warm-up, so that the speeds of the replicas are known
                        times[policy] += latencies(pipeline, case, given.seconds, number)
                        rates[policy].append(throughput(pipeline, case, given.seconds))
            for policy in given.policies:
                p50, p99 = map(float, np.percentile(times[policy], [50, 99]))
                figures = {"p50_ms": p50, "p99_ms": p99, "mean_ms": float(np.mean(times[policy]))}
                full = float(np.median(rates[policy]))
                report.row({"case": case, "policy": policy, **figures, "rows_per_s_full": full})


if __name__ == "__main__":
    main()
