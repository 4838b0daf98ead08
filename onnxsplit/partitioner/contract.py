"""Contraction: merge atoms that take no time into neighbours without changing the optimal bottleneck.

Many atoms take no time: ops that are fused into others, or that only rename their input. An atom without time may be
merged, without any stage paying more, in three cases:

- It is the only reader of its inputs, which all come from one atom: it joins that atom if transferring its outputs
  costs at most as much as transferring its inputs, or if it has no outputs.
- One atom alone reads its outputs: it joins that atom if its inputs cost at most as much as its outputs.
- It reads nothing: it joins the first of its readers, if all other readers come after that one in any case.

If a sender pays for every stage that a tensor goes to, the tensors that are sent instead must have one reader.
A merge can empty a stage that did nothing, so an optimum for K stages may become one for fewer stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from networkx.utils import UnionFind

from onnxsplit.cluster import Link
from onnxsplit.partitioner.objective import Partition, Problem, Transfer, Weight
from onnxsplit.partitioner.orders import successors
from onnxsplit.plan import CALLER


@dataclass(frozen=True)
class Contracted:
    """A problem with merged atoms.

    Attributes:
        problem: the smaller problem.
        atom_of: for each atom of the original problem, its atom in the smaller one.
    """

    problem: Problem
    atom_of: tuple[int, ...]

    def expanded(self, partition: Partition) -> Partition:
        """Turn a partition of the smaller problem into one of the original problem."""
        return Partition(tuple(partition.stage_of[atom] for atom in self.atom_of), partition.devices)


def contract(problem: Problem) -> Contracted:
    """Merge atoms until nothing more can be merged. Each pass is linear in the graph; a few passes are enough."""
    whole = Contracted(problem, tuple(range(problem.atoms)))
    while True:
        smaller = _contracted(whole.problem)
        if smaller.problem.atoms == whole.problem.atoms:
            return whole
        whole = Contracted(smaller.problem, tuple(smaller.atom_of[atom] for atom in whole.atom_of))


def _contracted(problem: Problem) -> Contracted:
    """Merge atoms in one pass forwards and one pass backwards."""
    links = _compared_links(problem)
    takes: list[list[Transfer]] = [[] for _ in range(problem.atoms)]
    gives: list[list[Transfer]] = [[] for _ in range(problem.atoms)]
    for transfer in problem.transfers:
        for reader in transfer.readers:
            takes[reader].append(transfer)
        if transfer.writer != CALLER:
            gives[transfer.writer].append(transfer)
    free = _free_atoms(problem)
    groups = UnionFind(range(problem.atoms))

    def cheaper(some: Sequence[Transfer], others: Sequence[Transfer]) -> bool:
        """Whether some tensors cost at most as much as others."""
        return all(_cost(problem, some, link) <= _cost(problem, others, link) for link in links)

    moved = set()
    for atom in range(problem.atoms):
        writers = {transfer.writer for transfer in takes[atom]}
        if atom in free and len(writers) == 1 and CALLER not in writers:
            alone = all(transfer.readers == (atom,) and not transfer.to_caller for transfer in takes[atom])
            alone = alone and (problem.send_once or all(len(transfer.readers) == 1 for transfer in gives[atom]))
            stays = not any(f.to_caller for f in gives[atom])
            if not gives[atom] or (alone and stays and cheaper(gives[atom], takes[atom])):
                groups.union(writers.pop(), atom)
                moved.add(atom)
    following = successors(problem)
    for atom in sorted(free - moved, reverse=True):
        readers = following[atom]
        if not readers or readers[0] in moved or any(f.to_caller for f in gives[atom]):
            continue
        if not problem.send_once and any(f.writer != CALLER and len(f.readers) > 1 for f in takes[atom]):
            continue
        if cheaper(takes[atom], gives[atom]) if len(readers) == 1 else not takes[atom] and _first(following, readers):
            groups.union(readers[0], atom)
            moved |= {atom, readers[0]}
    return _merged(problem, groups)


def _compared_links(problem: Problem) -> set[Link]:
    """The links over which costs of transfers are compared: the cheapest one if all tensors cross in one form."""
    if not any(transfer.ways for transfer in problem.transfers):
        return {problem.cheapest_link}
    return {problem.cheapest_link, problem.link, *problem.links.values()}


def _cost(problem: Problem, transfers: Sequence[Transfer], link: Link) -> int:
    """Nanoseconds that each end of a link between stages pays for some tensors."""
    return sum(f.arrival_ns(problem.cheapest_caller_link if f.writer == CALLER else link) for f in transfers)


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
    """Atoms that take no time on any device, hold no limited memory, and need not be apart from another atom."""
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
    """The position of each group in a topological order of the groups."""
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
