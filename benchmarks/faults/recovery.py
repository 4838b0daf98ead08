"""What does the caller see of a fault, how soon is it detected, and how long does recovery take?

Faults are injected into three stages with two replicas each, settings at their defaults, under continuous load; every
answer is compared. "found" is the time from the fault to the moment when the node is taken for dead, "healed" the time
from the fault until all nodes serve again, "longest" the longest that a request took. Figures are medians, except "most
found".
"""

from __future__ import annotations

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

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import build
import numpy as np
from faulty_node import FaultyLauncher

from benchmarks import harness
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline

TAKES = "6 min"

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
    """Return one of eight inputs by its number."""
    return {"x": np.random.default_rng(seed % 8).standard_normal((64, WIDTH)).astype(np.float32)}


class Load:
    """Sends requests without a pause, eight at a time, and compares every answer."""

    def __init__(self, pipeline: Pipeline, wanted: list[Any]) -> None:
        self.pipeline, self.wanted = pipeline, wanted
        self.seen: Counter[str] = Counter()
        self.longest_s = 0.0
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.ask, args=(n,)) for n in range(8)]
        for thread in self.threads:
            thread.start()

    def ask(self, number: int) -> None:
        """Send requests until the load ends."""
        while not self.ended.is_set():
            begun = time.monotonic()
            try:
                answer = self.pipeline.run(given(number), timeout=60)["y"]
                self.seen["right" if np.array_equal(answer, self.wanted[number % 8]) else "wrong"] += 1
            except Exception as error:  # every error that a caller sees is counted
                self.seen[type(error).__name__] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            number += 1

    def end(self) -> None:
        """Stop sending requests."""
        self.ended.set()
        for thread in self.threads:
            thread.join()


def whole(pipeline: Pipeline, incidents: int, seconds: float = 60.0) -> float:
    """Wait until this many nodes were lost and all are ready again; return the time."""
    end = time.monotonic() + seconds
    while len(pipeline.incidents) < incidents or any(node.state != "ready" for node in pipeline.nodes):
        if time.monotonic() > end:
            return float("nan")
        time.sleep(0.002)
    return time.monotonic()


def injected(plan: Path, wanted: list[Any], fault: dict[str, Any]) -> dict[str, Any]:
    """Make a node of the middle stage fail at a request."""
    launcher = FaultyLauncher({**fault, "stage": 1, "request": AT})
    with Pipeline.launch(plan, launcher=launcher, replicas=2) as pipeline:
        load = Load(pipeline, wanted)
        healed = whole(pipeline, 1)
        at = float((launcher.folder / "fault-0").read_text())
        time.sleep(0.5)
        load.end()
        return row(load, pipeline, pipeline.incidents[0].at_ns / 1e9 - at, healed - at)


def killed(plan: Path, wanted: list[Any], victims: tuple[int, ...]) -> dict[str, Any]:
    """Kill these nodes at once."""
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
    """Return the figures of one fault."""
    return {
        "seen": load.seen,
        "found_s": found_s,
        "healed_s": healed_s,
        "longest_s": load.longest_s,
        "retries": pipeline.retries,
    }


def summary(name: str, times: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a fault that was injected several times."""
    answers = sum((each["seen"] for each in times), Counter())
    medians = {key: statistics.median(each[key] for each in times) for key in ("found_s", "healed_s", "longest_s")}
    return {
        "fault": name,
        "times": len(times),
        "answers": ", ".join(f"{count} {what}" for what, count in answers.items()),
        **medians,
        "most_found_s": max(each["found_s"] for each in times),
        "retries": sum(each["retries"] for each in times),
    }


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--times", type=int, default=5, help="number of times that each fault is injected")
    parser.add_argument("--only", nargs="*", help="only the faults with these names")
    arguments = parser.parse_args()
    report = harness.Report(
        arguments, fault="38", times="5", answers="12", found_s="7.3f", most_found_s="12.3f", healed_s="8.2f",
        longest_s="9.2f", retries="7",
    )  # fmt: skip
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
                report.row(summary(name, [test() for _ in range(arguments.times)]))


if __name__ == "__main__":
    main()
