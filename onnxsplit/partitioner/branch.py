"""Branch and bound over tensors that are sent to several stages, on top of the search over downsets.

The search over downsets charges a tensor once, regardless of how many stages read it. If its best partition sends a
tensor from the slowest stage several times, the search branches: either the tensor goes to at most one stage, or it
goes to at least two and costs twice as much. If that is not enough, it branches on two atoms that the tensor joins:
they are in one stage, or they are apart. A tensor with m readers that are all apart from each other and from its writer
is sent at least m times. Each branch is searched again, and the smaller of their values is the new bound.

There are at most 200 branches; each costs one pass over the listed downsets (see :mod:`onnxsplit.partitioner.paths`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import replace

from onnxsplit.partitioner.objective import Partition, Problem, score
from onnxsplit.partitioner.paths import PathResult, PathSearch, Ties
from onnxsplit.partitioner.relaxed import Relaxed

_BRANCHES = 200


def branch(
    problem: Problem, relaxed: Relaxed, listed: PathSearch, first: PathResult, target: int, best: Callable[[], int]
) -> Iterator[tuple[Partition | None, int]]:
    """Search branch by branch, the smallest value first, until nothing is left to branch on.

    Args:
        problem: the problem.
        relaxed: the problem as the search over downsets sees it.
        listed: the search over downsets, with the downsets for ``target`` listed.
        first: the best result of the relaxed problem.
        target: the largest bottleneck of interest, in nanoseconds.
        best: returns the best value known at the moment.

    Yields:
        A partition of the problem, or None, and a lower bound on the bottleneck of every partition.
    """
    pending = [(first.value, 0, Ties(), first)]
    for number in range(1, _BRANCHES):
        if not pending:
            yield None, min(best(), target + 1)
            return
        proven, _, ties, result = heapq.heappop(pending)
        yield result.partition, min(proven, best())
        sides = _branches(problem, relaxed, result, ties)
        if sides is None:
            return
        for side, taken in enumerate(sides):
            below = listed.best(min(target, best() - 1), taken)
            if below is not None:
                heapq.heappush(pending, (max(below.value, proven), 2 * number + side, taken, below))


def _branches(problem: Problem, relaxed: Relaxed, result: PathResult, ties: Ties) -> tuple[Ties, Ties] | None:
    """Two branches that together cover all partitions; None when the result's value is its true bottleneck.

    They branch on the tensor whose copies cost the slowest stage the most beyond what the relaxed problem charges.
    """
    figures = score(problem, result.partition)
    slowest = max(range(len(figures.stage_ns)), key=figures.stage_ns.__getitem__)
    if figures.stage_ns[slowest] <= result.value:
        return None
    stage_of = result.partition.stage_of
    unpaid = {
        number: (len({stage_of[r] for r in tensor.readers} - {slowest}) - ties.copies(number, tensor)) * tensor.time_ns
        for number, tensor in enumerate(relaxed.crossings)
        if stage_of[tensor.writer] == slowest
    }
    number = max(unpaid, key=lambda number: (unpaid[number], -number), default=None)
    if number is None or unpaid[number] <= 0:
        return None
    if number not in ties.twice:
        return replace(ties, once=ties.once | {number}), replace(ties, twice=ties.twice | {number})
    tensor = relaxed.crossings[number]
    known = ties.surely_apart(tensor)
    reached = {stage_of[atom] for atom in known}
    reader = next(r for r in tensor.readers if stage_of[r] not in reached)
    pairs = ((min(atom, reader), max(atom, reader)) for atom in known)
    pair = next(pair for pair in pairs if pair not in ties.apart)
    return replace(ties, together=ties.together | {pair}), replace(ties, apart=ties.apart | {pair})
