"""Requests with numbers in their values, sent in several ways, and a ledger of what became of each."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, save_model

from benchmarks.recut.observed import Answers
from onnxsplit.planning.planner import partition
from runtime import Pipeline

OPS = 12
"""Number of the ops of the model; it is even, so the output equals the input."""

_TASKS = 3  # requests in flight of an event loop
_MAPPED = 20  # requests of one map
_MOST_ROWS = 5


class Ledger:
    """What became of every request.

    Args:
        requests: the number of requests to send; None for as many as there are until :meth:`end`.

    Attributes:
        answers: the moments and latencies of the answers.
        answered: how often each request was answered, by its number.
        errors: the number of requests that failed, by the error.
        wrong: the number of wrong answers.
    """

    def __init__(self, requests: int | None = None) -> None:
        self.answers = Answers()
        self.answered: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.wrong = 0
        self._requests = sys.maxsize if requests is None else requests
        self._sent = 0
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """The number of the next request; None when all were sent."""
        with self._lock:
            if self._sent >= self._requests:
                return None
            self._sent += 1
            return self._sent

    def end(self) -> None:
        """Send no more requests."""
        with self._lock:
            self._requests = 0

    def note(self, number: int, begun: float, *, is_right: bool) -> None:
        """Note the answer to a request that was sent at a moment."""
        self.answers.note(begun)
        with self._lock:
            self.answered[number] += 1
            self.wrong += not is_right

    def failed(self, error: BaseException) -> None:
        """Note that a request failed."""
        with self._lock:
            self.errors[f"{type(error).__name__}: {error}"[:200]] += 1

    @property
    def counts(self) -> dict[str, Any]:
        """The counts, by name."""
        return {
            "sent": self._sent,
            "answered": len(self.answered),
            "lost": self._sent - len(self.answered),
            "wrong": self.wrong,
            "twice": sum(count > 1 for count in self.answered.values()),
            "errors": dict(self.errors),
        }


def echo_plans(folder: Path, *cuts: Sequence[int]) -> list[Path]:
    """Make plans of a model that returns its input: ``t0`` of shape [batch, 16] goes through ops to ``t12``.

    Args:
        folder: an empty folder.
        cuts: for each plan, the numbers of ops after which the model is cut.
    """
    nodes = [helper.make_node("Neg", [f"t{n}"], [f"t{n + 1}"]) for n in range(OPS)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16]) for name in ("t0", f"t{OPS}")]
    graph = helper.make_graph(nodes, "echo", ends[:1], ends[1:])
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "echo.onnx"
    )
    plans = []
    for number, cut in enumerate(cuts):
        plans.append(folder / f"{number}.plan")
        partition(folder / "echo.onnx", out=plans[-1], cut_at=[f"t{op}" for op in cut], costs="analytic")
    return plans


def request(number: int) -> dict[str, Any]:
    """The inputs of a request: one to five rows, whose values are its number."""
    return {"t0": np.full((1 + number % _MOST_ROWS, 16), number, np.float32)}


def is_right(number: int, outputs: Mapping[str, Any]) -> bool:
    """Whether the outputs are those of the request with a number."""
    return np.array_equal(outputs[f"t{OPS}"], request(number)["t0"])


def from_a_thread(pipeline: Pipeline, ledger: Ledger) -> None:
    """Send one request after another until all were sent."""
    while (number := ledger.take()) is not None:
        begun = time.monotonic()
        try:
            outputs = pipeline.run(request(number))
        except Exception as error:
            ledger.failed(error)
        else:
            ledger.note(number, begun, is_right=is_right(number, outputs))


def from_an_event_loop(pipeline: Pipeline, ledger: Ledger) -> None:
    """Send requests from the tasks of an event loop until all were sent."""

    async def task() -> None:
        while (number := ledger.take()) is not None:
            begun = time.monotonic()
            try:
                outputs = await pipeline.arun(request(number))
            except Exception as error:
                ledger.failed(error)
            else:
                ledger.note(number, begun, is_right=is_right(number, outputs))

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(_TASKS)))

    asyncio.run(tasks())


def by_map(pipeline: Pipeline, ledger: Ledger) -> None:
    """Map the pipeline over some requests at a time until all were sent. A failed request ends one map."""
    begun: list[tuple[int, float]] = []

    def inputs() -> Iterator[dict[str, Any]]:
        for _ in range(_MAPPED):
            if (number := ledger.take()) is None:
                return
            begun.append((number, time.monotonic()))
            yield request(number)

    while True:
        begun.clear()
        try:
            for place, outputs in pipeline.map(inputs(), ordered=False):
                number, at = begun[place]
                ledger.note(number, at, is_right=is_right(number, outputs))
        except Exception as error:
            ledger.failed(error)
        if not begun:
            return


CALLERS = {"thread": from_a_thread, "event loop": from_an_event_loop, "map": by_map}


def start(pipeline: Pipeline, ledger: Ledger, **callers: int) -> list[threading.Thread]:
    """Start some of each of ``CALLERS`` (with ``_`` for spaces); returns their threads."""
    threads = [
        threading.Thread(target=CALLERS[name.replace("_", " ")], args=(pipeline, ledger))
        for name, count in callers.items()
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


class Killer:
    """Kills a random ready node of any plan at regular intervals; a context manager.

    Args:
        pipeline: the pipeline.
        every_s: seconds between two kills.
        seed: of the random choices.
        ledger: the requests.
        answers: least number of answers between two kills, so that nodes that start slowly are not all lost.

    Attributes:
        kills: the number of killed nodes, by the number of their plan (its generation).
    """

    def __init__(self, pipeline: Pipeline, every_s: float, seed: int, ledger: Ledger, answers: int = 0) -> None:
        self.kills: Counter[int] = Counter()
        self._pipeline, self._every_s, self._source = pipeline, every_s, random.Random(seed)
        self._ledger, self._answers = ledger, answers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill no more nodes."""
        self._ended.set()
        self._thread.join()

    def _kill(self) -> None:
        due = self._answers
        while not self._ended.wait(self._every_s):
            if len(self._ledger.answered) < due:
                continue
            ready = [
                (running.number, node.pid)
                for running in self._pipeline.entrance.plans
                for node in running.coordinator.nodes()
                if node.state == "ready" and node.pid
            ]
            if ready:
                generation, victim = self._source.choice(ready)
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(victim, signal.SIGKILL)
                    self.kills[generation] += 1
                    due = len(self._ledger.answered) + self._answers
