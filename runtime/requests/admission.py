"""Admission control: limits the number of requests in a pipeline and the size of their tensors."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from runtime.errors import Busy, DeadlineExceeded


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that waits to be admitted."""

    place: object
    size: int
    admitted: Callable[[], bool]


class Admission:
    """Admits requests up to two limits. Requests over either limit wait in FIFO order.

    The caller identifies a request by an object, its place. Giving a place back twice has the same effect as once, and
    a place that was taken while an interrupt arrived can still be given back.

    Args:
        requests: the largest number of requests at once.
        size_bytes: the largest size of their tensors; a single request may exceed it.
        group: a caller that waits alone is woken when it can submit so many requests, which saves wake-ups.

    Attributes:
        releases: how often a place was given back, or a caller stopped waiting for one.
    """

    def __init__(self, requests: int, size_bytes: int, group: int = 1) -> None:
        self.requests = requests
        self.size_bytes = size_bytes
        self._group = group
        self._lock = threading.Lock()
        self._places: dict[object, int] = {}  # taken places, with the bytes of each
        self._waiting: deque[_Waiting] = deque()
        self.releases = 0
        self._on_release: list[Callable[[], None]] = []

    def enter(self, place: object, size: int, *, block: bool = True, timeout: float | None = None) -> bool:
        """Admit a request of ``size`` bytes.

        If this raises, call :meth:`leave`.

        Args:
            place: identifies the request.
            size: bytes of its tensors.
            block: whether to wait for room.
            timeout: seconds to wait at most; None for no limit.

        Returns:
            False when there was no room.
        """
        if self.join(place, size, None):
            return True
        if not block:
            return False
        turn: SimpleQueue[None] = SimpleQueue()

        def admitted() -> bool:
            turn.put(None)
            return True

        if self.join(place, size, admitted):
            return True
        try:
            turn.get(timeout=timeout)
        except Empty:
            with self._lock:
                if place in self._places:
                    return True
            self.leave(place)
            return False
        return True

    def join(self, place: object, size: int, admitted: Callable[[], bool] | None) -> bool:
        """Admit a request at once, or let it wait in line, without blocking.

        Args:
            place: identifies the request. :meth:`leave` also ends its waiting.
            size: bytes of its tensors.
            admitted: called once, in any thread, when a request that waits has been admitted. It returns False if
                nobody waits any more; then the place is given back. None does not let the request wait.

        Returns:
            True when it was admitted at once.
        """
        with self._lock:
            if not self._waiting and self._fits(size):
                self._places[place] = size
                return True
            if admitted is not None:
                self._waiting.append(_Waiting(place, size, admitted))
            return False

    def admit(self, place: object, size: int, *, deadline_ns: int | None, block: bool) -> None:
        """The same as :meth:`enter`, with a deadline by ``time.monotonic_ns``, and with errors.

        Raises:
            DeadlineExceeded: there was no room before the deadline.
            Busy: there is no room, and ``block`` is False.
        """
        timeout = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        if self.enter(place, size, block=block, timeout=timeout):
            return
        if block:
            raise self.out_of_time()
        raise Busy(f"{self.requests} requests are in flight, the most that this pipeline admits; try again")

    def out_of_time(self) -> DeadlineExceeded:
        """The error of a request that was not admitted before its deadline."""
        return DeadlineExceeded(
            "the request's time ran out before it was admitted: "
            f"{self.requests} requests were in flight, the most that this pipeline admits"
        )

    def leave(self, place: object) -> None:
        """Give a place back, or stop waiting for it."""
        leaving = [place]
        while leaving:
            admitted, callbacks = self._leave(leaving.pop())
            leaving += [waiting.place for waiting in admitted if not waiting.admitted()]
            for callback in callbacks:
                callback()

    def _leave(self, place: object) -> tuple[list[_Waiting], list[Callable[[], None]]]:
        """Give a place back; returns the requests that are admitted now, and the callbacks of a release."""
        admitted: list[_Waiting] = []
        callbacks: list[Callable[[], None]] = []
        with self._lock:
            released = self._places.pop(place, None) is not None
            if not released:
                others = deque(other for other in self._waiting if other.place is not place)
                released = len(others) < len(self._waiting)
                self._waiting = others
            while self._waiting and self._fits(self._waiting[0].size) and self._is_worth_waking:
                first = self._waiting.popleft()
                self._places[first.place] = first.size
                admitted.append(first)
            if released:
                self.releases += 1
                callbacks, self._on_release = self._on_release, callbacks
        return admitted, callbacks

    def resize(self, requests: int, group: int = 1) -> None:
        """Change the largest number of requests at once. Those that were admitted stay."""
        with self._lock:
            self.requests, self._group = requests, group
        self.leave(object())  # others may fit now

    def when_released(self, releases: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, in any thread, as soon as there have been more than ``releases`` releases.

        A caller that was refused without ``block`` waits with this until another try makes sense. It reads
        ``releases`` before the try, so that no release between the refusal and this call is missed.
        """
        with self._lock:
            if self.releases == releases:
                self._on_release.append(callback)
                return
        callback()

    @property
    def inside(self) -> int:
        """Number of requests that were admitted and have not left."""
        return len(self._places)

    @property
    def is_full(self) -> bool:
        """Whether a further request would have to wait."""
        return len(self._places) >= self.requests or bool(self._waiting)

    @property
    def _is_worth_waking(self) -> bool:
        return len(self._places) <= self.requests - self._group or len(self._waiting) > 1

    def _fits(self, size: int) -> bool:
        if not self._places:
            return True
        return len(self._places) < self.requests and sum(self._places.values()) + size <= self.size_bytes
