"""Local search: move atoms between stages, or exchange devices, as long as the score improves.

An atom may move to any stage from the highest stage of its predecessors to the lowest of its successors, so stages
never form a cycle. It moves alone, or together with its ancestors or its descendants in the same stage, which widens
that range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from onnxsplit.partitioner.objective import Partition, Problem, Score, score
from onnxsplit.partitioner.orders import successors


def improve(
    problem: Problem, start: Partition, *, tries: int = 20_000, stop: Callable[[], bool] = lambda: False
) -> Partition:
    """Improve a partition by moving atoms; the stages keep their devices.

    Every move is judged by the true score, so a move takes time linear in the graph.

    Args:
        problem: atoms, devices and objective.
        start: the partition to improve.
        tries: the largest number of moves to judge.
        stop: called before every move; returns True to end the search.

    Returns:
        The best partition that was reached.
    """
    following = successors(problem)
    preceding: list[list[int]] = [[] for _ in range(problem.atoms)]
    for atom, readers in enumerate(following):
        for reader in readers:
            preceding[reader].append(atom)
    best, best_score = start, score(problem, start)
    improved = True
    while improved:
        improved = False
        for moved in _moves(best.stage_of, preceding, following, len(best.devices)):
            if tries == 0 or stop():
                return best
            tries -= 1
            candidate = Partition(moved, best.devices)
            figures = score(problem, candidate)
            if _better(figures, best_score):
                best, best_score, improved = candidate, figures, True
                break
    return best


def rearranged(problem: Problem, start: Partition, *, stop: Callable[[], bool] = lambda: False) -> Partition:
    """Improve a partition by exchanging two devices of different stages, or a used device for an idle one.

    Stages keep their atoms and their number of replicas, and all replicas of a stage are of one kind. A round judges
    O(d^2) exchanges of d devices.
    """
    best, best_score = start, score(problem, start)
    improved = True
    while improved and not stop():
        improved = False
        for devices in _exchanges(best.devices, len(problem.devices)):
            if any(problem.devices[d] != problem.devices[members[0]] for members in devices for d in members):
                continue
            candidate = Partition(best.stage_of, devices)
            figures = score(problem, candidate)
            if _better(figures, best_score):
                best, best_score, improved = candidate, figures, True
                break
    return best


def _exchanges(devices: tuple[tuple[int, ...], ...], count: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    home = {device: stage for stage, members in enumerate(devices) for device in members}
    for one in range(count):
        for other in range(one):
            if home.get(one) != home.get(other):
                swap = {one: other, other: one}
                yield tuple(tuple(sorted(swap.get(d, d) for d in members)) for members in devices)


def _better(one: Score, other: Score) -> bool:
    return one.rank < other.rank


def _moves(
    stage_of: tuple[int, ...], preceding: Sequence[Sequence[int]], following: Sequence[Sequence[int]], stages: int
) -> Iterator[tuple[int, ...]]:
    """All assignments that one move leads to and in which every stage still holds an atom."""
    sizes = [0] * stages
    for stage in stage_of:
        sizes[stage] += 1
    for atom, home in enumerate(stage_of):
        above = _together(atom, stage_of, preceding)
        below = _together(atom, stage_of, following)
        for group in dict.fromkeys(((atom,), above, below)):
            if len(group) == sizes[home]:
                continue
            inside = set(group)
            lowest = max((stage_of[p] for a in group for p in preceding[a] if p not in inside), default=0)
            highest = min((stage_of[s] for a in group for s in following[a] if s not in inside), default=stages - 1)
            for target in range(lowest, highest + 1):
                if target != home:
                    moved = list(stage_of)
                    for member in group:
                        moved[member] = target
                    yield tuple(moved)


def _together(atom: int, stage_of: Sequence[int], neighbours: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """An atom and all atoms of its stage that can be reached from it within the stage."""
    group, pending = {atom}, [atom]
    while pending:
        for other in neighbours[pending.pop()]:
            if stage_of[other] == stage_of[atom] and other not in group:
                group.add(other)
                pending.append(other)
    return tuple(sorted(group))
