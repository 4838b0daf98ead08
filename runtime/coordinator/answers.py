"""The answers to requests on their way to the callers' functions."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from onnxsplit.tensors import Array
from runtime.errors import PipelineError
from runtime.wire.messages.data import Visit

_log = logging.getLogger("runtime.coordinator")


@dataclass(frozen=True)
class Answer:
    """How a request ended: with its outputs, which are the caller's own, and where it was when; or with an error."""

    outputs: dict[str, Array]
    error: PipelineError | None = None
    visits: tuple[Visit, ...] = ()


Done = Callable[[Answer], None]
"""A caller's function that is told how its request ended."""


class _ThisThread(threading.local):
    """What the present thread is at."""

    is_delivering = False


class AnswerQueue:
    """Answers that callers have not been told yet. They are added under a lock and delivered without it."""

    def __init__(self) -> None:
        self._answers: deque[tuple[Done, Answer]] = deque()
        self._here = _ThisThread()

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, done: Done, answer: Answer) -> None:
        """Have a caller told an answer."""
        self._answers.append((done, answer))

    def deliver(self) -> None:
        """Tell callers their answers.

        A caller's function may submit, which calls this again: then the outer call goes on with what that added.
        """
        here = self._here
        if here.is_delivering:
            return
        here.is_delivering = True
        try:
            while True:
                try:
                    done, answer = self._answers.popleft()
                except IndexError:  # another thread may have delivered them
                    return
                try:
                    done(answer)
                except BaseException:  # a caller's function, whatever it raises: others wait for this thread
                    _log.exception("a callback of a request raised")
        finally:
            here.is_delivering = False

    @property
    def delivering(self) -> bool:
        """True in a caller's function: the present thread brings answers, so it must not wait for any."""
        return self._here.is_delivering
