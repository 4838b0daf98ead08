"""Linear orders of the atoms. Every partition without cycles is a slicing of some topological order."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence

from onnxsplit.partitioner.objective import Problem
from onnxsplit.plan import CALLER

Order = list[int]
"""The atoms in a topological order."""


def successors(problem: Problem) -> list[list[int]]:
    """For each atom, the atoms that read from it, ascending."""
    readers_of: list[set[int]] = [set() for _ in range(problem.atoms)]
    for transfer in problem.transfers:
        if transfer.writer != CALLER:
            readers_of[transfer.writer].update(transfer.readers)
    return [sorted(readers) for readers in readers_of]


def linear_orders(problem: Problem) -> Iterator[Order]:
    """Yield topological orders without end: the given one, four heuristic ones, then random ones with a fixed seed.

    Each order takes O(n log n + m) for n atoms and m edges.
    """
    following = successors(problem)
    depth, height = _depths(following), _heights(following)
    yield list(range(problem.atoms))
    yield depth_first(following)
    yield by_priority(following, lambda atom: (depth[atom], atom))
    yield by_priority(following, lambda atom: (-height[atom], atom))
    yield depth_first(following, descending=True)
    chance = random.Random(0)  # noqa: S311 - for variety, not for secrets
    while True:
        draw = [chance.random() for _ in range(problem.atoms)]
        yield depth_first(following, draw)
        yield by_priority(following, draw.__getitem__)


def refined(stage_of: Sequence[int], order: Order) -> Order:
    """Sort the atoms by stage, in the given order within a stage.

    The result is a topological order too, and slicing it can reproduce the stages.
    """
    return sorted(order, key=stage_of.__getitem__)


def depth_first(
    following: Sequence[Sequence[int]], draw: Sequence[float] | None = None, *, descending: bool = False
) -> Order:
    """An order that keeps branches together: an atom is followed by the atoms that it made ready.

    Args:
        following: for each atom, the atoms that read from it.
        draw: the priority of each atom; its number when None.
        descending: True takes atoms of high priority first.
    """
    waiting = _waiting(following)

    def sort(atoms: list[int]) -> list[int]:
        return sorted(atoms, key=draw.__getitem__ if draw is not None else None, reverse=not descending)

    ready = sort([atom for atom, count in enumerate(waiting) if count == 0])
    order = []
    while ready:
        atom = ready.pop()
        order.append(atom)
        freed = []
        for successor in following[atom]:
            waiting[successor] -= 1
            if waiting[successor] == 0:
                freed.append(successor)
        ready += sort(freed)
    return order


def by_priority(following: Sequence[Sequence[int]], priority: Callable[[int], object]) -> Order:
    """An order in which the ready atom with the smallest priority comes next."""
    waiting = _waiting(following)
    ready: list[tuple[object, int]] = [(priority(atom), atom) for atom, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, atom = heapq.heappop(ready)
        order.append(atom)
        for successor in following[atom]:
            waiting[successor] -= 1
            if waiting[successor] == 0:
                heapq.heappush(ready, (priority(successor), successor))
    return order


def _waiting(following: Sequence[Sequence[int]]) -> list[int]:
    waiting = [0] * len(following)
    for readers in following:
        for reader in readers:
            waiting[reader] += 1
    return waiting


def _depths(following: Sequence[Sequence[int]]) -> list[int]:
    depth = [0] * len(following)
    for atom, readers in enumerate(following):
        for reader in readers:
            depth[reader] = max(depth[reader], depth[atom] + 1)
    return depth


def _heights(following: Sequence[Sequence[int]]) -> list[int]:
    height = [0] * len(following)
    for atom in range(len(following) - 1, -1, -1):
        height[atom] = max((height[reader] + 1 for reader in following[atom]), default=0)
    return height
