"""Faults of a chaos run: nodes are killed, stopped and scaled while callers send requests."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from benchmarks.faults.odd.asked import Errors
from benchmarks.faults.odd.ledger import Ledger
from onnxsplit.errors import InputError
from runtime import Pipeline
from runtime.errors import NodeFailed


def kill(pipeline: Pipeline, stage: int | None = None, source: random.Random | None = None) -> None:
    """Kill a node that is ready."""
    ready = [n for n in pipeline.nodes if n.state == "ready" and n.pid and stage in (None, n.stage)]
    if ready:
        victim = source.choice(ready) if source is not None else ready[0]
        _signal(victim.pid or 0, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


_ODD_SCALES: list[tuple[Any, Any]] = [
    *((stage, 1) for stage in (99, -1, "0", None, 0.0, 2**70)),
    *((0, replicas) for replicas in (0, -5, "2", None, 1.5, 2**70, float("nan"))),
]


class Harm:
    """Injects faults into the nodes of a pipeline until it is ended.

    Args:
        pipeline: the pipeline under test.
        kinds: the faults, any of ``kill``, ``stop``, ``scale``, ``odd scale``.
        seed: seed of the random choices.
        ledger: takes note of violations.
        every_s: mean time between two faults, in seconds.
    """

    def __init__(
        self, pipeline: Pipeline, kinds: Sequence[str], seed: int, ledger: Ledger, every_s: float = 0.3
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._pipeline, self._kinds, self._source, self._ledger = pipeline, kinds, random.Random(seed), ledger
        self._every_s = every_s
        self._replicas = Counter(node.stage for node in pipeline.nodes)
        self._stopped: list[threading.Timer] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="harm", daemon=True)

    def __enter__(self) -> Harm:
        if self._kinds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._kinds:
            self._thread.join(30)
        for timer in self._stopped:
            timer.join()
        if "scale" in self._kinds:
            for stage, count in self._replicas.items():
                self._pipeline.scale(stage, count)

    def _run(self) -> None:
        every_s = 0.02  # the first fault is injected at once
        while not self._end.wait(every_s * self._source.uniform(0.3, 1.7)):
            every_s = self._every_s
            self._let_heal()
            kind = self._source.choice(self._kinds)
            self.counts[kind] += 1
            if kind == "kill":
                kill(self._pipeline, source=self._source)
            elif kind == "stop":
                self._stop()
            elif kind == "scale":
                stage = self._source.choice(sorted(self._replicas))
                self._pipeline.scale(stage, self._source.randint(1, 1 + self._replicas[stage]))
            else:
                self._odd_scale()

    def _let_heal(self) -> None:
        """Wait until all nodes are ready, for a limited time: without a pause no request would be answered."""
        end = time.monotonic() + 3
        while time.monotonic() < end and any(node.state != "ready" for node in self._pipeline.nodes):
            if self._end.wait(0.02):
                return

    def _stop(self) -> None:
        """Stop a node for a time that is shorter or longer than the failure detector's limit."""
        ready = [node.pid for node in self._pipeline.nodes if node.state == "ready" and node.pid]
        if ready:
            victim = self._source.choice(ready)
            _signal(victim, signal.SIGSTOP)
            timer = threading.Timer(self._source.choice([0.05, 0.5, 2.5]), _signal, (victim, signal.SIGCONT))
            timer.start()
            self._stopped.append(timer)

    def _odd_scale(self) -> None:
        stage, replicas = self._source.choice(_ODD_SCALES)
        try:
            self._pipeline.scale(stage, replicas)
            self._ledger.fault(f"scale({stage!r}, {replicas!r}) was taken")
        except InputError:
            pass
        except Exception as error:
            self._ledger.fault(f"scale({stage!r}, {replicas!r}): raw {type(error).__name__}: {error}")


HARM: dict[str, tuple[tuple[str, ...], Errors]] = {
    "none": ((), ()),
    "kills": (("kill", "kill", "stop"), (NodeFailed,)),
    "scales": (("scale", "scale", "odd scale"), ()),
}
"""What is done to the nodes, and the errors that a request which is not tried again may end with."""
