"""Who waits before a pipeline, who goes in next and with whom, and who is refused. Pure: times are told.

    requests   a1 b1 a2 a3 . . .        a, b: shapes that can and cannot be joined; each has some rows
    goes in    [a1 a2 a3]  [b1]         up to ``max_batch`` rows, when there is room; a batch that is not full waits
                                        for more until its first has waited ``max_delay_ns``

A request is refused when it comes, if the line is full, or if by the pace of late it could not be answered by its
deadline; it is dropped from the line at its deadline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from runtime.errors import Busy

_SPREADS = 2.5  # of the usual spread that are reckoned with
_FORGET = 0.1  # the weight of the newest in what is remembered of the pace


@dataclass(frozen=True)
class Limits:
    """What may wait.

    Attributes:
        requests: so many at most.
        size_bytes: of their inputs at most; a request finds an empty line open, whatever its size.
        max_batch: rows to join at most; 1 joins nothing.
        max_delay_ns: to wait for more to join.
    """

    requests: int = 256
    size_bytes: int = 1 << 30
    max_batch: int = 1
    max_delay_ns: int = 0


class QueuedRequest(Struct, eq=False):
    """A request in the line.

    Attributes:
        key: requests with equal keys can be joined; None joins nothing.
        rows: along the batch axis.
        size_bytes: of its inputs.
        arrived_ns: when.
        deadline_ns: its answer is worth nothing after; None for ever.
        subject: whatever it is.
        turn: its place among all that ever stood in the line; the line's to give.
    """

    key: Hashable | None
    rows: int
    size_bytes: int
    arrived_ns: int
    deadline_ns: int | None
    subject: Any
    turn: int = 0


class RequestQueue:
    """The requests that wait before one pipeline, first come, first served."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.size_bytes = 0
        self._waiting: deque[QueuedRequest] = deque()
        self._turns = 0
        self._rows = 0
        self._gap_ns = 0.0  # between two rows that come out, while others wait
        self._inside_ns = 0.0  # from going in to coming out
        self._spread_ns = 0.0  # how far that is off, usually
        self._out_ns: int | None = None  # the last came out, and others have waited since

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._waiting)

    def expected_ns(self, rows: int = 0) -> int:
        """How long the answer to a request of ``rows`` that came now may take, by the pace of late."""
        return int((self._rows + rows) * self._gap_ns + self._passage_ns)

    @property
    def _passage_ns(self) -> float:
        """From going in to coming out; few take longer."""
        return self._inside_ns + _SPREADS * self._spread_ns

    def join(self, request: QueuedRequest, *, alone: bool = False) -> None:
        """Stand at the end. ``alone``: nothing is inside, so it may try whatever the pace was.

        Raises:
            Busy: it is refused; says why.
        """
        if self._waiting and len(self._waiting) >= self.limits.requests:
            raise Busy(f"{len(self._waiting)} requests wait, which is all that may; try again later")
        if self._waiting and self.size_bytes + request.size_bytes > self.limits.size_bytes:
            raise Busy(
                f"{self.size_bytes} bytes of requests wait, and with {request.size_bytes} more there would be more "
                f"than the {self.limits.size_bytes} that may; try again later"
            )
        if request.deadline_ns is not None and not alone:
            left = request.deadline_ns - request.arrived_ns
            expected = self.expected_ns(request.rows)
            if expected > left:
                raise Busy(
                    f"the answer is expected in {expected / 1e9:.3f} s, and the request has {max(0, left) / 1e9:.3f} s "
                    "left; try again later"
                )
        self._turns += 1
        request.turn = self._turns
        self._waiting.append(request)
        self._rows += request.rows
        self.size_bytes += request.size_bytes

    def next(self, now_ns: int) -> list[QueuedRequest]:
        """The requests that go in together, if there is room for one; none when it is better to wait for more."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        together, rows = [first], first.rows
        if first.key is not None:
            for other in list(self._waiting)[1:] if self.limits.max_batch > first.rows else ():
                if other.key == first.key and rows + other.rows <= self.limits.max_batch:
                    together.append(other)
                    rows += other.rows
            if rows < self.limits.max_batch and now_ns < first.arrived_ns + self.limits.max_delay_ns:
                return []
        for request in together:
            self.leave(request)
        return together

    def late(self, now_ns: int, *, alone: bool = False) -> list[QueuedRequest]:
        """Those at the head that could not be answered in time any more; they are out of the line.

        ``alone``: nothing else is inside. Then the head may try unless its time is over, whatever the pace was: how
        else should it be known that it is better now?
        """
        found = []
        passage_ns = 0 if alone else self._passage_ns
        while self._waiting:
            deadline = self._waiting[0].deadline_ns
            if deadline is None or now_ns + passage_ns <= deadline:
                break
            found.append(self._waiting[0])
            self.leave(self._waiting[0])
        return found

    def leave(self, request: QueuedRequest) -> bool:
        """Out of the line; False when it was not there."""
        try:
            self._waiting.remove(request)
        except ValueError:
            return False
        self._rows -= request.rows
        self.size_bytes -= request.size_bytes
        return True

    def back(self, requests: list[QueuedRequest]) -> None:
        """To the places they had: there was no room for them after all."""
        self._waiting = deque(sorted((*requests, *self._waiting), key=lambda one: one.turn))
        self._rows += sum(request.rows for request in requests)
        self.size_bytes += sum(request.size_bytes for request in requests)

    def due_ns(self) -> int | None:
        """When a batch that waits for more has waited long enough; None when none does."""
        if not self._waiting or self._waiting[0].key is None:
            return None
        return self._waiting[0].arrived_ns + self.limits.max_delay_ns

    def came_out(self, rows: int, entered_ns: int, now_ns: int) -> None:
        """An answer to ``rows`` that went in together is there."""
        took_ns = now_ns - entered_ns
        off_ns = took_ns - self._inside_ns if self._inside_ns else 0.0
        self._inside_ns = self._inside_ns + _FORGET * off_ns if self._inside_ns else took_ns
        self._spread_ns += _FORGET * (abs(off_ns) - self._spread_ns)
        if self._out_ns is not None and rows:
            gap = (now_ns - self._out_ns) / rows
            self._gap_ns += _FORGET * (gap - self._gap_ns) if self._gap_ns else gap
        self._out_ns = now_ns if self._waiting else None
