"""Passes events, effects and calls from other threads to the coordinator's thread."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable

from runtime.coordinator.events import ControlEffect, CoordinatorEvent
from runtime.errors import PipelineError
from runtime.wire.wakeup import Wakeup

_log = logging.getLogger("runtime.coordinator")


class Inbox:
    """Events and effects for the coordinator's thread, and the wake-up of this thread. Thread-safe.

    Attributes:
        events: events for the state machine.
        effects: effects on nodes that arose in other threads and are to be performed.
        wakeup: to be watched by the sockets that the coordinator's thread waits at.
        sleeps_until_s: when the thread wakes up at the latest, by ``time.monotonic``.
        failure: why results can no longer be received; None while they can.
        pid: the process that the thread belongs to.
    """

    def __init__(self) -> None:
        self.events: deque[CoordinatorEvent] = deque()
        self.effects: deque[ControlEffect] = deque()
        self.wakeup = Wakeup()
        self.sleeps_until_s = 0.0
        self.failure: BaseException | None = None
        self.pid = os.getpid()
        self._calls: deque[Callable[[], object]] = deque()

    def check_process(self) -> None:
        """Check that this is not a fork of the process that the thread belongs to.

        Raises:
            PipelineError: it is.
        """
        if os.getpid() != self.pid:
            raise PipelineError(
                f"this pipeline belongs to process {self.pid}, and this process is a fork of it; launch another here"
            )

    def call(self, function: Callable[[], object]) -> None:
        """Let the thread call a function, without its lock. This takes no lock, so any code may do it at any time.

        The garbage collector runs code at any place, also where its thread holds a lock.
        """
        if os.getpid() == self.pid:
            self._calls.append(function)
            self.wakeup.ring()

    def make_calls(self) -> None:
        """Call the functions; called in the thread."""
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception:
                _log.exception("a call failed")

    def post(self, event: CoordinatorEvent) -> None:
        """Queue an event."""
        self.events.append(event)
        self.wakeup.ring()

    def leave(self, effects: Iterable[ControlEffect]) -> None:
        """Queue effects on nodes."""
        self.effects.extend(effects)
        self.wakeup.ring()

    def expect(self, deadline_ns: int) -> None:
        """Let the thread wake up at a deadline, by ``time.monotonic_ns``."""
        if deadline_ns / 1e9 < self.sleeps_until_s:
            self.wakeup.ring()

    def fail(self, error: BaseException) -> None:
        """End the pipeline, because results can no longer be received."""
        self.failure = error
        self.wakeup.ring()
