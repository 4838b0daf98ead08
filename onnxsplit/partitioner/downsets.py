"""The downsets that a target leaves, listed.

The stages of a partition without cycles, taken in order, fill up *downsets*: sets that hold all ancestors of their
members. A graph can have far too many of them; but with a target B for the bottleneck most are of no use. What is in a
downset I must fit the devices used so far, what is left out must fit the others, and both pay for what crosses:

    work(I) + crossing(I) <= B x devices used        work(rest) + crossing(I) <= B x devices left

So downsets are listed atom by atom in a topological order (in or out), and dropped as soon as what is decided breaks
this for every state.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxsplit.partitioner.relaxed import FAR, Capacities, Crossing, Relaxed, Vector


class TooMany(Exception):
    """There are more downsets than were allowed, or the time is over."""


class Downsets:
    """Downsets in order of their work, smaller ones first where work is equal.

    Attributes:
        member: by atom and downset.
        work: by downset.
        compute: by kind and downset, with what is paid wherever an atom is.
        crossing_ns: by downset, tensors written inside and read outside.
        crossings: how many they are.
        held: by downset, constants that one atom alone reads.
    """

    def __init__(self, relaxed: Relaxed, member: Vector) -> None:
        work = _sums(member, relaxed.work)
        order = np.lexsort((member.sum(axis=0), work))
        self.member: Vector = np.ascontiguousarray(member[:, order])
        self.work: Vector = work[order]
        self.compute = [
            _sums(self.member, np.minimum(row, FAR >> 20) + relaxed.always * kind.pays)
            for row, kind in zip(relaxed.times, relaxed.problem.kinds, strict=True)
        ]
        self.crossing_ns: Vector = np.zeros(len(work), dtype=np.int64)
        self.crossings: Vector = np.zeros(len(work), dtype=np.int64)
        for tensor in relaxed.crossings:
            crosses = self.member[tensor.writer] & ~self.member[list(tensor.readers)].all(axis=0)
            self.crossing_ns += crosses * tensor.time_ns
            self.crossings += crosses
        held = np.zeros(relaxed.problem.atoms, dtype=np.int64)
        for weight in relaxed.problem.weights:
            if len(weight.readers) == 1:
                held[weight.readers[0]] += weight.size_bytes
        self.held: Vector = _sums(self.member, held)


def _sums(member: Vector, values: Vector) -> Vector:
    """By downset, the sum over its atoms; exact, without a copy of all members as integers."""
    total = np.zeros(member.shape[1], dtype=np.int64)
    for atom in np.flatnonzero(values):
        total += member[atom] * values[atom]
    return total


def list_downsets(relaxed: Relaxed, capacities: Capacities, most: int, stop: Callable[[], bool]) -> Downsets:
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

    def has(atom: int) -> Vector:
        inside: Vector = (bits[:, atom >> 3] >> (atom & 7)) & 1 == 1
        return inside

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
    return Downsets(relaxed, np.unpackbits(bits, axis=1, count=count, bitorder="little").T.astype(bool))


def _work_of_descendants(relaxed: Relaxed) -> Vector:
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
