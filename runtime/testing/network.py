"""The links between simulated processes, and simulated time."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

SECOND = 1_000_000_000

SimulatedLink = tuple[int, int, str]
"""The numbers of a sender and a receiver, and ``control``, ``data`` or ``lane``. Messages of a link arrive in order."""


class SimulatedNetwork(ABC):
    """Links, and a clock that advances from event to event.

    Args:
        delay_ns: the time that every message takes; None when messages wait until they are delivered by hand.

    Attributes:
        delay_ns: as given; it may be changed.
        now_ns: the simulated time.
        links: undelivered messages, by link. In simulated time, only those that wait because their link is parted.
        parted: the pairs of processes, sender first, between which nothing arrives now.
    """

    def __init__(self, delay_ns: int | None) -> None:
        self.delay_ns = delay_ns
        self.now_ns = 0
        self.links: dict[SimulatedLink, deque[Any]] = {}
        self.parted: set[tuple[int, int]] = set()
        self._timers: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._timer_count = 0

    @abstractmethod
    def listens(self, number: int) -> bool:
        """Whether a process accepts messages now."""

    @abstractmethod
    def receive(self, link: SimulatedLink, message: Any) -> None:
        """Handle a message that has arrived."""

    # Messages

    def send(self, link: SimulatedLink, message: Any) -> None:
        """Send a message."""
        if self.delay_ns is None:
            self.links.setdefault(link, deque()).append(message)
        else:
            self.later(self.delay_ns, self._arrive, link, message)

    def _arrive(self, link: SimulatedLink, message: Any) -> None:
        if link[:2] in self.parted:
            self.links.setdefault(link, deque()).append(message)
        else:
            self.receive(link, message)

    def waiting(self) -> list[SimulatedLink]:
        """The links with a message that can be delivered: they are not parted, and the receiver listens."""
        return [
            link
            for link, queue in self.links.items()
            if queue and link[:2] not in self.parted and self.listens(link[1])
        ]

    def deliver(self, link: SimulatedLink) -> None:
        """Deliver the first message of a link."""
        self.receive(link, self.links[link].popleft())

    def cut_off(self, number: int, loses_last: Callable[[], bool]) -> None:
        """Drop all messages to a dead process, and perhaps the last one of each link from it."""
        for (sender, to, _), queue in self.links.items():
            if to == number:
                queue.clear()
            elif sender == number and queue and loses_last():
                queue.pop()

    def part(self, sender: int, to: int) -> None:
        """Let messages from one process to another wait until the link is mended."""
        self.parted.add((sender, to))

    def mend(self, sender: int, to: int) -> None:
        """Let messages from one process to another arrive again."""
        self.parted.discard((sender, to))
        if self.delay_ns is not None:
            for link in [(sender, to, "control"), (sender, to, "data")]:
                for _ in range(len(self.links.get(link, ()))):
                    self.deliver(link)

    # Time

    def later(self, delay_ns: int, what: Callable[..., None], *arguments: Any) -> None:
        """Call a function after a delay."""
        self._timer_count += 1
        heapq.heappush(self._timers, (self.now_ns + delay_ns, self._timer_count, what, arguments))

    def step(self) -> bool:
        """Advance to the next event and execute it; False when there is none."""
        if not self._timers:
            return False
        self.now_ns, _, what, arguments = heapq.heappop(self._timers)
        what(*arguments)
        return True
