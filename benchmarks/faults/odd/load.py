"""The load of a chaos run: callers that send odd requests and check every answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.faults.odd.asked import Ask, Errors, ordinary
from benchmarks.faults.odd.harm import kill
from benchmarks.faults.odd.ledger import OURS, Ledger
from benchmarks.faults.odd.requests import KINDS
from onnxsplit.errors import InputError, OnnxsplitError
from runtime import Pipeline
from runtime.errors import Busy, NodeFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.faults.odd.nets import Net

TOLERANCE = 1e-4
"""Relative to an output's largest value: other batch sizes use other kernels."""
_DEPTH = 4  # unanswered requests of a caller


@dataclass
class Track:
    """One request in flight.

    Attributes:
        ask: the request; None once its outcome was checked.
        calls: number of calls of its callback.
    """

    ask: Ask | None
    future: Any = None
    raised: BaseException | None = None
    calls: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def done(self, _: Any) -> None:
        """Count a call of the callback."""
        self.calls += 1
        self.ended.set()


class Caller:
    """Sends requests and checks their outcomes.

    Args:
        pipeline: the pipeline under test.
        net: the model that the pipeline runs.
        ledger: takes the outcomes.
        source: random generator of this caller.
        patience_s: a request that takes longer hangs.
        may: errors that every request may end with because of faults of nodes.
        harms: whether it kills nodes if a kind of request asks for that.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        net: Net,
        ledger: Ledger,
        source: np.random.Generator,
        *,
        patience_s: float = 60.0,
        may: Errors = (),
        harms: bool = False,
    ) -> None:
        self.doing: dict[int, tuple[str, float]] = {}  # thread in ``submit`` -> kind of request, start time
        self._pipeline, self._net, self._ledger, self._source = pipeline, net, ledger, source
        self._patience_s, self._may, self._harms = patience_s, may, harms
        self._broken = ledger.broken
        self._tracks: list[Track] = []
        self._more: deque[Track] = deque()  # requests that callbacks sent

    def run(self, asks: Iterator[Ask | None]) -> None:
        """Send all requests, a few at once."""
        waiting: deque[Track] = deque()
        for ask in asks:
            if self._broken.is_set():
                return
            if ask is not None:
                waiting.append(self.send(ask))
            while len(waiting) > _DEPTH:
                self._settle(waiting.popleft())
        while (waiting or self._more) and not self._broken.is_set():
            self._settle(waiting.popleft() if waiting else self._more.popleft())
        for track in self._tracks:
            if track.calls > 1:
                self._ledger.fault("a future ended twice")

    def send(self, ask: Ask) -> Track:
        """Submit one request; cancel it or change its inputs if its kind says so."""
        if ask.kill and self._harms:
            ask = replace(ask, may=(*ask.may, NodeFailed))  # if the pipeline does not repeat requests
        ask = replace(ask, may=(*ask.may, *self._may))
        track = Track(ask)
        self._tracks.append(track)
        if ask.kill and self._harms:
            kill(self._pipeline, stage=0)
        self.doing[threading.get_ident()] = ask.kind, time.monotonic()
        try:
            track.future = self._pipeline.submit(ask.inputs, outputs=ask.outputs, timeout=ask.timeout, block=ask.block)
        except BaseException as error:  # every error is checked later
            track.raised = error
        self.doing.pop(threading.get_ident())
        if ask.change:
            for array in ask.inputs.values():
                array[...] = "changed" if array.dtype == object else 1
        if track.future is not None:
            self._follow(track, ask)
        return track

    def _follow(self, track: Track, ask: Ask) -> None:
        future = track.future
        with suppress(SystemExit):  # raised by a callback if the future is done already
            future.add_done_callback(track.done)
            if ask.then:
                future.add_done_callback(lambda _: self._then(ask.then))
        if ask.cancel == "at once":
            future.cancel()
        elif ask.cancel == "in a moment":
            timer = threading.Timer(float(self._source.random() * 0.002), future.cancel)
            timer.daemon = True
            timer.start()

    def _then(self, what: str) -> None:
        if what == "raise":
            raise RuntimeError(OURS)
        if what == "exit":
            raise SystemExit(OURS)
        again = replace(ordinary(self._net, np.random.default_rng(0)), kind="submitted by a callback")
        again = replace(again, block=what == "submit", may=(*again.may, Busy))
        self._more.append(self.send(again))

    def _settle(self, track: Track) -> None:
        """Wait for the end of a request, and check its outcome."""
        ask, ledger = track.ask, self._ledger
        assert ask is not None
        if self._broken.is_set():
            return  # outcomes of a broken pipeline do not count
        if track.future is None:
            self._judge_error(ask, track.raised)
        elif not self._ended(track):
            if self._broken.is_set():
                return
            state = "is done, and its callback was not called" if track.future.done() else "has not ended"
            ledger.fault(f"after {self._patience_s:g} s its future {state}", ask.kind, "hanging")
            self._broken.set()
        elif track.future.cancelled():
            if ask.cancel:
                ledger.note(ask.kind, "cancelled")
            else:
                ledger.fault("cancelled, but no caller cancelled it", ask.kind, "failed")
        elif (error := track.future.exception()) is not None:
            self._judge_error(ask, error)
        else:
            self._judge_answer(ask, track.future.result())
        if ask.cancel == "after the answer" and track.future is not None:
            track.future.cancel()
        track.ask = track.future = track.raised = None

    def _ended(self, track: Track) -> bool:
        """Wait for the end of a request, unless the pipeline breaks."""
        end = time.monotonic() + self._patience_s
        while not track.ended.wait(0.2):
            if self._broken.is_set() or time.monotonic() > end:
                return False
        return not self._broken.is_set()

    def _judge_error(self, ask: Ask, error: BaseException | None) -> None:
        said = f"{type(error).__name__}: {str(error)[:160]}"
        if len(str(error)) > 10_000:
            self._ledger.fault("an error of more than 10,000 characters", ask.kind)
        if isinstance(error, ask.may):
            self._ledger.note(ask.kind, "refused" if isinstance(error, InputError) else "failed as it may")
        elif isinstance(error, OnnxsplitError):
            self._ledger.fault(f"failed with {said}", ask.kind, "failed")
        else:
            self._ledger.fault(f"raw {said}", ask.kind, "raw error")

    def _judge_answer(self, ask: Ask, found: Any) -> None:
        problem = different(found, ask.want)
        if problem:
            self._ledger.fault(problem, ask.kind, "wrong")
        else:
            self._ledger.note(ask.kind, "right")


def different(found: Any, want: dict[str, Any] | None) -> str:
    """Describe the errors of an answer; empty if it is right."""
    if want is None:
        return "was answered instead of refused"
    if not isinstance(found, dict) or found.keys() != want.keys():
        return f"has the outputs {sorted(found)}, not {sorted(want)}"
    for name, right in want.items():
        got = found[name]
        if got.shape != right.shape or got.dtype != right.dtype:
            return f"{name} is {got.dtype}{list(got.shape)}, not {right.dtype}{list(right.shape)}"
        if right.dtype == object:
            same = got.tolist() == right.tolist()
        else:
            same = bool(np.all(np.abs(got - right) <= TOLERANCE * max(1e-9, np.abs(right).max(initial=0))))
        if not same:
            return f"{name} has wrong values"
        if not got.flags.writeable:
            return f"{name} cannot be written to by the caller"
    return ""


def asks(net: Net, source: np.random.Generator, count: int, kinds: Sequence[str], odd: float = 0.6) -> Iterator[Ask]:
    """Yield requests, of which ``odd`` are odd."""
    made = 0
    while made < count:
        ask = ordinary(net, source)
        if kinds and source.random() < odd:
            found = KINDS[str(source.choice(np.array(kinds)))](net, source)
            if found is None:
                continue
            ask = found
        made += 1
        yield ask


class Callers:
    """Threads that send ``requests`` in all; ``may``, ``harms`` and ``patience_s`` are arguments of :class:`Caller`."""

    def __init__(
        self, pipeline: Pipeline, net: Net, ledger: Ledger, *, requests: int, threads: int, kinds: Sequence[str],
        seed: int, patience_s: float, may: Errors = (), harms: bool = False, odd: float = 0.6,
    ) -> None:  # fmt: skip
        self._ledger, self._patience_s = ledger, patience_s
        self._callers: list[Caller] = []
        self._threads: list[threading.Thread] = []
        for number in range(threads):
            source = np.random.default_rng([seed, number])
            share = requests // threads + (number < requests % threads)
            caller = Caller(pipeline, net, ledger, source, patience_s=patience_s, may=may, harms=harms)
            work = asks(net, source, share, kinds, odd)
            self._callers.append(caller)
            self._threads.append(
                threading.Thread(target=caller.run, args=(work,), name=f"caller {number}", daemon=True)
            )
            self._threads[-1].start()

    def join(self) -> None:
        """Wait for all threads; one that is blocked in ``submit`` for too long ends the run."""
        while any(thread.is_alive() for thread in self._threads) and not self._ledger.broken.is_set():
            for thread in self._threads:
                thread.join(0.05)
            if self._held(self._patience_s + 5):
                self._ledger.broken.set()
        if self._ledger.broken.is_set():
            for kind, seconds in self._held(1.0):
                self._ledger.fault(f"submit has not returned after {seconds:.0f} s", kind, "hanging")

    def _held(self, seconds: float) -> list[tuple[str, float]]:
        """Return the kinds of requests that are blocked in ``submit``, and for how long."""
        now = time.monotonic()
        doing = [entry for caller in self._callers for entry in list(caller.doing.values())]
        return [(kind, now - since) for kind, since in doing if now - since > seconds]
