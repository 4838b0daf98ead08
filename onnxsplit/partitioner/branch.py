"""Branch and bound over tensors that are sent to several stages, on top of the search over downsets.

That search pays for a tensor once, however many stages read it. Where its best partition sends a tensor several times
from a stage that matters, there are two cases: the tensor goes to one stage, or it goes to two at least and costs
twice. Each is searched again; the smaller value of the two is the new bound.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from onnxsplit.partitioner.downsets import DownsetSearch, Found, Sent
from onnxsplit.partitioner.objective import Partition, Problem, score
from onnxsplit.partitioner.relaxed import Relaxed

_BRANCHES = 200


def branch(
    problem: Problem, relaxed: Relaxed, listed: DownsetSearch, first: Found, target: int, best: Callable[[], int]
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
    pending = [(first.value, 0, Sent(), first)]
    proven = first.value
    for number in range(1, _BRANCHES):
        if not pending:
            yield None, min(best(), target + 1)
            return
        proven, _, sent, found = heapq.heappop(pending)
        yield found.partition, min(proven, best())
        tensor = _sent_often(problem, relaxed, found, sent)
        if tensor is None:
            return
        for side, taken in enumerate((Sent(sent.once | {tensor}, sent.twice), Sent(sent.once, sent.twice | {tensor}))):
            below = listed.best(min(target, best() - 1), taken)
            if below is not None:
                heapq.heappush(pending, (max(below.value, proven), 2 * number + side, taken, below))


def _sent_often(problem: Problem, relaxed: Relaxed, found: Found, sent: Sent) -> int | None:
    """The tensor whose second copy costs the slowest stage most; None when no copies were left out of its time."""
    figures = score(problem, found.partition)
    slowest = max(range(len(figures.stage_ns)), key=figures.stage_ns.__getitem__)
    if figures.stage_ns[slowest] <= found.value:
        return None
    stage_of = found.partition.stage_of
    copies = {
        number: len({stage_of[reader] for reader in tensor.readers} - {slowest}) * tensor.time_ns
        for number, tensor in enumerate(relaxed.crossings)
        if stage_of[tensor.writer] == slowest
        and number not in sent.twice
        and len({stage_of[reader] for reader in tensor.readers} - {slowest}) > 1
    }
    return max(copies, key=lambda number: (copies[number], -number), default=None)
