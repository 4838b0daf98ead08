"""The queue of answers for the callers' functions."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array
from runtime.wire.messages.data import Visit

_log = logging.getLogger("runtime.coordinator")


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: its outputs, which belong to the caller, and the stages that it passed; or an error."""

    outputs: dict[str, Array]
    error: OnnxsplitError | None = None
    visits: tuple[Visit, ...] = ()


Done = Callable[[Answer], None]
"""A caller's function that receives the answer to its request."""


class _ThisThread(threading.local):
    """The state of the present thread."""

    is_delivering = False


class AnswerQueue:
    """Answers and wake-ups that are not delivered yet. They are added under a lock and delivered without it.

    Several threads may deliver at once, in any order.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._here = _ThisThread()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, done: Done, answer: Answer) -> None:
        """Queue an answer for delivery."""
        self._calls.append(partial(done, answer))

    def wake(self, call: Callable[[], None]) -> None:
        """Queue a call that tells the readers of a stream to look at it."""
        self._calls.append(call)

    def deliver(self) -> None:
        """Deliver all answers to their callers.

        A caller's function may submit a request, which calls this again; the outer call then delivers what was added.
        """
        here = self._here
        if here.is_delivering:
            return
        here.is_delivering = True
        try:
            while True:
                try:
                    call = self._calls.popleft()
                except IndexError:  # another thread may have delivered them
                    return
                try:
                    call()
                except BaseException:  # a caller's function may raise anything, and other callers wait for this thread
                    _log.exception("a callback of a request raised")
        finally:
            here.is_delivering = False

    @property
    def delivering(self) -> bool:
        """True in a caller's function: the present thread delivers answers, so it must not wait for one."""
        return self._here.is_delivering
