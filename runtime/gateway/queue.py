"""The requests that wait before a pipeline: which enter next, which are joined, and which are refused. Pure.

    requests   a1 b1 a2 a3 . . .        requests a can be joined with each other, and so can requests b
    batches    [a1 a2 a3]  [b1]         at most ``max_batch`` rows each, in the order of their first requests

With several priority levels, more important requests enter first, and within a level those that came first. When the
queue is full, a more important request takes the place of the least important one.

A batch that is not full waits for more requests until its first has waited ``max_delay_ns``. A request is refused on
arrival if the queue is full or if, at the current throughput, it cannot be answered by its deadline. A request that can
no longer meet its deadline is dropped before it enters. All times are given by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from runtime.errors import Busy

_DEVIATIONS = 2.5  # an answer is expected within the mean latency plus this many mean deviations
_NEWEST_WEIGHT = 0.1  # weight of the newest value in the moving averages


@dataclass(frozen=True)
class Limits:
    """Limits of a queue and of its batches.

    Attributes:
        requests: Most requests that may wait.
        size_bytes: Most bytes of inputs that may wait. An empty queue accepts a request of any size.
        max_batch: Most rows of a batch; 1 joins nothing.
        max_delay_ns: Longest time for which a batch waits for more requests.
        levels: Number of priority levels. A request of priority 0, or beyond the last level, has the middle one.
    """

    requests: int = 256
    size_bytes: int = 1 << 30
    max_batch: int = 1
    max_delay_ns: int = 0
    levels: int = 1

    def level(self, priority: int) -> int:
        """The level of a request: 1 enters first."""
        return priority if 1 <= priority <= self.levels else self.levels // 2 + 1


class QueuedRequest(Struct, eq=False):
    """A request in the queue.

    Attributes:
        key: Requests with equal keys can be joined; None joins with nothing.
        rows: Rows along the batch axis.
        size_bytes: Bytes of its inputs.
        arrived_ns: Time of its arrival.
        deadline_ns: Time after which its answer is useless; None for no limit.
        item: The caller's own object for this request.
        level: Its priority level; 1 enters first.
        number: Position among all requests that ever joined the queue; set by the queue.
    """

    key: Hashable | None
    rows: int
    size_bytes: int
    arrived_ns: int
    deadline_ns: int | None
    item: Any
    level: int = 1
    number: int = 0

    @property
    def turn(self) -> tuple[int, int]:
        """Requests enter in the order of their turns."""
        return self.level, self.number


class RequestQueue:
    """The queue before one pipeline: first in, first out within each priority level.

    Attributes:
        limits: What may wait.
        size_bytes: Bytes of the inputs of all waiting requests.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.size_bytes = 0
        self._waiting: deque[QueuedRequest] = deque()
        self._joined = 0
        self._rows = 0
        # Moving averages of executions, and when the last one ended while others waited.
        self._gap_ns = 0.0  # time from one row's end to the next row's
        self._latency_ns = 0.0
        self._deviation_ns = 0.0  # mean deviation of the latency
        self._last_end_ns: int | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._waiting)

    def expected_ns(self, rows: int = 0) -> int:
        """Time until the answer to a request of ``rows`` that arrives now, at the current throughput."""
        return int((self._rows + rows) * self._gap_ns + self._expected_latency_ns)

    @property
    def _expected_latency_ns(self) -> float:
        """Time in the pipeline that few executions exceed."""
        return self._latency_ns + _DEVIATIONS * self._deviation_ns

    def join(self, request: QueuedRequest, *, idle: bool = False) -> list[QueuedRequest]:
        """Put a request behind all that are as important.

        Args:
            request: The request.
            idle: True when nothing is in the pipeline. Then the request is admitted, whatever the throughput was.

        Returns:
            The less important requests that have left the full queue for it.

        Raises:
            Busy: The request is refused. The message says why.
        """
        if request.deadline_ns is not None and not idle:
            left = request.deadline_ns - request.arrived_ns
            expected = self.expected_ns(request.rows - self._rows_behind(request.level))
            if expected > left:
                raise Busy(
                    f"the answer is expected in {expected / 1e9:.3f} s, and the request has {max(0, left) / 1e9:.3f} s "
                    "left; try again later"
                )
        left_out: list[QueuedRequest] = []
        reason = self._full(request)
        while self._full(request) is not None:
            last = self._waiting[-1]
            if last.level <= request.level:
                for one in reversed(left_out):
                    self._enter(one)
                raise Busy(reason)
            self.leave(last)
            left_out.append(last)
        self._joined += 1
        request.number = self._joined
        self._enter(request)
        return left_out

    def _enter(self, request: QueuedRequest) -> None:
        """Put a request behind all whose turn is earlier."""
        behind = len(self._waiting)
        while behind and self._waiting[behind - 1].turn > request.turn:
            behind -= 1
        self._waiting.insert(behind, request)
        self._rows += request.rows
        self.size_bytes += request.size_bytes

    def _full(self, request: QueuedRequest) -> str | None:
        """Why there is no room for a request; None when there is."""
        if self._waiting and len(self._waiting) >= self.limits.requests:
            return f"{len(self._waiting)} requests wait, which is the limit; try again later"
        if self._waiting and self.size_bytes + request.size_bytes > self.limits.size_bytes:
            return (
                f"{self.size_bytes} bytes of requests wait, and {request.size_bytes} more would exceed the limit of "
                f"{self.limits.size_bytes}; try again later"
            )
        return None

    def _rows_behind(self, level: int) -> int:
        """Rows of the waiting requests that enter after a new one of this level."""
        rows = 0
        for request in reversed(self._waiting):
            if request.level <= level:
                break
            rows += request.rows
        return rows

    def next(self, now_ns: int) -> list[QueuedRequest]:
        """Take out the requests of the next batch; none when it is better to wait for more.

        A batch that waits for more does not hold up those behind it.
        """
        tried: set[Hashable] = set()
        for first in self._waiting:
            if first.key in tried:
                continue
            batch, is_full = self._batch(first)
            if is_full or now_ns >= first.arrived_ns + self.limits.max_delay_ns:
                for request in batch:
                    self.leave(request)
                return batch
            tried.add(first.key)
        return []

    def _batch(self, first: QueuedRequest) -> tuple[list[QueuedRequest], bool]:
        """The requests that can be joined with one, which is the first of its key, and whether no more would fit."""
        batch, rows = [first], first.rows
        if first.key is None:
            return batch, True
        for other in list(self._waiting) if self.limits.max_batch > first.rows else ():
            if other is not first and other.key == first.key and rows + other.rows <= self.limits.max_batch:
                batch.append(other)
                rows += other.rows
        return batch, rows >= self.limits.max_batch

    def late(self, now_ns: int, *, idle: bool = False) -> list[QueuedRequest]:
        """Take out the requests at the head that can no longer meet their deadlines.

        Args:
            now_ns: The time.
            idle: True when nothing is in the pipeline. Then a request may try until its deadline, because only a try
                can show that the pipeline has become faster.
        """
        late = []
        latency_ns = 0 if idle else self._expected_latency_ns
        while self._waiting:
            deadline = self._waiting[0].deadline_ns
            if deadline is None or now_ns + latency_ns <= deadline:
                break
            late.append(self._waiting[0])
            self.leave(self._waiting[0])
        return late

    def leave(self, request: QueuedRequest) -> bool:
        """Take a request out; False when it is not in the queue."""
        try:
            self._waiting.remove(request)
        except ValueError:
            return False
        self._rows -= request.rows
        self.size_bytes -= request.size_bytes
        return True

    def put_back(self, requests: list[QueuedRequest]) -> None:
        """Put requests back at the positions they had."""
        self._waiting = deque(sorted((*requests, *self._waiting), key=lambda one: one.turn))
        self._rows += sum(request.rows for request in requests)
        self.size_bytes += sum(request.size_bytes for request in requests)

    def due_ns(self) -> int | None:
        """Time at which the next batch enters although it is not full; None when no batch waits for more."""
        if not self._waiting or self._waiting[0].key is None:
            return None
        if not self.limits.max_delay_ns:
            return self._waiting[0].arrived_ns
        return min(one.arrived_ns for one in self._waiting if one.key is not None) + self.limits.max_delay_ns

    def completed(self, rows: int, entered_ns: int, now_ns: int) -> None:
        """Record that an execution of ``rows`` has ended."""
        took_ns = now_ns - entered_ns
        off_ns = took_ns - self._latency_ns if self._latency_ns else 0.0
        self._latency_ns = self._latency_ns + _NEWEST_WEIGHT * off_ns if self._latency_ns else took_ns
        self._deviation_ns += _NEWEST_WEIGHT * (abs(off_ns) - self._deviation_ns)
        if self._last_end_ns is not None and rows:
            gap = (now_ns - self._last_end_ns) / rows
            self._gap_ns += _NEWEST_WEIGHT * (gap - self._gap_ns) if self._gap_ns else gap
        self._last_end_ns = now_ns if self._waiting else None
