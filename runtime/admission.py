"""How many requests, and how many bytes of theirs, may be in a pipeline at once."""

from __future__ import annotations

import threading
from collections import deque
from queue import Empty, SimpleQueue


class Admission:
    """The entrance: who does not fit waits its turn, first come, first served.

    Args:
        requests: in flight at most.
        size_bytes: of their tensors at most; one request alone may have more.
    """

    def __init__(self, requests: int, size_bytes: int) -> None:
        self.requests = requests
        self.size_bytes = size_bytes
        self._lock = threading.Lock()
        self._inside = 0
        self._inside_bytes = 0
        self._waiting: deque[tuple[int, SimpleQueue[None]]] = deque()

    def enter(self, size: int, *, block: bool = True, timeout: float | None = None) -> bool:
        """Let a request of ``size`` bytes in; False when there was no room, in time or at all without ``block``."""
        with self._lock:
            if not self._waiting and self._fits(size):
                self._take(size)
                return True
            if not block:
                return False
            turn: SimpleQueue[None] = SimpleQueue()
            self._waiting.append((size, turn))
        try:
            turn.get(timeout=timeout)
        except Empty:
            return not self._gave_up(size, turn)
        except BaseException:  # an interrupted caller takes no place with it
            if not self._gave_up(size, turn):
                self.leave(size)
            raise
        return True

    def _gave_up(self, size: int, turn: SimpleQueue[None]) -> bool:
        """Wait no longer; False when it was let in meanwhile."""
        with self._lock:
            if (size, turn) not in self._waiting:
                return False
            self._waiting.remove((size, turn))
            self._admit()  # it may have stood in the way of a smaller one
            return True

    def leave(self, size: int) -> None:
        """A request that was let in with ``size`` bytes is out."""
        with self._lock:
            self._inside -= 1
            self._inside_bytes -= size
            self._admit()

    @property
    def inside(self) -> int:
        """Requests that were let in and are not out."""
        return self._inside

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            self._take(size)
            turn.put(None)

    def _fits(self, size: int) -> bool:
        if self._inside == 0:
            return True
        return self._inside < self.requests and self._inside_bytes + size <= self.size_bytes

    def _take(self, size: int) -> None:
        self._inside += 1
        self._inside_bytes += size
