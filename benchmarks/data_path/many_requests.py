"""What grows over a hundred thousand small requests, and how long do the slowest ones take?

Two stages do almost nothing, with 64 KiB between them, so that every request takes a slot in shared memory. As many
requests are in flight as the pipeline admits. Memory and open descriptors of this process and of the nodes are sampled
during the run.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import psutil

from benchmarks import harness
from benchmarks.example_models import one_tensor
from runtime import Pipeline

TAKES = "2 min"

SAMPLES = 20


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--requests", type=int, default=100_000)
    given = parser.parse_args()
    one = {"x": np.ones(1, np.float32)}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = one_tensor(64 << 10, Path(scratch))
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
    numbers, *sizes = np.array(samples[SAMPLES // 4 :]).T  # samples after the first quarter
    slopes = [float(np.polyfit(numbers, size, 1)[0]) for size in sizes]
    p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9]) * 1e6
    figures = {
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
    harness.Report(given).figures(figures)


if __name__ == "__main__":
    main()
