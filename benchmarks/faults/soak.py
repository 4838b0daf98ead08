"""Are all requests answered correctly while nodes are killed and stopped at random?

A trained model runs in three stages with two replicas each, under continuous load. A random node gets SIGKILL every two
seconds, and a random one gets SIGSTOP every ten, and never SIGCONT. Every answer is compared with that of the whole
model (within 1e-4 of its scale; inputs differ, so an answer to another request would be wrong), and with the first
answer to the same input. The exit status is 1 if a request was lost, answered twice or answered wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import psutil
import zoo

from benchmarks import harness
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from runtime import Pipeline

TAKES = "4 min"

INPUTS = 16
BEFORE_S = 10.0


def main() -> None:
    """Print the figures; exit with 1 if a request was lost, answered twice or answered wrong."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--model", default="ocr-classifier", help="a name of models/zoo.toml, or a file")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--kill-every", type=float, default=2.0, help="seconds")
    parser.add_argument("--stop-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = Path(given.model) if Path(given.model).exists() else zoo.fetch(given.model)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = Path(scratch) / "m.plan"
        partition(model, stages=3, out=plan, dims=zoo.entries().get(given.model, {}).get("dims", {}))
        with Pipeline.launch(plan, replicas=2, threads=1) as pipeline:
            figures = Soak(pipeline, model, plan, given).run()
    harness.Report(given).figures(figures)
    sys.exit(any(figures[name] for name in ("wrong", "lost", "duplicated", "failed")))


class Soak:
    """One run under load."""

    def __init__(self, pipeline: Pipeline, model: Path, plan: Path, given: argparse.Namespace) -> None:
        self.pipeline, self.given = pipeline, given
        example = harness.example(plan)
        self.inputs = [varied(example, seed) for seed in range(INPUTS)]
        whole = open_session(model, threads=1)
        names = [name for name, _ in whole.inputs]
        self.wanted = [whole.run({name: one[name] for name in names}) for one in self.inputs]
        self.first: list[dict[str, Any] | None] = [None] * INPUTS
        self.counts: Counter[str] = Counter()
        self.answers: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.times: list[float] = []
        self.heals: dict[str, list[float]] = {"kill": [], "stop": []}
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def run(self) -> dict[str, Any]:
        """Load the pipeline, first without faults, then with them; return the figures of both."""
        self.load(until=time.monotonic() + BEFORE_S)
        before, answered = self.rate(BEFORE_S), self.counts["answered"]
        memory = self.memory()
        harm = threading.Thread(target=self.harm)
        harm.start()
        begun = time.monotonic()
        self.load(requests=self.given.requests)
        self.ended.set()
        took = time.monotonic() - begun
        harm.join()
        latencies = np.array(self.times[answered:]) * 1e3
        return {
            "accepted": self.counts["accepted"],
            "answered": self.counts["answered"],
            "wrong": self.counts["wrong"],
            "lost": self.counts["accepted"] - len(self.answers),
            "duplicated": sum(count > 1 for count in self.answers.values()),
            "failed": dict(self.errors),
            "bits differ from the first": self.counts["other bits"],
            "kills": len(self.heals["kill"]),
            "stops": len(self.heals["stop"]),
            "repeated attempts": self.pipeline.retries,
            "requests/s before": round(before, 1),
            "requests/s during": round(self.given.requests / took, 1),
            "during over before": round(self.given.requests / took / before, 3),
            "latency ms p50 p99 max": [
                round(float(v), 1) for v in (*np.percentile(latencies, [50, 99]), max(latencies))
            ],
            "kill to full strength s": self.quantiles("kill"),
            "stop to full strength s": self.quantiles("stop"),
            "MiB before (caller, nodes)": memory,
            "MiB after (caller, nodes)": self.memory(),
            "lent bytes at the end": self.pipeline.lent_bytes,
        }

    def load(self, *, until: float = float("inf"), requests: int = sys.maxsize) -> None:
        """Keep the pipeline full; return when everything is answered."""
        sent, answered = 0, threading.Semaphore(0)
        while sent < requests and time.monotonic() < until:
            number = self.counts["accepted"]
            begun = time.monotonic()
            future = self.pipeline.submit(self.inputs[number % INPUTS])
            self.counts["accepted"] += 1

            def done(future: Any, number: int = number, begun: float = begun) -> None:
                self.check(number, future, time.monotonic() - begun)
                answered.release()

            future.add_done_callback(done)
            sent += 1
        for _ in range(sent):
            if not answered.acquire(timeout=60):
                return  # missing answers are counted as lost

    def check(self, number: int, future: Any, seconds: float) -> None:
        """Compare one answer with the reference."""
        with self.lock:
            self.answers[number] += 1
            self.times.append(seconds)
            if future.exception() is not None:
                self.errors[f"{type(future.exception()).__name__}: {future.exception()}"[:200]] += 1
                return
            self.counts["answered"] += 1
            got, which = future.result(), number % INPUTS
            wanted = self.wanted[which]
            self.counts["wrong"] += not harness.right(got, wanted)
            first = self.first[which]
            if first is None:
                self.first[which] = got
            elif not all(np.array_equal(got[n], first[n]) for n in got):
                self.counts["other bits"] += 1

    def rate(self, seconds: float) -> float:
        """Return the answers per second so far."""
        return self.counts["answered"] / seconds

    def harm(self) -> None:
        """Kill and stop nodes until the load ends; then wait until all nodes are replaced."""
        source = random.Random(self.given.seed)
        waiting: list[threading.Thread] = []
        kill, stop = time.monotonic() + self.given.kill_every, time.monotonic() + self.given.stop_every
        while not self.ended.wait(max(0.0, min(kill, stop) - time.monotonic())):
            now = time.monotonic()
            for kind, due, number in (("kill", kill, signal.SIGKILL), ("stop", stop, signal.SIGSTOP)):
                if now < due:
                    continue
                ready = [node for node in self.pipeline.nodes if node.state == "ready" and node.pid]
                if ready:
                    victim = source.choice(ready)
                    os.kill(victim.pid, number)
                    waiting.append(threading.Thread(target=self.heal, args=(kind, victim, time.monotonic())))
                    waiting[-1].start()
            kill = kill + self.given.kill_every if now >= kill else kill
            stop = stop + self.given.stop_every if now >= stop else stop
        for thread in waiting:
            thread.join()

    def heal(self, kind: str, victim: Any, at: float) -> None:
        """Wait until the stage of a victim has all its nodes again."""
        while time.monotonic() < at + 120:
            stage = [node for node in self.pipeline.nodes if node.stage == victim.stage]
            if all(node.state == "ready" and node.pid != victim.pid for node in stage):
                self.heals[kind].append(time.monotonic() - at)
                return
            time.sleep(0.005)
        self.errors["a stage that did not heal in 120 s"] += 1

    def quantiles(self, kind: str) -> list[float]:
        """Return the 50th and the 99th percentile of the times to recover, and the longest."""
        times = self.heals[kind] or [0.0]
        return [round(float(v), 2) for v in (*np.percentile(times, [50, 99]), max(times))]

    def memory(self) -> list[float]:
        """Return the memory of this process and of all nodes together in MiB (proportional set size)."""
        nodes = [psutil.Process(node.pid) for node in self.pipeline.nodes if node.pid]
        sizes = [sum(one.memory_full_info().pss for one in each) for each in ([psutil.Process()], nodes)]
        return [round(size / 2**20, 1) for size in sizes]


def varied(example: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return other values for the same inputs: random floats, and rotated integers."""
    source = np.random.default_rng(seed)
    return {
        name: source.standard_normal(array.shape).astype(array.dtype)
        if array.dtype.kind == "f"
        else np.roll(array, seed + 1, axis=-1)
        for name, array in example.items()
    }


if __name__ == "__main__":
    main()
