"""What other threads leave for the coordinator's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from runtime.coordinator.events import ControlEffect, CoordinatorEvent
from runtime.wire.wakeup import Wakeup


class Inbox:
    """Events and effects that the coordinator's thread is to handle, and what wakes it. Any thread may call it.

    Attributes:
        events: what has happened, to be handed to the state machine.
        effects: what the state machine decided about nodes while another thread held the lock, to be performed.
        wakeup: to be watched by the sockets that the coordinator's thread waits at.
        sleeps_until_s: when the thread wakes up at the latest, by ``time.monotonic``.
        failure: why no more results can be taken; None while they can.
    """

    def __init__(self) -> None:
        self.events: deque[CoordinatorEvent] = deque()
        self.effects: deque[ControlEffect] = deque()
        self.wakeup = Wakeup()
        self.sleeps_until_s = 0.0
        self.failure: BaseException | None = None

    def post(self, event: CoordinatorEvent) -> None:
        """Have an event handled."""
        self.events.append(event)
        self.wakeup.ring()

    def leave(self, effects: Iterable[ControlEffect]) -> None:
        """Have effects on nodes performed."""
        self.effects.extend(effects)
        self.wakeup.ring()

    def expect(self, deadline_ns: int) -> None:
        """Have the thread wake up at a deadline, by ``time.monotonic_ns``."""
        if deadline_ns / 1e9 < self.sleeps_until_s:
            self.wakeup.ring()

    def fail(self, error: BaseException) -> None:
        """Have the pipeline end, since results cannot be taken any more."""
        self.failure = error
        self.wakeup.ring()
