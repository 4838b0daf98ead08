"""Exact search: the best path through downsets whose bottleneck is at most a target, or a proof that none exists.

A partition without cycles is a path through downsets, so the search is not limited to slicings of one linear order. One
pass of dynamic programming over pairs of downsets gives the optimum; Tarnawski et al. ("Efficient Algorithms for Device
Placement of DNN Graph Operators", NeurIPS 2020) do this over all downsets. A small target leaves few downsets, so a
lower bound can be proven where the optimum cannot be found.

The search is exact for the :class:`~onnxsplit.partitioner.relaxed.Relaxed` problem. Its best value is always a lower
bound for the true problem; :func:`~onnxsplit.partitioner.objective.score` gives the true value of its partition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxsplit.partitioner.downsets import Downsets, TooMany, list_downsets
from onnxsplit.partitioner.lineup import StageStep
from onnxsplit.partitioner.objective import Partition
from onnxsplit.partitioner.relaxed import FAR, Capacities, Crossing, Relaxed, Vector


@dataclass(frozen=True)
class PathResult:
    """The best partition of the relaxed problem, and its value: no partition has a smaller bottleneck (nanoseconds)."""

    partition: Partition
    value: int


@dataclass(frozen=True)
class Ties:
    """The assumptions of one branch of a search.

    Attributes:
        once: tensors, by index among the crossings, that at most one stage other than their writer's reads.
        twice: tensors that their writer's stage sends to at least two stages.
        together: pairs of atoms, the lower first, that are in one stage.
        apart: pairs of atoms, the lower first, that are in different stages.
    """

    once: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()
    together: frozenset[tuple[int, int]] = frozenset()
    apart: frozenset[tuple[int, int]] = frozenset()

    def copies(self, number: int, tensor: Crossing) -> int:
        """The least number of times that a tensor is sent if it crosses."""
        return max(1 + (number in self.twice), len(self.surely_apart(tensor)) - 1)

    def surely_apart(self, tensor: Crossing) -> list[int]:
        """The writer of a tensor, and readers that are all apart from the writer and from each other."""
        atoms = [tensor.writer]
        for reader in tensor.readers:
            if all((min(atom, reader), max(atom, reader)) in self.apart for atom in atoms):
                atoms.append(reader)
        return atoms


class PathSearch:
    """The search for one target: the downsets are listed once, and every branch chooses among them."""

    def __init__(
        self,
        relaxed: Relaxed,
        target: int,
        *,
        most: int = 100_000,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """List the downsets: O(d n) for d downsets of n atoms.

        Args:
            relaxed: the relaxed problem.
            target: the largest bottleneck of interest, in nanoseconds.
            most: the largest number of downsets to hold at once.
            stop: called regularly; returns True to end the search.

        Raises:
            TooMany: there are too many downsets, or the time limit is reached; nothing was proven.
        """
        self._relaxed, self._stop = relaxed, stop
        self._capacities = Capacities(relaxed, target)
        self._downsets = list_downsets(relaxed, self._capacities, most, stop)

    def best(self, target: int | None = None, ties: Ties = Ties()) -> PathResult | None:
        """The best partition whose bottleneck is at most the target; None if it is proven that none exists.

        Takes O(d c) for d downsets, of which at most c can follow another within one stage.

        Args:
            target: a target that is smaller than that of the listing; that of the listing when None.
            ties: the assumptions of the branch.

        Raises:
            TooMany: the time limit is reached; nothing was proven.
        """
        capacities = self._capacities if target is None else Capacities(self._relaxed, target)
        return _choose(self._relaxed, capacities, self._downsets, ties, self._stop)


def _choose(
    relaxed: Relaxed,
    capacities: Capacities,
    downsets: Downsets,
    ties: Ties,
    stop: Callable[[], bool],
) -> PathResult | None:
    """The best path through the downsets, from the empty one to the full one."""
    target = capacities.target
    states, count = relaxed.lineup.states, len(downsets.work)
    if not count or downsets.member[:, 0].any() or not downsets.member[:, -1].all():
        return None
    best = np.full((states, count), FAR, dtype=np.int64)
    parent = np.full((states, count), -1, dtype=np.int32)
    taken = np.full((states, count), -1, dtype=np.int32)
    best[0, 0] = 0
    usable = [
        capacities.usable(state, downsets.work, downsets.work, downsets.crossing_ns, downsets.crossings)
        for state in range(states)
    ]
    following: list[list[tuple[int, StageStep]]] = [[] for _ in range(states)]
    for number, step in enumerate(relaxed.lineup.steps):
        following[step.before].append((number, step))
    reach = [
        downsets.work.searchsorted(
            downsets.work + max((capacities.most(s) for _, s in steps), default=0.0) + 0.5, "right"
        )
        for steps in following
    ]
    windows = [np.flatnonzero(rows) for rows in usable]
    pairs = _Pairs(relaxed, downsets, ties)
    for index in range(count - 1):
        active = [state for state in range(states) if best[state, index] <= target and following[state]]
        if not active:
            continue
        if index % 64 == 0 and stop():
            raise TooMany
        end = max(int(reach[state][index]) for state in active)
        afters = {step.after for state in active for _, step in following[state]}
        chosen = _between(windows, usable, afters, index + 1, end)
        chosen = pairs.above(index, pairs.light(index, chosen, target))
        if not len(chosen):
            continue
        loads = pairs.loads(index, chosen)
        for state in active:
            for number, step in following[state]:
                load = loads[step.kind]
                value = np.maximum(load if step.replicas == 1 else -(-load // step.replicas), best[state, index])
                better = (value < best[step.after, chosen]) & (value <= target) & usable[step.after][chosen]
                where = chosen[better]
                best[step.after, where] = value[better]
                parent[step.after, where] = index
                taken[step.after, where] = number
    return _path(relaxed, target, downsets, best, parent, taken)


def _between(windows: list[Vector], usable: list[Vector], afters: set[int], first: int, end: int) -> Vector:
    """The downsets from ``first`` to before ``end`` that one of these states can use."""
    if len(afters) == 1:
        window = windows[next(iter(afters))]
        return window[np.searchsorted(window, first) : np.searchsorted(window, end)]
    useful = np.zeros(max(0, end - first), dtype=bool)
    for after in afters:
        useful |= usable[after][first:end]
    return first + np.flatnonzero(useful)


class _Pairs:
    """The cost of a stage between two downsets, in one branch."""

    def __init__(self, relaxed: Relaxed, downsets: Downsets, ties: Ties) -> None:
        self._relaxed, self._downsets = relaxed, downsets
        self._ties = ties
        self._written: list[list[tuple[Crossing, int, bool]]] = [[] for _ in range(relaxed.problem.atoms)]
        self._crossing_ns = downsets.crossing_ns
        for number, tensor in enumerate(relaxed.crossings):
            copies = ties.copies(number, tensor)
            self._written[tensor.writer].append((tensor, copies * tensor.time_ns, number in ties.once))
            if copies > 1:
                crosses = downsets.member[tensor.writer] & ~downsets.member[list(tensor.readers)].all(axis=0)
                self._crossing_ns = self._crossing_ns + crosses * (copies - 1) * tensor.time_ns
        self._plain = len(relaxed.problem.kinds) == 1 and relaxed.all_pay
        self._most = max((step.replicas for step in relaxed.lineup.steps), default=1)

    def light(self, index: int, others: Vector, target: int) -> Vector:
        """The downsets that a stage from this one may reach, by a bound that is quick to compute.

        A tensor that crosses one border and not the other is sent or received by the stage between them.
        """
        if not self._plain:
            return others
        downsets = self._downsets
        moving = np.abs(downsets.crossing_ns[others] - downsets.crossing_ns[index])
        load = downsets.compute[0][others] - downsets.compute[0][index] + moving
        kept: Vector = others[load <= target * self._most]
        return kept

    def above(self, index: int, others: Vector) -> Vector:
        """The downsets that contain this one. It is enough that they contain its members without a successor in it."""
        inside = self._downsets.member[:, index]
        needed = np.zeros(len(inside), dtype=bool)
        needed[self._relaxed.edges_from[inside[self._relaxed.edges_to]]] = True
        for atom in np.flatnonzero(inside & ~needed):
            others = others[self._downsets.member[atom, others]]
        return others

    def loads(self, index: int, larger: Vector) -> list[Vector]:
        """For each kind of device, the time of the stages between downset ``index`` and each of some larger ones."""
        relaxed, downsets = self._relaxed, self._downsets
        inside = downsets.member[:, index]
        moving = self._crossing_ns[larger]
        for readers, arrives, sent, once in self._open(inside):
            rows = downsets.member[list(readers)][:, larger]
            some, rest = rows.any(axis=0), ~rows.all(axis=0)
            moving = (
                moving + some * arrives - rest * sent
            )  # a tensor that crosses both borders was sent by another stage
            if once:
                moving[some & rest] = FAR
        held = downsets.held[larger] - downsets.held[index]
        result = []
        for kind, compute in zip(relaxed.problem.kinds, downsets.compute, strict=True):
            load = compute[larger] - compute[index]
            if kind.pays:
                load = np.maximum(load, moving) if relaxed.overlapped else load + moving
            if kind.max_memory_bytes is not None:
                load = np.where(held > kind.max_memory_bytes, FAR, load)
            result.append(np.where(self._broken(inside, larger), FAR, load))
        return result

    def _broken(self, inside: Vector, larger: Vector) -> Vector:
        """Which stages separate atoms that must be together, or hold atoms that must be apart."""
        member = self._downsets.member
        broken = np.zeros(len(larger), dtype=bool)
        for one, other in (*self._relaxed.problem.apart, *self._ties.apart):
            if not inside[one] and not inside[other]:
                broken |= member[one, larger] & member[other, larger]
        for one, other in self._ties.together:
            if not inside[one] and not inside[other]:
                broken |= member[one, larger] ^ member[other, larger]
        return broken

    def _open(self, inside: Vector) -> list[tuple[tuple[int, ...], int, int, bool]]:
        """The tensors that atoms outside a downset still read, grouped by these readers.

        Returns:
            For each group: the readers outside, the cost of receiving, the cost of sending for another stage, and
            whether one stage must hold all readers.
        """
        wanted = np.zeros(len(inside), dtype=bool)
        wanted[self._relaxed.edges_from[~inside[self._relaxed.edges_to]]] = True
        costs_of: dict[tuple[int, ...], tuple[int, int, bool]] = {}
        tensors = [entry for atom in np.flatnonzero(inside & wanted) for entry in self._written[atom]]
        for tensor, sent, once in (*((given, 0, False) for given in self._relaxed.given), *tensors):
            readers = tuple(reader for reader in tensor.readers if not inside[reader])
            if readers:
                before = costs_of.get(readers, (0, 0, False))
                costs_of[readers] = (before[0] + tensor.time_ns, before[1] + sent, before[2] or once)
        return [(readers, *costs) for readers, costs in costs_of.items()]


def _path(
    relaxed: Relaxed, target: int, downsets: Downsets, best: Vector, parent: Vector, taken: Vector
) -> PathResult | None:
    index = len(downsets.work) - 1
    value, state = min((int(best[state, index]), state) for state in relaxed.lineup.final)
    if value > target:
        return None
    stage_of = np.zeros(relaxed.problem.atoms, dtype=np.int64)
    steps: list[StageStep] = []
    while index or state:
        step, before = relaxed.lineup.steps[int(taken[state, index])], int(parent[state, index])
        stage_of[downsets.member[:, index] & ~downsets.member[:, before]] = len(steps)
        steps.append(step)
        index, state = before, step.before
    steps.reverse()
    stages = tuple(len(steps) - 1 - int(stage) for stage in stage_of)
    return PathResult(Partition(stages, relaxed.lineup.devices(relaxed.problem, steps)), value)
