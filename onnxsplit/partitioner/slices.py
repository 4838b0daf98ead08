"""The best contiguous slices of one linear order, by interval dynamic programming; exact for the order.

This is the classic linear partition problem, extended by devices, transfers and memory. One sweep goes from the last
position of the order to the first. For position i it knows the cost of a stage of the positions i to j - 1, for all
ends j at once, and extends the best slicings of the positions from j on:

    best[state before][i] = min over steps and j of max(cost of [i, j) on the step's device, best[state after][j])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxsplit.cluster import Link
from onnxsplit.partitioner.lineup import Lineup, StageStep
from onnxsplit.partitioner.objective import NEVER, Infeasible, Partition, Problem, Transfer
from onnxsplit.partitioner.orders import linear_orders
from onnxsplit.partitioner.relaxed import Vector
from onnxsplit.plan import CALLER

_ORDERS = 3  # orders that are tried to find the fewest stages


class _Slices:
    """The costs of the stages that begin at one position of the order, for all ends.

    The position moves from the last to the first. Arrays are indexed by the end j of a stage, which holds the positions
    ``begin`` to j - 1.
    """

    def __init__(self, problem: Problem, order: Sequence[int], walls: Sequence[int], links: Sequence[Link]) -> None:
        self._problem = problem
        count = len(order)
        place = np.empty(count + 1, dtype=np.int64)
        place[list(order)] = np.arange(count)
        place[CALLER] = CALLER
        self.compute = [_sums([kind.time_ns[atom] for atom in order]) for kind in problem.kinds]
        self.arriving = {link: np.zeros(count + 1, dtype=np.int64) for link in links}
        self.leaving = {link: np.zeros(count + 1, dtype=np.int64) for link in links}
        self.answering = {link: np.zeros(count + 1, dtype=np.int64) for link in links}
        self.memory = np.zeros(count + 1, dtype=np.int64) if problem.capped or problem.objective == "memory" else None
        self._held = np.zeros(count + 1, dtype=np.int64)
        self._live_peak = np.zeros(count + 1, dtype=np.int64)
        self._live = np.zeros(count, dtype=np.int64)
        self._reads: list[list[tuple[Transfer, int]]] = [[] for _ in range(count)]  # with the next reader or end
        self._writes: list[list[tuple[Transfer, int, int]]] = [[] for _ in range(count)]
        self._constants: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        self._end = [count] * (count + 1)  # the furthest end of a stage from here, because of atoms that must be apart
        for transfer in problem.transfers:
            writer = int(place[transfer.writer])
            readers = sorted(int(place[reader]) for reader in transfer.readers)
            for reader, following in zip(readers, [*readers[1:], count], strict=False):
                self._reads[reader].append((transfer, following))
            last = count - 1 if transfer.to_caller else readers[-1] if readers else writer
            if writer >= 0:
                ends = (readers[0], readers[-1]) if readers else (count, writer)
                self._writes[writer].append((transfer, *ends))
            self._live[max(writer, 0) : last + 1] += transfer.size_bytes
        for atom, size_bytes in enumerate(problem.inner_bytes):
            self._live[place[atom]] += size_bytes
        for weight in problem.weights:
            readers = sorted(int(place[reader]) for reader in weight.readers)
            for reader, following in zip(readers, [*readers[1:], count], strict=False):
                self._constants[reader].append((weight.size_bytes, following))
        for one, other in problem.apart:
            first, second = sorted((int(place[one]), int(place[other])))
            self._end[first] = min(self._end[first], second)
        for wall in walls:
            self._end[wall - 1] = min(self._end[wall - 1], wall)
        for begin in range(count - 1, -1, -1):
            self._end[begin] = min(self._end[begin], self._end[begin + 1])

    def begin_at(self, begin: int) -> int:
        """Move to the next position in front, and return the largest end that a stage from there may have."""
        once = self._problem.send_once
        for link, arriving in self.arriving.items():
            leaving = self.leaving[link]
            for transfer, following in self._reads[begin]:
                arriving[begin + 1 : following + 1] += transfer.arrival_ns(link)
            for transfer, first, last in self._writes[begin]:
                time_ns = transfer.arrival_ns(link)
                arriving[first + 1 :] -= time_ns
                if not (transfer.to_caller and once):
                    leaving[begin + 1 : last + 1] += time_ns
                if transfer.to_caller:
                    self.answering[link][begin + 1 :] += transfer.answer_ns(link)
        if self.memory is not None:
            for size_bytes, following in self._constants[begin]:
                self._held[begin + 1 : following + 1] += size_bytes
            np.maximum(self._live_peak[begin + 1 :], self._live[begin], out=self._live_peak[begin + 1 :])
            self.memory[begin + 1 :] = self._held[begin + 1 :] + self._live_peak[begin + 1 :]
        return self._end[begin]

    def stage_ns(self, step: StageStep, begin: int, stop: int) -> Vector:
        """Time of the stages from ``begin`` to each end before ``stop`` on the devices of a step, in nanoseconds."""
        sums = self.compute[step.kind]
        compute = sums[begin + 1 : stop] - sums[begin]
        if not self._problem.kinds[step.kind].pays:
            moving: Vector | int = 0
        else:
            moving = self.arriving[step.arriving][begin + 1 : stop] + self.leaving[step.leaving][begin + 1 : stop]
            moving = moving + self.answering[step.caller][begin + 1 : stop]
        overlapped = step.arriving.overlapped and step.leaving.overlapped
        total = np.maximum(compute, moving) if overlapped else compute + moving
        result: Vector = total if step.replicas == 1 else -(-total // step.replicas)
        return result


def _sums(times: Sequence[int]) -> Vector:
    """The sums of the first 0, 1, 2, ... times; an atom that may not run counts with a time above any real sum."""
    capped = np.minimum(np.array([0, *times], dtype=np.int64), NEVER >> 16)
    return np.cumsum(capped)


def slice_order(
    problem: Problem, lineup: Lineup, order: Sequence[int], *, limit: int | None = None, walls: Sequence[int] = ()
) -> Partition | None:
    """The best slicing of one linear order.

    Takes O(n^2 s) for n atoms and s steps, in NumPy and only for ends within the limit. A tensor that leaves a stage
    is charged once, regardless of how many stages read it. The memory of a stage is never underestimated.

    Args:
        problem: atoms, devices and objective.
        lineup: the orders in which devices may be used.
        order: the atoms in a topological order.
        limit: the largest value of interest; None for no limit.
        walls: positions at which a stage must begin.

    Returns:
        The best partition; None when there is none, or none within the limit.
    """
    count = len(order)
    if not count:
        return Partition((), ())
    slices = _Slices(
        problem, order, walls, list({link: None for s in lineup.steps for link in (s.arriving, s.leaving, s.caller)})
    )
    never = np.iinfo(np.int64).max
    top = NEVER >> 17 if limit is None else limit
    best = np.full((lineup.states, count + 1), never, dtype=np.int64)
    ends = np.zeros((lineup.states, count + 1), dtype=np.int32)
    chosen = np.zeros((lineup.states, count + 1), dtype=np.int32)
    best[list(lineup.final), count] = 0
    for begin in range(count - 1, -1, -1):
        furthest = slices.begin_at(begin)
        costs: dict[tuple[int, int, Link, Link, Link], Vector] = {}
        for number, step in enumerate(lineup.steps):
            if begin == 0 and step.before != 0:
                continue
            key = (step.kind, step.replicas, step.arriving, step.leaving, step.caller)
            cost = costs.get(key)
            if cost is None:
                sums = slices.compute[step.kind]
                allowed = sums[begin] + min(top, NEVER >> 17) * step.replicas
                stop = min(furthest + 1, int(np.searchsorted(sums, allowed, side="right")))
                cost = slices.stage_ns(step, begin, max(stop, begin + 1))
                if slices.memory is not None:
                    cost = _with_memory(problem, step, cost, slices.memory[begin + 1 : begin + 1 + len(cost)])
                costs[key] = cost
            if not len(cost):
                continue
            total = np.maximum(cost, best[step.after, begin + 1 : begin + 1 + len(cost)])
            end = int(np.argmin(total))
            if total[end] < best[step.before, begin] and total[end] <= top:
                best[step.before, begin] = total[end]
                ends[step.before, begin], chosen[step.before, begin] = begin + 1 + end, number
    if best[0, 0] == never:
        return None
    return _followed(problem, lineup, order, ends, chosen)


def _with_memory(problem: Problem, step: StageStep, cost: Vector, memory: Vector) -> Vector:
    """The values to minimise: times, or bytes for the objective ``memory``; the largest number where not allowed."""
    limit = problem.kinds[step.kind].max_memory_bytes
    wanted = memory.copy() if problem.objective == "memory" else cost.copy()
    if problem.objective == "memory":
        wanted[cost >= NEVER >> 17] = np.iinfo(np.int64).max
    if limit is not None:
        wanted[memory > limit] = np.iinfo(np.int64).max
    return wanted


def _followed(problem: Problem, lineup: Lineup, order: Sequence[int], ends: Any, chosen: Any) -> Partition:
    """The partition that the chosen ends and steps describe."""
    stage_of = [0] * len(order)
    steps: list[StageStep] = []
    state, begin = 0, 0
    while begin < len(order):
        end, step = int(ends[state, begin]), lineup.steps[int(chosen[state, begin])]
        for position in range(begin, end):
            stage_of[order[position]] = len(steps)
        steps.append(step)
        state, begin = step.after, end
    return Partition(tuple(stage_of), lineup.devices(problem, steps))


def fewest_stages(problem: Problem) -> int:
    """The fewest stages that each fit the memory of the first kind of device, over a few linear orders.

    The memory of a stage only grows with its atoms, so filling one stage after the other is best for an order. Takes
    O(n^2) for each order of n atoms.

    Raises:
        Infeasible: one atom alone needs more memory.
    """
    limit = problem.kinds[0].max_memory_bytes
    counts = []
    orders: Iterator[list[int]] = linear_orders(problem)
    for order in [next(orders) for _ in range(_ORDERS)]:
        slices = _Slices(problem, order, [], [])
        if slices.memory is None or limit is None:
            return min(1, len(order))
        # fewest[i]: stages for the positions from i on; filling from the end gives the same number as from the front.
        count, stop = 1, len(order)
        for begin in range(len(order) - 1, -1, -1):
            slices.begin_at(begin)
            if slices.memory[stop] > limit:
                if slices.memory[begin + 1] > limit:
                    break
                count, stop = count + 1, begin + 1
        else:
            counts.append(count)
    if not counts:
        raise Infeasible
    return min(counts)
