"""A process that runs a pipeline with the code on its path, slice by slice; see short_stages.py.

It answers each line, a number of seconds, with the rate and the processor time of each process in µs per request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from runtime import Pipeline


def processor_ns(pid: int) -> int:
    """The processor time of all threads of a process so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total


def main() -> None:
    """Answer lines until there are no more."""
    plan = Path(sys.argv[1])
    inputs = load_npz(example_file(plan, load_plan(plan)))
    with Pipeline.launch(plan, threads=1) as pipeline:
        processes = [os.getpid(), *(node.pid for node in pipeline.nodes)]

        def slice_of(seconds: float) -> list[float]:
            before, begun, futures = [processor_ns(pid) for pid in processes], time.monotonic(), []
            done: list[float] = []
            while time.monotonic() - begun < seconds:
                futures.append(pipeline.submit(inputs))
                futures[-1].add_done_callback(lambda _: done.append(time.monotonic()))
            for future in futures:
                future.result()
            spent = [now - then for now, then in zip(map(processor_ns, processes), before, strict=True)]
            steady = done[pipeline.inflight :]  # the first ones find empty nodes
            rate = (len(steady) - 1) / (steady[-1] - steady[0])
            return [rate, *(time_ns / len(futures) / 1e3 for time_ns in spent)]

        slice_of(0.5)
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(slice_of(float(line))), flush=True)


if __name__ == "__main__":
    main()
