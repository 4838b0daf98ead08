"""The deadlines of requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

_SPARE = 1024


class Deadlines:
    """A heap of deadlines. Those of answered requests are skipped, and removed when they are the majority.

    Args:
        unanswered: the requests that are not answered, by number; a mapping that others change.
    """

    def __init__(self, unanswered: Mapping[int, object]) -> None:
        self._unanswered = unanswered
        self._heap: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_ns: int, request: int) -> None:
        """Add the deadline of a request."""
        if len(self._heap) > 2 * len(self._unanswered) + _SPARE:
            self._heap = [entry for entry in self._heap if entry[1] in self._unanswered]
            heapify(self._heap)
        heappush(self._heap, (deadline_ns, request))

    def next_ns(self) -> int | None:
        """The next deadline of an unanswered request; None when there is none."""
        while self._heap and self._heap[0][1] not in self._unanswered:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_expired(self, now_ns: int) -> list[int]:
        """The unanswered requests whose deadline has passed. Each is returned once."""
        late = []
        while (first := self.next_ns()) is not None and first <= now_ns:
            late.append(heappop(self._heap)[1])
        return late
