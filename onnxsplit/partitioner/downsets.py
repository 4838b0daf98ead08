"""Exact search over downsets, for a target: the best partition not above it, or the proof that there is none.

The stages of a partition without cycles, taken in order, fill up *downsets*: sets that hold all ancestors of their
members. A path through downsets is therefore any partition there is, and not only the slicing of one order. A graph can
have far too many of them; but with a target B for the bottleneck most are of no use. What is left of a downset I after
the devices of a state must fit those devices, what is left out must fit the others, and both pay for what crosses:

    work(I) + crossing(I) <= B x devices used        work(rest) + crossing(I) <= B x devices left

So downsets are listed atom by atom in a topological order (in or out), and dropped as soon as what is decided breaks
this for every state. Then one pass of dynamic programming over pairs of downsets gives the exact optimum
(Tarnawski et al., NeurIPS 2020, do this over all downsets). A small target leaves few downsets, so a lower bound can be
proven where the optimum cannot be found.

The search is exact for the :class:`~onnxsplit.partitioner.relaxed.Relaxed` problem. Its best value is a lower bound
whatever happens; whether the partition found is as good is for :func:`~onnxsplit.partitioner.objective.score` to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxsplit.partitioner.lineup import Step
from onnxsplit.partitioner.objective import CALLER, Partition
from onnxsplit.partitioner.relaxed import FAR, Array, Capacities, Crossing, Relaxed


class TooMany(Exception):
    """There are more downsets than were allowed, or the time is over."""


@dataclass(frozen=True)
class Found:
    """The best partition of the relaxed problem, and its value: no partition has a smaller bottleneck."""

    partition: Partition
    value: int


def search_downsets(
    relaxed: Relaxed,
    target: int,
    *,
    most: int = 100_000,
    stop: Callable[[], bool] = lambda: False,
) -> Found | None:
    """The best partition whose bottleneck is at most ``target``; None when there is provably none.

    Time is O(d n) to list d downsets of n atoms and O(d c) to choose, for c the downsets within one stage of another.

    Args:
        relaxed: atoms, devices and their order.
        target: nanoseconds.
        most: downsets to hold at once.
        stop: asked from time to time whether to give up.

    Raises:
        TooMany: nothing was proven.
    """
    capacities = Capacities(relaxed, target)
    return _choose(relaxed, capacities, _list_downsets(relaxed, capacities, most, stop), stop)


class _Downsets:
    """Downsets in order of their work, smaller ones first where work is equal.

    Attributes:
        member: by atom and downset.
        work: by downset.
        compute: by kind and downset, with what is paid wherever an atom is.
        crossing_ns: by downset, tensors written inside and read outside.
        crossings: how many they are.
        held: by downset, constants that one atom alone reads.
    """

    def __init__(self, relaxed: Relaxed, member: Array) -> None:
        work = _sums(member, relaxed.work)
        order = np.lexsort((member.sum(axis=0), work))
        self.member: Array = np.ascontiguousarray(member[:, order])
        self.work: Array = work[order]
        self.compute = [
            _sums(self.member, np.minimum(row, FAR >> 20) + relaxed.always * kind.pays)
            for row, kind in zip(relaxed.times, relaxed.problem.kinds, strict=True)
        ]
        self.crossing_ns: Array = np.zeros(len(work), dtype=np.int64)
        self.crossings: Array = np.zeros(len(work), dtype=np.int64)
        for tensor in relaxed.crossings:
            crosses = self.member[tensor.writer] & ~self.member[list(tensor.readers)].all(axis=0)
            self.crossing_ns += crosses * tensor.time_ns
            self.crossings += crosses
        held = np.zeros(relaxed.problem.atoms, dtype=np.int64)
        for weight in relaxed.problem.weights:
            if len(weight.readers) == 1:
                held[weight.readers[0]] += weight.size_bytes
        self.held: Array = _sums(self.member, held)


def _sums(member: Array, values: Array) -> Array:
    """By downset, the sum over its atoms; exact, without a copy of all members as integers."""
    total = np.zeros(member.shape[1], dtype=np.int64)
    for atom in np.flatnonzero(values):
        total += member[atom] * values[atom]
    return total


def _list_downsets(relaxed: Relaxed, capacities: Capacities, most: int, stop: Callable[[], bool]) -> _Downsets:
    """Every downset that some state can use, and perhaps a few more."""
    count = relaxed.problem.atoms
    bits = np.zeros((1, -(-count // 8)), dtype=np.uint8)
    work = np.zeros(1, dtype=np.int64)
    highest = np.full(1, relaxed.total, dtype=np.int64)  # what the final work can be at most
    crossing_ns = np.zeros(1, dtype=np.int64)
    crossings = np.zeros(1, dtype=np.int64)
    later = _work_of_descendants(relaxed)
    reads: list[list[Crossing]] = [[] for _ in range(count)]
    for tensor in relaxed.crossings:
        for reader in tensor.readers:
            reads[reader].append(tensor)

    def has(atom: int) -> Array:
        found: Array = (bits[:, atom >> 3] >> (atom & 7)) & 1 == 1
        return found

    for atom in range(count):
        ready = np.ones(len(bits), dtype=bool)
        for predecessor in relaxed.predecessors[atom]:
            ready &= has(predecessor)
        crossing_ns_out, crossings_out = crossing_ns, crossings
        for tensor in reads[atom] if relaxed.all_pay else ():  # out: it crosses, unless an earlier reader made it cross
            fresh = has(tensor.writer)
            for reader in tensor.readers:
                if reader < atom:
                    fresh = fresh & has(reader)
            crossing_ns_out, crossings_out = crossing_ns_out + fresh * tensor.time_ns, crossings_out + fresh
        inside = bits[ready]
        inside[:, atom >> 3] |= 1 << (atom & 7)
        work = np.concatenate((work, work[ready] + relaxed.work[atom]))
        highest = np.concatenate((np.minimum(highest, relaxed.total - later[atom]), highest[ready]))
        crossing_ns = np.concatenate((crossing_ns_out, crossing_ns[ready]))
        crossings = np.concatenate((crossings_out, crossings[ready]))
        bits = np.concatenate((bits, inside))
        useful = np.zeros(len(bits), dtype=bool)
        for state in range(relaxed.lineup.states):
            useful |= capacities.usable(state, work, highest, crossing_ns, crossings)
        if not useful.all():
            bits, work, highest = bits[useful], work[useful], highest[useful]
            crossing_ns, crossings = crossing_ns[useful], crossings[useful]
        if len(bits) > most or (atom % 16 == 0 and stop()):
            raise TooMany
    return _Downsets(relaxed, np.unpackbits(bits, axis=1, count=count, bitorder="little").T.astype(bool))


def _work_of_descendants(relaxed: Relaxed) -> Array:
    """By atom, its work and that of all that needs it."""
    count = relaxed.problem.atoms
    later = np.zeros((count, -(-count // 8)), dtype=np.uint8)
    result = np.zeros(count, dtype=np.int64)
    for atom in range(count - 1, -1, -1):
        later[atom, atom >> 3] |= 1 << (atom & 7)
        for successor in relaxed.successors[atom]:
            later[atom] |= later[successor]
        result[atom] = relaxed.work[np.unpackbits(later[atom], count=count, bitorder="little").view(bool)].sum()
    return result


def _choose(relaxed: Relaxed, capacities: Capacities, downsets: _Downsets, stop: Callable[[], bool]) -> Found | None:
    """The best path through downsets."""
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
    following: list[list[tuple[int, Step]]] = [[] for _ in range(states)]
    for number, step in enumerate(relaxed.lineup.steps):
        following[step.before].append((number, step))
    reach = [
        downsets.work.searchsorted(
            downsets.work + max((capacities.most(s) for _, s in steps), default=0.0) + 0.5, "right"
        )
        for steps in following
    ]
    pairs = _Pairs(relaxed, downsets)
    for index in range(count - 1):
        active = [state for state in range(states) if best[state, index] <= capacities.target and following[state]]
        if not active:
            continue
        if index % 64 == 0 and stop():
            raise TooMany
        end = max(int(reach[state][index]) for state in active)
        useful = np.zeros(max(0, end - index - 1), dtype=bool)
        for after in {step.after for state in active for _, step in following[state]}:
            useful |= usable[after][index + 1 : end]
        chosen = pairs.above(index, index + 1 + np.flatnonzero(useful))
        if not len(chosen):
            continue
        loads = pairs.loads(index, chosen)
        for state in active:
            for number, step in following[state]:
                load = loads[step.kind]
                value = np.maximum(load if step.replicas == 1 else -(-load // step.replicas), best[state, index])
                better = (value < best[step.after, chosen]) & (value <= capacities.target) & usable[step.after][chosen]
                where = chosen[better]
                best[step.after, where] = value[better]
                parent[step.after, where] = index
                taken[step.after, where] = number
    return _path(relaxed, capacities.target, downsets, best, parent, taken)


class _Pairs:
    """What a stage between two downsets costs."""

    def __init__(self, relaxed: Relaxed, downsets: _Downsets) -> None:
        self._relaxed, self._downsets = relaxed, downsets
        self._written: list[list[Crossing]] = [[] for _ in range(relaxed.problem.atoms)]
        for tensor in relaxed.crossings:
            self._written[tensor.writer].append(tensor)

    def above(self, index: int, others: Array) -> Array:
        """Those of some downsets that hold all of one: they hold its members that no other member needs."""
        inside = self._downsets.member[:, index]
        needed = np.zeros(len(inside), dtype=bool)
        needed[self._relaxed.edges_from[inside[self._relaxed.edges_to]]] = True
        for atom in np.flatnonzero(inside & ~needed):
            others = others[self._downsets.member[atom, others]]
        return others

    def loads(self, index: int, larger: Array) -> list[Array]:
        """By kind, the cost of the stages between downset ``index`` and each of some larger ones."""
        relaxed, downsets = self._relaxed, self._downsets
        inside = downsets.member[:, index]
        moving = downsets.crossing_ns[larger]
        for tensor in self._open(inside):
            rows = downsets.member[[reader for reader in tensor.readers if not inside[reader]]][:, larger]
            moving = moving + rows.any(axis=0) * tensor.time_ns  # some reader is in the stage: it arrives
            if tensor.writer != CALLER:  # it crosses the larger border, too, but another stage sent it
                moving -= ~rows.all(axis=0) * tensor.time_ns
        held = downsets.held[larger] - downsets.held[index]
        result = []
        for kind, compute in zip(relaxed.problem.kinds, downsets.compute, strict=True):
            load = compute[larger] - compute[index]
            if kind.pays:
                load = np.maximum(load, moving) if relaxed.overlapped else load + moving
            if kind.max_memory_bytes is not None:
                load = np.where(held > kind.max_memory_bytes, FAR, load)
            for one, other in relaxed.problem.apart:
                if not inside[one] and not inside[other]:
                    load = np.where(downsets.member[one, larger] & downsets.member[other, larger], FAR, load)
            result.append(load)
        return result

    def _open(self, inside: Array) -> list[Crossing]:
        """Tensors at hand for what is not in a downset, and wanted there."""
        wanted = np.zeros(len(inside), dtype=bool)
        wanted[self._relaxed.edges_from[~inside[self._relaxed.edges_to]]] = True
        found = [tensor for atom in np.flatnonzero(inside & wanted) for tensor in self._written[atom]]
        return [t for t in (*self._relaxed.given, *found) if not all(inside[reader] for reader in t.readers)]


def _path(relaxed: Relaxed, target: int, downsets: _Downsets, best: Array, parent: Array, taken: Array) -> Found | None:
    index = len(downsets.work) - 1
    value, state = min((int(best[state, index]), state) for state in relaxed.lineup.final)
    if value > target:
        return None
    stage_of = np.zeros(relaxed.problem.atoms, dtype=np.int64)
    steps: list[Step] = []
    while index or state:
        step, before = relaxed.lineup.steps[int(taken[state, index])], int(parent[state, index])
        stage_of[downsets.member[:, index] & ~downsets.member[:, before]] = len(steps)
        steps.append(step)
        index, state = before, step.before
    steps.reverse()
    stages = tuple(len(steps) - 1 - int(stage) for stage in stage_of)
    return Found(Partition(stages, relaxed.lineup.devices(relaxed.problem, steps)), value)
