"""The slowest requests of the last minute.

Requests are compared with the slowest of the present second only, so that one comparison is all that most requests
cost. The sampler takes the slowest of each second: the slowest of a minute are among them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from runtime.gateway.telemetry.minute import MINUTE_NS
from runtime.wire.messages.data import Visit

KEPT = 5
_BLOCK = 128  # executions


class SlowRequest(Struct, frozen=True):
    """A request with its times, by the host's monotonic clock in nanoseconds.

    Attributes:
        arrived_ns: When it arrived.
        decoded_ns: When it was decoded; the queue began then.
        refused_ns: When the pipeline first had no room for it; 0 if it always had.
        entered_ns: When it entered the pipeline.
        left_ns: When its outputs were there.
        ended_ns: When its response was ready.
        visits: The stages that executed it.
        others: The visits of executions about its time, each as a group.
        reason: Why it failed, as in :data:`~runtime.gateway.counters.FAILURE_REASONS`; empty when it was answered. The
            times of a failed request between its arrival and its end are not known.
        message: What its caller was told when it failed.
    """

    arrived_ns: int
    decoded_ns: int
    refused_ns: int
    entered_ns: int
    left_ns: int
    ended_ns: int
    visits: tuple[Visit, ...] = ()
    others: tuple[Sequence[tuple[Visit, ...]], ...] = ()
    reason: str = ""
    message: str = ""

    @property
    def total_ns(self) -> int:
        """Time from its arrival to its end."""
        return self.ended_ns - self.arrived_ns


class Slowest:
    """The slowest requests since they were taken last.

    It also keeps the visits of the latest executions, because a slow request has mostly waited for them. They are in
    two blocks, so that a request can hold on to those of its time.

    Attributes:
        least_ns: Only requests that took longer are among them.
    """

    def __init__(self) -> None:
        self.least_ns = -1
        self._before: list[tuple[Visit, ...]] = []
        self._block: list[tuple[Visit, ...]] = []
        self._added = 0
        self._heap: list[tuple[int, int, SlowRequest]] = []

    def add(self, request: SlowRequest) -> None:
        """Add a request that took longer than :attr:`least_ns`."""
        self._added += 1
        entry = (request.total_ns, self._added, request)
        if len(self._heap) < KEPT:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)
        if len(self._heap) == KEPT:
            self.least_ns = self._heap[0][0]

    def ran(self, visits: tuple[Visit, ...]) -> None:
        """Add the visits of an execution."""
        self._block.append(visits)
        if len(self._block) == _BLOCK:
            self._before, self._block = self._block, []

    @property
    def others(self) -> tuple[Sequence[tuple[Visit, ...]], ...]:
        """The visits of the latest executions: at least the last 128, and at most 256."""
        return self._before, self._block

    def take(self) -> list[SlowRequest]:
        """Take the requests out, and begin anew."""
        requests = [request for _, _, request in self._heap]
        self._heap, self.least_ns = [], -1
        return requests


class Timed(Protocol):
    """A request that has ended. Times are in nanoseconds, by the host's monotonic clock."""

    @property
    def ended_ns(self) -> int:
        """When it ended."""

    @property
    def total_ns(self) -> int:
        """How long it took."""


Kept = TypeVar("Kept", bound=Timed)


def slowest_of_minute(kept: Iterable[Kept], now_ns: int) -> list[Kept]:
    """The requests among which the slowest of the last minute are now, and will be later.

    Args:
        kept: Requests; the slowest of each second are among them.
        now_ns: The time.

    Returns:
        Those that ended in the last minute, without those that five later ones exceed.
    """
    exceeding: list[int] = []  # times of the slowest of the later requests
    chosen = []
    for request in sorted(kept, key=lambda one: -one.ended_ns):
        if request.ended_ns <= now_ns - MINUTE_NS:
            break
        if len(exceeding) < KEPT or request.total_ns > exceeding[0]:
            chosen.append(request)
            heapq.heappush(exceeding, request.total_ns)
            if len(exceeding) > KEPT:
                heapq.heappop(exceeding)
    return chosen
