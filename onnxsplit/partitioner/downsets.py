"""List the downsets that can occur between two stages when no stage may take longer than a target.

A *downset* is a set of atoms that contains all ancestors of its members. In a partition without cycles, the atoms of
the first k stages form a downset for every k. A graph can have far too many downsets, but for a target B of the
bottleneck most cannot occur: the atoms in a downset I must fit on the devices used so far, the other atoms must fit on
the remaining devices, and both sides pay for the tensors that cross:

    work(I) + crossing(I) <= B x devices used        work(rest) + crossing(I) <= B x devices left

So downsets are built atom by atom in a topological order (the atom is in or out), and a downset is dropped as soon as
the atoms decided so far violate this for every state.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxsplit.partitioner.relaxed import FAR, Capacities, Crossing, Relaxed, Vector


class TooMany(Exception):
    """The search ended without a proof: there are more downsets than allowed, or the time limit is reached."""


class Downsets:
    """Downsets in ascending order of their work, and of their size if their work is equal.

    Attributes:
        member: whether an atom is in a downset; a matrix of atoms by downsets.
        work: work of the atoms in each downset.
        compute: for each kind of devices, time of the atoms in each downset in nanoseconds, with the transfers that an
            atom pays for wherever it is.
        crossing_ns: transfer time of the tensors that are written inside each downset and read outside.
        crossings: number of these tensors for each downset.
        held: bytes of the constants that a single atom in each downset reads.
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
    """For each downset, the sum of a value over its atoms, without a copy of the matrix as integers."""
    total = np.zeros(member.shape[1], dtype=np.int64)
    for atom in np.flatnonzero(values):
        total += member[atom] * values[atom]
    return total


def list_downsets(relaxed: Relaxed, capacities: Capacities, most: int, stop: Callable[[], bool]) -> Downsets:
    """List every downset that some state can use, and possibly a few more. O(d n) for d downsets and n atoms.

    Args:
        relaxed: the relaxed problem.
        capacities: what the devices can do within the target.
        most: the largest number of downsets to hold at once.
        stop: called regularly; returns True to end the search.

    Raises:
        TooMany: there are more downsets than ``most``, or ``stop`` returned True.
    """
    count = relaxed.problem.atoms
    bits = np.zeros((1, -(-count // 8)), dtype=np.uint8)
    work = np.zeros(1, dtype=np.int64)
    highest = np.full(1, relaxed.total, dtype=np.int64)  # the most work that a downset can still reach
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
        # the atom is out: a tensor crosses now, unless it did before
        for tensor in reads[atom] if relaxed.all_pay else ():
            crosses = has(tensor.writer)
            for reader in tensor.readers:
                if reader < atom:
                    crosses = crosses & has(reader)
            crossing_ns_out, crossings_out = crossing_ns_out + crosses * tensor.time_ns, crossings_out + crosses
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
    """For each atom, its work and that of all its descendants."""
    count = relaxed.problem.atoms
    later = np.zeros((count, -(-count // 8)), dtype=np.uint8)
    result = np.zeros(count, dtype=np.int64)
    for atom in range(count - 1, -1, -1):
        later[atom, atom >> 3] |= 1 << (atom & 7)
        for successor in relaxed.successors[atom]:
            later[atom] |= later[successor]
        result[atom] = relaxed.work[np.unpackbits(later[atom], count=count, bitorder="little").view(bool)].sum()
    return result
