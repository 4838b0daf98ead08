"""Contiguous slices of linear orders: interval dynamic programming, exact for each order.

Any partition into stages 0..K-1 whose tensors flow to higher stages only is a slicing of some topological order; so
the best slicing of a few good orders is a good partition, and for a chain it is the best one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from onnxsplit.partitioner.memory import Table, interval_memory
from onnxsplit.partitioner.objective import CALLER, Assignment, Infeasible, Problem, score

_LARGEST = 2500
"""Positions of an order that the table of intervals is made for; longer orders are grouped first."""

_NEVER = np.iinfo(np.int64).max


def slice_orders(problem: Problem, stages: int) -> Assignment:
    """The best slicing, over several topological orders, into exactly ``stages`` stages that each hold an atom.

    Time is O(n^2) in the atoms for the table and O(n^2 K) for the choice, both in NumPy. Ties go to the first order.

    Raises:
        Infeasible: no slice of these orders keeps every stage within the memory allowed.
    """
    if not 0 <= stages <= len(problem.time_ns) or (problem.time_ns and not stages):
        raise ValueError(f"{len(problem.time_ns)} atoms cannot make {stages} stages")
    candidates = [found for order in _orders(problem) if (found := _slice(problem, order, stages)) is not None]
    if not candidates:
        raise Infeasible
    return min(candidates, key=lambda found: (score(problem, found).bottleneck_ns, score(problem, found).latency_ns))


def fewest_stages(problem: Problem) -> int:
    """The fewest stages that keep every one within the memory allowed, over the same orders.

    Memory only grows with a stage, so filling one stage after the other is the best for an order.

    Raises:
        Infeasible: one atom alone needs more.
    """
    counts = []
    for order in _orders(problem):
        group_of, groups = _grouped(problem, order, 1)
        fits = interval_memory(problem, group_of, groups) <= (problem.max_memory_bytes or _NEVER)
        begin, count = 0, 0
        while begin < groups and fits[begin, begin]:
            unfit = np.flatnonzero(~fits[begin, begin:])
            begin = begin + int(unfit[0]) if unfit.size else groups
            count += 1
        if begin == groups:
            counts.append(count)
    if not counts:
        raise Infeasible
    return min(counts)


def _orders(problem: Problem) -> list[list[int]]:
    """The given order; depth first, which keeps a branch in one piece; and breadth first by longest path."""
    count = len(problem.time_ns)
    successors: list[set[int]] = [set() for _ in range(count)]
    for flow in problem.transfers:
        if flow.writer != CALLER:
            successors[flow.writer].update(flow.readers)
    waiting = [0] * count
    depth = [0] * count
    for atom in range(count):
        for successor in successors[atom]:
            waiting[successor] += 1
            depth[successor] = max(depth[successor], depth[atom] + 1)
    orders = [list(range(count))]
    for order in (_depth_first(successors, list(waiting)), _by_depth(successors, list(waiting), depth)):
        if order not in orders:
            orders.append(order)
    return orders


def _depth_first(successors: Sequence[set[int]], waiting: list[int]) -> list[int]:
    ready = sorted((atom for atom, count in enumerate(waiting) if count == 0), reverse=True)
    order = []
    while ready:
        atom = ready.pop()
        order.append(atom)
        for successor in sorted(successors[atom], reverse=True):
            waiting[successor] -= 1
            if waiting[successor] == 0:
                ready.append(successor)
    return order


def _by_depth(successors: Sequence[set[int]], waiting: list[int], depth: Sequence[int]) -> list[int]:
    ready = [(depth[atom], atom) for atom, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, atom = heapq.heappop(ready)
        order.append(atom)
        for successor in successors[atom]:
            waiting[successor] -= 1
            if waiting[successor] == 0:
                heapq.heappush(ready, (depth[successor], successor))
    return order


def _slice(problem: Problem, order: Sequence[int], stages: int) -> Assignment | None:
    """The best slicing of one order into intervals; None when memory allows none."""
    group_of, groups = _grouped(problem, order, stages)
    cost = _interval_costs(problem, group_of, groups)
    if problem.max_memory_bytes is not None:
        cost[:, 1:][interval_memory(problem, group_of, groups) > problem.max_memory_bytes] = _NEVER
    best = np.full((stages + 1, groups + 1), _NEVER, dtype=np.int64)
    start = np.zeros((stages + 1, groups + 1), dtype=np.int64)
    best[0, 0] = 0
    for stage in range(1, stages + 1):
        for end in range(stage, groups - (stages - stage) + 1):
            worst = np.maximum(best[stage - 1, stage - 1 : end], cost[stage - 1 : end, end])
            choice = int(np.argmin(worst))
            best[stage, end], start[stage, end] = worst[choice], stage - 1 + choice
    if best[stages, groups] == _NEVER:
        return None
    bounds = [groups]
    for stage in range(stages, 0, -1):
        bounds.append(int(start[stage, bounds[-1]]))
    stage_of_group = np.searchsorted(np.array(bounds[::-1][1:-1], dtype=np.int64), np.arange(groups), side="right")
    return tuple(int(stage_of_group[group]) for group in group_of)


def _grouped(problem: Problem, order: Sequence[int], stages: int) -> tuple[list[int], int]:
    """Positions of atoms in the order; neighbours share one where the order is too long for a table."""
    count = len(order)
    group_of = [0] * count
    if count <= max(_LARGEST, stages):
        for position, atom in enumerate(order):
            group_of[atom] = position
        return group_of, count
    share = max(1, sum(problem.time_ns) // _LARGEST)
    group, filled = 0, 0
    for left, atom in zip(range(count, 0, -1), order, strict=True):
        if filled >= share or left <= stages - group - 1:
            group, filled = group + 1, 0
        group_of[atom] = group
        filled += problem.time_ns[atom] + 1
    return group_of, group + 1


def _interval_costs(problem: Problem, group_of: Sequence[int], groups: int) -> Table:
    """``cost[i, j]``: a stage of the groups i to j - 1, its compute and its transfers.

    A tensor that leaves an interval is counted once here, whatever the number of stages that read it.
    """
    compute = np.zeros(groups + 1, dtype=np.int64)
    for atom, time_ns in enumerate(problem.time_ns):
        compute[group_of[atom] + 1] += time_ns
    leaving = np.zeros((groups, groups), dtype=np.int64)
    arriving = np.zeros((groups, groups), dtype=np.int64)
    for flow in problem.transfers:
        writer = -1 if flow.writer == CALLER else group_of[flow.writer]
        readers = sorted({group_of[reader] for reader in flow.readers} - {writer})
        if flow.to_caller:
            compute[writer + 1] += flow.time_ns
        if writer >= 0 and readers:
            leaving[writer, writer : readers[-1]] += flow.time_ns
        for previous, reader in zip([writer, *readers], readers, strict=False):
            # A stage that starts after `previous` and up to `reader` receives the tensor for this reader.
            arriving[previous + 1 : reader + 1, reader] += flow.time_ns
    total = np.cumsum(compute)
    received = np.cumsum(arriving, axis=1)
    sent = np.cumsum(leaving[::-1], axis=0)[::-1]  # by the writers from i upwards that are read after j
    cost = np.zeros((groups, groups + 1), dtype=np.int64)
    cost[:, 1:] = total[1:][None, :] - total[:-1][:, None] + received + sent
    return cost
