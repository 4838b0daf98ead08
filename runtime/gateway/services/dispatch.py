"""Which worker executes which call. Pure.

Calls go in the order of their arrival to the worker with the fewest of them. A call that was in a worker that died is
suspected to be the cause: it goes first, and to a worker that has no other call until it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)
C = TypeVar("C", bound=Hashable)


class Dispatch(Generic[W, C]):
    """The calls of one service, waiting and executing.

    Args:
        capacity: the most calls that a worker executes at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[C] = deque()
        self._workers: dict[W, set[C]] = {}
        self._suspected: set[C] = set()
        self._retired: set[W] = set()

    @property
    def workers(self) -> int:
        """Number of workers that are up."""
        return len(self._workers)

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a worker."""
        return len(self._waiting)

    @property
    def executing(self) -> int:
        """Number of calls that workers execute."""
        return sum(map(len, self._workers.values()))

    def add(self, call: C, *, suspected: bool = False) -> None:
        """A call arrives, or comes back from a worker that has died while it executed it."""
        if suspected:
            self._suspected.add(call)
            self._waiting.appendleft(call)
        else:
            self._waiting.append(call)

    def up(self, worker: W) -> None:
        """A worker takes calls."""
        self._workers[worker] = set()

    def down(self, worker: W) -> list[C]:
        """A worker has died; returns the calls that it executed."""
        self._retired.discard(worker)
        return list(self._workers.pop(worker, ()))

    def retire(self, worker: W) -> None:
        """Give a worker no more calls."""
        self._retired.add(worker)

    def is_retired(self, worker: W) -> bool:
        """Whether a worker gets no more calls."""
        return worker in self._retired

    def calls_of(self, worker: W) -> set[C]:
        """The calls that a worker executes."""
        return self._workers.get(worker, set())

    def over(self, call: C) -> W | None:
        """A call is over, or nobody waits for it; returns the worker that executed it."""
        self._suspected.discard(call)
        if call in self._waiting:
            self._waiting.remove(call)
        for worker, calls in self._workers.items():
            if call in calls:
                calls.remove(call)
                return worker
        return None

    def worker_of(self, call: C) -> W | None:
        """The worker that executes a call."""
        return next((worker for worker, calls in self._workers.items() if call in calls), None)

    def next(self) -> tuple[C, W] | None:
        """The next call and the worker that is to execute it; None if there is no call or no worker for it."""
        if not self._waiting:
            return None
        call = self._waiting[0]
        most = 1 if call in self._suspected else self._capacity
        free = [
            worker
            for worker, calls in self._workers.items()
            if len(calls) < most and self._suspected.isdisjoint(calls) and worker not in self._retired
        ]
        if not free:
            return None
        worker = min(free, key=lambda each: len(self._workers[each]))
        self._waiting.popleft()
        self._workers[worker].add(call)
        return call, worker
