"""Passes events and effects from other threads to the coordinator's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from runtime.coordinator.events import ControlEffect, CoordinatorEvent
from runtime.wire.wakeup import Wakeup


class Inbox:
    """Events and effects for the coordinator's thread, and the wake-up of this thread. Thread-safe.

    Attributes:
        events: events for the state machine.
        effects: effects on nodes that arose in other threads and are to be performed.
        wakeup: to be watched by the sockets that the coordinator's thread waits at.
        sleeps_until_s: when the thread wakes up at the latest, by ``time.monotonic``.
        failure: why results can no longer be received; None while they can.
    """

    def __init__(self) -> None:
        self.events: deque[CoordinatorEvent] = deque()
        self.effects: deque[ControlEffect] = deque()
        self.wakeup = Wakeup()
        self.sleeps_until_s = 0.0
        self.failure: BaseException | None = None

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
