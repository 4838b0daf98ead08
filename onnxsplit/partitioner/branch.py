"""Branch and bound over tensors that are sent to several stages, on top of the search over downsets.

That search pays for a tensor once, however many stages read it. Where its best partition sends a tensor several times
from a stage that matters, there are two cases: the tensor goes to one stage, or to two at least and costs twice. Where
that is not enough, two of the atoms that it joins are in one stage, or they are apart: a tensor with m readers that
are all apart from each other and from its writer is sent m times at least. Each case is searched again; the smaller
value of the two is the new bound.
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
    """Partitions, each with a bound that holds for all, until the two meet or branches run out.

    Args:
        problem: the problem that ``relaxed`` relaxes.
        relaxed: it.
        listed: the downsets for ``target``.
        first: the best of the relaxed problem.
        target: what was searched for.
        best: the best value known.
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
    """Two branches, about a tensor for which a partition pays less than it does in truth.

    The tensor is the one whose copies, beyond those paid for, cost the slowest stage most; None when there is none.
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
