"""A hundred thousand small requests: what grows, what is left, and how the slowest ones fare.

    python benchmarks/data_path/many_requests.py [--requests 100000] [--json]

Two stages of next to nothing with 64 KiB between them, so that every request takes a slot; as many in flight as the
pipeline admits. Memory of this process and of the nodes, and their open descriptors, are taken along the way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import numpy as np
import psutil
from environment import benchmark, environment, environment_line

from runtime import Pipeline

SAMPLES = 20


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    one = {"x": np.ones(1, np.float32)}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = benchmark("data_path/hop").plan_of(64 << 10, Path(scratch))
        with Pipeline.launch(plan, threads=1) as pipeline:
            processes = [psutil.Process()] + [psutil.Process(node.pid) for node in pipeline.nodes]
            latencies = np.full(given.requests, np.nan)
            wrong, samples, answered = 0, [], threading.Semaphore(0)

            def ask(number: int) -> None:
                begun = time.perf_counter()

                def done(future, number=number, begun=begun) -> None:
                    nonlocal wrong
                    latencies[number] = time.perf_counter() - begun
                    wrong += future.exception() is not None or future.result()["y"][0] != 1
                    answered.release()

                pipeline.submit(one).add_done_callback(done)

            for number in range(5000):
                ask(number % given.requests)
            for number in range(given.requests):
                if number % (given.requests // SAMPLES) == 0:
                    samples.append((number, *(process.memory_info().rss for process in processes)))
                if number == 0:
                    descriptors = [process.num_fds() for process in processes]
                ask(number)
            for _ in range(given.requests + 5000):
                answered.acquire()
            left = [process.num_fds() for process in processes]
            lent = pipeline.lent_bytes
            first = pipeline.stats()[0]
            shared = (first.shared_bytes, first.output_bytes)
    numbers, *sizes = np.array(samples[SAMPLES // 4 :]).T  # from a quarter of the way on
    slopes = [float(np.polyfit(numbers, size, 1)[0]) for size in sizes]
    p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9]) * 1e6
    found = {
        "requests": given.requests,
        "wrong": int(wrong),
        "memory_mib_first_last": [sum(sample[1:]) / 2**20 for sample in (samples[0], samples[-1])],
        "slope_bytes_a_request_caller_and_nodes": slopes,
        "descriptors_before_after": [descriptors, left],
        "lent_bytes_at_the_end": lent,
        "shared_of_output_bytes": shared,
        "p50_us": p50,
        "p99_us": p99,
        "p999_us": p999,
    }
    if given.json:
        print(json.dumps({**found, "environment": environment()}))
        return
    print(environment_line())
    for name, value in found.items():
        print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
