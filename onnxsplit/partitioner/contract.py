"""Fewer atoms, the same optimum: atoms that take no time go where they cannot do harm.

Many atoms cost nothing: ops that are fused into others, or that only rename their input. For the bottleneck,

- an atom that alone reads what it reads, all from one other atom, may move to that atom, if what it gives is no dearer
  to move than what it takes (and always if it gives nothing): no stage pays more;
- an atom whose outputs one other atom alone reads may move to that, if what it takes is no dearer than what it gives;
- an atom that takes nothing may move to the first of its readers, if the others come after that one anyway.

Where a tensor is paid for each stage it is sent to, the tensors that are sent instead must have one reader.
Such a move can only empty a stage that did nothing, so an optimum for K stages may become one for fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from networkx.utils import UnionFind

from onnxsplit.partitioner.objective import Partition, Problem, Transfer, Weight
from onnxsplit.partitioner.orders import successors
from onnxsplit.plan import CALLER


@dataclass(frozen=True)
class Contracted:
    """A smaller problem.

    Attributes:
        problem: it.
        atom_of: by atom of the problem it was made from, its atom here.
    """

    problem: Problem
    atom_of: tuple[int, ...]

    def expanded(self, partition: Partition) -> Partition:
        """A partition of this problem as one of the problem it was made from."""
        return Partition(tuple(partition.stage_of[atom] for atom in self.atom_of), partition.devices)


def contract(problem: Problem) -> Contracted:
    """Merge until nothing more can be; linear in the graph for each of a few passes."""
    whole = Contracted(problem, tuple(range(problem.atoms)))
    while True:
        smaller = _contracted(whole.problem)
        if smaller.problem.atoms == whole.problem.atoms:
            return whole
        whole = Contracted(smaller.problem, tuple(smaller.atom_of[atom] for atom in whole.atom_of))


def _contracted(problem: Problem) -> Contracted:
    """One pass along the atoms and one back."""
    link = problem.cheapest_link
    takes: list[list[Transfer]] = [[] for _ in range(problem.atoms)]
    gives: list[list[Transfer]] = [[] for _ in range(problem.atoms)]
    for transfer in problem.transfers:
        for reader in transfer.readers:
            takes[reader].append(transfer)
        if transfer.writer != CALLER:
            gives[transfer.writer].append(transfer)
    free = _free_atoms(problem)
    groups = UnionFind(range(problem.atoms))

    def cost(transfers: Sequence[Transfer]) -> int:
        return sum(
            (problem.cheapest_caller_link if f.writer == CALLER else link).transfer_ns(f.size_bytes) for f in transfers
        )

    moved = set()
    for atom in range(problem.atoms):
        writers = {transfer.writer for transfer in takes[atom]}
        if atom in free and len(writers) == 1 and CALLER not in writers:
            alone = all(transfer.readers == (atom,) and not transfer.to_caller for transfer in takes[atom])
            alone = alone and (problem.send_once or all(len(transfer.readers) == 1 for transfer in gives[atom]))
            cheaper = not any(f.to_caller for f in gives[atom]) and cost(gives[atom]) <= cost(takes[atom])
            if not gives[atom] or (alone and cheaper):
                groups.union(writers.pop(), atom)
                moved.add(atom)
    following = successors(problem)
    for atom in sorted(free - moved, reverse=True):
        readers = following[atom]
        if not readers or readers[0] in moved or any(f.to_caller for f in gives[atom]):
            continue
        if not problem.send_once and any(f.writer != CALLER and len(f.readers) > 1 for f in takes[atom]):
            continue
        if (
            cost(takes[atom]) <= cost(gives[atom])
            if len(readers) == 1
            else not takes[atom] and _first(following, readers)
        ):
            groups.union(readers[0], atom)
            moved |= {atom, readers[0]}
    return _merged(problem, groups)


def _first(following: Sequence[Sequence[int]], readers: Sequence[int]) -> bool:
    """Whether the first of some atoms, in order, is an ancestor of all others."""
    missing, pending, seen = set(readers[1:]), [readers[0]], {readers[0]}
    while missing and pending:
        for other in following[pending.pop()]:
            if other not in seen and other <= readers[-1]:
                seen.add(other)
                missing.discard(other)
                pending.append(other)
    return not missing


def _free_atoms(problem: Problem) -> set[int]:
    """Atoms that take no time anywhere, hold nothing, and need not be away from any other."""
    free = {
        atom for atom, times in enumerate(zip(*(kind.time_ns for kind in problem.kinds), strict=True)) if not any(times)
    }
    if problem.capped:
        free -= {reader for weight in problem.weights for reader in weight.readers}
    return free - {atom for pair in problem.apart for atom in pair}


def _merged(problem: Problem, groups: UnionFind) -> Contracted:
    members: dict[int, list[int]] = {}
    for atom in range(problem.atoms):
        members.setdefault(groups[atom], []).append(atom)
    position = _topological(problem, groups, list(members))
    atom_of = tuple(position[groups[atom]] for atom in range(problem.atoms))
    count = len(members)

    def summed(values: Sequence[int]) -> tuple[int, ...]:
        result = [0] * count
        for atom, value in enumerate(values):
            result[atom_of[atom]] += value
        return tuple(result)

    transfers = []
    for transfer in problem.transfers:
        writer = CALLER if transfer.writer == CALLER else atom_of[transfer.writer]
        readers = tuple(sorted({atom_of[reader] for reader in transfer.readers} - {writer}))
        if readers or transfer.to_caller:
            transfers.append(replace(transfer, writer=writer, readers=readers))
    smaller = replace(
        problem,
        kinds=tuple(replace(kind, time_ns=summed(kind.time_ns)) for kind in problem.kinds),
        transfers=tuple(transfers),
        weights=tuple(
            Weight(weight.size_bytes, tuple(sorted({atom_of[reader] for reader in weight.readers})))
            for weight in problem.weights
        ),
        inner_bytes=summed(problem.inner_bytes) if problem.inner_bytes else (),
        apart=tuple((atom_of[one], atom_of[other]) for one, other in problem.apart),
    )
    return Contracted(smaller, atom_of)


def _topological(problem: Problem, groups: UnionFind, roots: Sequence[int]) -> dict[int, int]:
    """Where each group comes, in an order in which tensors flow forwards."""
    following: dict[int, set[int]] = {root: set() for root in roots}
    waiting = dict.fromkeys(roots, 0)
    for transfer in problem.transfers:
        for reader in transfer.readers if transfer.writer != CALLER else ():
            one, other = groups[transfer.writer], groups[reader]
            if one != other and other not in following[one]:
                following[one].add(other)
                waiting[other] += 1
    ready = [root for root in reversed(roots) if not waiting[root]]
    position: dict[int, int] = {}
    while ready:
        root = ready.pop()
        position[root] = len(position)
        for other in sorted(following[root], reverse=True):
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    return position
