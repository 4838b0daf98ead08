"""A closed loop of requests, and a history of the plan that serves them: figures of the time between any two moments.

All moments are seconds of the monotonic clock.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from runtime import Pipeline

AROUND_S = 5.0
"""Seconds before and after a swap that count as around it."""

_LOOK_S = 0.02


@dataclass(frozen=True)
class Figures:
    """What was answered in a time: its number, requests per second, and the latencies in seconds (NaN for none)."""

    answered: int
    per_s: float
    p99_s: float
    longest_s: float


class Answers:
    """The moments and latencies of answers. Any thread may note one."""

    def __init__(self) -> None:
        self._notes: list[tuple[float, float]] = []

    def note(self, begun: float) -> None:
        """Note the answer to a request that was sent at a moment."""
        now = time.monotonic()
        self._notes.append((now, now - begun))

    def between(self, begin: float, end: float) -> Figures:
        """The figures of the answers that came between two moments."""
        notes = sorted(self._notes)
        return figures([seconds for _, seconds in notes[_first(notes, begin) : _first(notes, end)]], end - begin)

    def around(self, moments: list[float], since: float = 0.0) -> tuple[Figures, Figures]:
        """The figures of the answers around some moments, and those of the others since another moment."""
        near: list[float] = []
        far: list[float] = []
        for at, seconds in list(self._notes):
            is_near = any(abs(at - moment) <= AROUND_S for moment in moments)
            if is_near or at >= since:
                (near if is_near else far).append(seconds)
        return figures(near, 2 * AROUND_S * max(1, len(moments))), figures(far, float("nan"))


def _first(notes: list[tuple[float, float]], moment: float) -> int:
    return bisect_left(notes, (moment, 0.0))


def figures(latencies: list[float], seconds: float) -> Figures:
    """The figures of some answers that came in a number of seconds."""
    if not latencies:
        return Figures(0, 0.0, float("nan"), float("nan"))
    return Figures(len(latencies), len(latencies) / seconds, float(np.percentile(latencies, 99)), max(latencies))


class ClosedLoop:
    """Keeps a number of requests in flight; a context manager, which waits for the last answers.

    Args:
        pipeline: the pipeline.
        in_flight: the number of requests.
        inputs: makes the inputs of a request from its number.
        is_right: says whether the outputs of a request are right, by its number.

    Attributes:
        answers: the answers so far.
        sent: the number of requests so far.
        wrong: the number of wrong answers so far.
        errors: the number of requests that failed, by the error.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        in_flight: int,
        inputs: Callable[[int], Mapping[str, Any]],
        is_right: Callable[[int, Mapping[str, Any]], bool],
    ) -> None:
        self.answers = Answers()
        self.sent = self.wrong = 0
        self.errors: Counter[str] = Counter()
        self._pipeline, self._inputs, self._is_right = pipeline, inputs, is_right
        self._free = threading.Semaphore(in_flight)
        self._in_flight = in_flight
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> ClosedLoop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for _ in range(self._in_flight):
            self._free.acquire(timeout=60)

    @property
    def lost(self) -> int:
        """The number of requests that failed."""
        return self.errors.total()

    def _send(self) -> None:
        while not self._ended.is_set():
            self._free.acquire()
            number, begun = self.sent, time.monotonic()
            self.sent += 1
            try:
                future = self._pipeline.submit(self._inputs(number))
            except Exception as error:
                self._failed(error)
                continue
            future.add_done_callback(partial(self._answered, number, begun))

    def _answered(self, number: int, begun: float, future: Future[Any]) -> None:
        if (error := future.exception()) is not None:
            self._failed(error)
            return
        self.answers.note(begun)
        self.wrong += not self._is_right(number, future.result())
        self._free.release()

    def _failed(self, error: BaseException) -> None:
        self.errors[f"{type(error).__name__}: {error}"[:200]] += 1
        self._free.release()


class History:
    """Notes when the phase of a change of the plan is another, and when requests enter another plan.

    A context manager.

    Args:
        pipeline: the pipeline.

    Attributes:
        swaps: the moments at which requests began to enter another plan.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.swaps: list[float] = []
        self._pipeline = pipeline
        self._phases: list[tuple[float, str]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        pipeline.on_recut(lambda: self.swaps.append(time.monotonic()))

    def __enter__(self) -> History:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def spans(self, phase: str) -> list[tuple[float, float]]:
        """When each time of a phase began and ended; the last one may have no end yet."""
        phases = [*self._phases, (time.monotonic(), "")]
        return [(at, phases[place + 1][0]) for place, (at, name) in enumerate(phases) if name == phase]

    def wait_for_change(self, seconds: float) -> bool:
        """Wait until the next change of the plan has ended; False if none has ended within some seconds."""
        pipeline, end = self._pipeline, time.monotonic() + seconds
        before = sum(pipeline.recuts.results.values())
        while sum(pipeline.recuts.results.values()) == before:
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK_S)
        return True

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            phase = self._pipeline.recuts.phase
            if not self._phases or self._phases[-1][1] != phase:
                self._phases.append((time.monotonic(), phase))


def wait_for_usual_times(pipeline: Pipeline, seconds: float = 120.0) -> None:
    """Wait until a pipeline that is watched for drift knows the usual times of its stages.

    Raises:
        TimeoutError: it does not know them after some seconds; says what it is waiting for.
    """
    end = time.monotonic() + seconds
    while not pipeline.recuts.drift:
        if time.monotonic() > end:
            raise TimeoutError(f"no usual times after {seconds:.0f} s: {pipeline.recuts.advice}")
        time.sleep(_LOOK_S)
