"""Faults injected into a running pipeline: what the caller saw, when it was found, and how long it took to heal.

    python benchmarks/faults/recovery.py [--times 5] [--only NAME ...] [--json]

Three stages, two replicas each, settings at their defaults, under continuous load; every answer is compared. "found" is
from the fault to the moment the node is taken for dead, "healed" from the fault until all nodes serve again, "longest"
the longest that a request took.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

import build
import numpy as np
from environment import environment, environment_line
from faulty_node import FaultyLauncher

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline

WIDTH = 128
AT = 100  # the request at which nodes fail
INJECTED = {
    "exit (SIGKILL) with a request": {"what": "kill"},
    "exit (SIGKILL) before its answer left": {"what": "kill", "at": "after the run"},
    "segfault in the session": {"what": "segfault"},
    "stopped (SIGSTOP)": {"what": "stop"},
    "session hangs": {"what": "hang"},
    "interpreter hangs": {"what": "freeze"},
}


def given(seed: int) -> dict[str, Any]:
    """One of eight inputs."""
    return {"x": np.random.default_rng(seed % 8).standard_normal((64, WIDTH)).astype(np.float32)}


class Load:
    """Requests without a pause, eight at a time, all compared."""

    def __init__(self, pipeline: Pipeline, wanted: list[Any]) -> None:
        self.pipeline, self.wanted = pipeline, wanted
        self.seen: Counter[str] = Counter()
        self.longest_s = 0.0
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(n,)) for n in range(8)]
        for thread in self.threads:
            thread.start()

    def ask(self, number: int) -> None:
        """Until the end."""
        while not self.ended.is_set():
            begun = time.monotonic()
            try:
                found = self.pipeline.run(given(number), timeout=60)["y"]
                self.seen["right" if np.array_equal(found, self.wanted[number % 8]) else "wrong"] += 1
            except Exception as error:  # what a caller sees is what is counted
                self.seen[type(error).__name__] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            number += 1

    def end(self) -> None:
        """No more."""
        self.ended.set()
        for thread in self.threads:
            thread.join()


def whole(pipeline: Pipeline, incidents: int, seconds: float = 60.0) -> float:
    """Wait until so many nodes were lost and all are there; the time then."""
    end = time.monotonic() + seconds
    while len(pipeline.incidents) < incidents or any(node.state != "ready" for node in pipeline.nodes):
        if time.monotonic() > end:
            return float("nan")
        time.sleep(0.002)
    return time.monotonic()


def injected(plan: Path, wanted: list[Any], fault: dict[str, Any]) -> dict[str, Any]:
    """One fault of the injected kind."""
    launcher = FaultyLauncher({**fault, "stage": 1, "request": AT})
    with Pipeline.launch(plan, launcher=launcher, replicas=2) as pipeline:
        load = Load(pipeline, wanted)
        healed = whole(pipeline, 1)
        at = float((launcher.folder / "fault-0").read_text())
        time.sleep(0.5)
        load.end()
        return row(load, pipeline, pipeline.incidents[0].at_ns / 1e9 - at, healed - at)


def killed(plan: Path, wanted: list[Any], victims: tuple[int, ...]) -> dict[str, Any]:
    """Some nodes killed at once."""
    with Pipeline.launch(plan, replicas=2) as pipeline:
        load = Load(pipeline, wanted)
        time.sleep(0.5)
        at = time.monotonic()
        for victim in victims:
            os.kill(pipeline.nodes[victim].pid or 0, signal.SIGKILL)
        healed = whole(pipeline, len(victims))
        time.sleep(0.5)
        load.end()
        return row(load, pipeline, max(i.at_ns for i in pipeline.incidents) / 1e9 - at, healed - at)


def row(load: Load, pipeline: Pipeline, found_s: float, healed_s: float) -> dict[str, Any]:
    """What one fault came to."""
    return {
        "seen": load.seen,
        "found_s": found_s,
        "healed_s": healed_s,
        "longest_s": load.longest_s,
        "retries": pipeline.retries,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = Path(scratch) / "m.plan"
        partition(build.save(build.chain(12, WIDTH), Path(scratch)), stages=3, out=plan, costs="analytic")
        wanted = [run_stages(plan, load_plan(plan), given(seed), threads=1)["y"] for seed in range(8)]
        tests: dict[str, Any] = {
            name: lambda fault=fault: injected(plan, wanted, dict(fault)) for name, fault in INJECTED.items()
        }
        tests["two of different stages at once"] = lambda: killed(plan, wanted, (0, 3))
        tests["both of a stage at once"] = lambda: killed(plan, wanted, (2, 3))
        tests["all six at once"] = lambda: killed(plan, wanted, (0, 1, 2, 3, 4, 5))
        for name, test in tests.items():
            if not arguments.only or name in arguments.only:
                rows[name] = [test() for _ in range(arguments.times)]
                if not arguments.json:
                    print(line(name, rows[name]), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows, "environment": environment()}))
    else:
        print(environment_line())


def line(name: str, found: list[dict[str, Any]]) -> str:
    """A row of the table."""
    seen = sum((each["seen"] for each in found), Counter())
    medians = {key: statistics.median(each[key] for each in found) for key in ("found_s", "healed_s", "longest_s")}
    longest = max(each["found_s"] for each in found)
    answers = ", ".join(f"{count} {what}" for what, count in seen.items())
    return (
        f"| {name} | {len(found)} | {answers} | {medians['found_s']:.3f} (most {longest:.3f}) | "
        f"{medians['healed_s']:.2f} | {medians['longest_s']:.2f} | {sum(each['retries'] for each in found)} |"
    )


if __name__ == "__main__":
    main()
