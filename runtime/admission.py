"""How many requests, and how many bytes of theirs, may be in a pipeline at once."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Somebody who waits for a place."""

    place: object
    size: int
    turn: SimpleQueue[None] = field(default_factory=SimpleQueue)


class Admission:
    """The entrance: who does not fit waits its turn, first come, first served.

    A place is an object of the caller's, so giving it back twice is as good as once, and one that was taken in the
    moment of an interrupt can still be given back.

    Args:
        requests: in flight at most.
        size_bytes: of their tensors at most; one request alone may have more.
    """

    def __init__(self, requests: int, size_bytes: int) -> None:
        self.requests = requests
        self.size_bytes = size_bytes
        self._lock = threading.Lock()
        self._places: dict[object, int] = {}  # that are taken, with the bytes of each
        self._waiting: deque[_Waiting] = deque()

    def enter(self, place: object, size: int, *, block: bool = True, timeout: float | None = None) -> bool:
        """Let in a request of ``size`` bytes; False when there was no room, in time or at all without ``block``.

        Whatever this raises, call :meth:`leave` then.
        """
        with self._lock:
            if not self._waiting and self._fits(size):
                self._places[place] = size
                return True
            if not block:
                return False
            waiting = _Waiting(place, size)
            self._waiting.append(waiting)
        try:
            waiting.turn.get(timeout=timeout)
        except Empty:
            with self._lock:
                if place in self._places:
                    return True
            self.leave(place)
            return False
        return True

    def leave(self, place: object) -> None:
        """Give a place back, or wait for it no longer."""
        with self._lock:
            if self._places.pop(place, None) is None:
                self._waiting = deque(other for other in self._waiting if other.place is not place)
            while self._waiting and self._fits(self._waiting[0].size):
                first = self._waiting.popleft()
                self._places[first.place] = first.size
                first.turn.put(None)

    @property
    def inside(self) -> int:
        """Requests that were let in and are not out."""
        return len(self._places)

    def _fits(self, size: int) -> bool:
        if not self._places:
            return True
        return len(self._places) < self.requests and sum(self._places.values()) + size <= self.size_bytes
