"""Lower bounds on the objective of every partition, found without a search."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, maximum_flow

from onnxsplit.partitioner.lineup import Lineup
from onnxsplit.partitioner.objective import NEVER, Problem, stage_memory
from onnxsplit.partitioner.orders import successors
from onnxsplit.partitioner.relaxed import Capacities, Relaxed, Vector
from onnxsplit.plan import CALLER

_LARGEST_FLOW = 1 << 29  # SciPy's capacities are 32-bit integers
_SURROUNDINGS = 64  # the number of atoms for which a minimum cut is computed, the costliest first


def lower_bound(problem: Problem, lineup: Lineup) -> int:
    """A value that no partition's objective is below: nanoseconds, or bytes for the objective ``memory``."""
    match problem.objective:
        case "throughput":
            bound = throughput_bound(Relaxed(problem, lineup)) if problem.atoms else 0
            return with_overhead(bound, problem, lineup)
        case "latency":
            return latency_bound(problem)
        case "memory":
            return memory_bound(problem, lineup)


def with_overhead(bound_ns: int, problem: Problem, lineup: Lineup) -> int:
    """A lower bound on the bottleneck with the overhead of requests, from one without it, in nanoseconds."""
    if problem.overhead is None or not problem.atoms:
        return bound_ns
    stages = lineup.exact_stages or 1
    work_ns = sum(min(column) for column in zip(*(kind.time_ns for kind in problem.kinds), strict=True))
    work_ns += _least_transfers_ns(problem, stages) if all(kind.pays for kind in problem.kinds) else 0
    most = max(step.replicas for step in lineup.steps)
    return problem.overhead.least_ns(bound_ns, work_ns, stages, most)


def _least_transfers_ns(problem: Problem, stages: int) -> int:
    """The least time that all stages together spend on transfers, in nanoseconds.

    Inputs arrive and outputs leave at least once. Stages whose atoms are connected are connected by tensors: at least
    one for each stage but the first, each received by one stage and sent by another.
    """
    link, caller = problem.cheapest_link, problem.cheapest_caller_link
    least = sum(t.arrival_ns(caller) for t in problem.transfers if t.writer == CALLER and t.readers)
    if not problem.send_once:
        least += sum(t.answer_ns(caller) for t in problem.transfers if t.writer != CALLER and t.to_caller)
    crossing = [transfer for transfer in problem.transfers if transfer.writer != CALLER and transfer.readers]
    connections = csr_array(
        (
            [1] * sum(len(t.readers) for t in crossing),
            ([t.writer for t in crossing for _ in t.readers], [reader for t in crossing for reader in t.readers]),
        ),
        shape=(problem.atoms, problem.atoms),
    )
    parts = int(connected_components(connections, directed=False, return_labels=False))
    ends = 1 if problem.send_once else 2
    return least + ends * max(0, stages - parts) * min((t.arrival_ns(link) for t in crossing), default=0)


def surroundings_bound(relaxed: Relaxed, known: int) -> int:
    """A lower bound on the bottleneck: the largest, over atoms, of the cost of the cheapest stage with the atom.

    A stage that holds an atom pays for the tensors that cross its border; to avoid that, it holds the atoms at the
    other ends and pays for their time. The cheapest such stage is a minimum cut of the network of atoms and tensors.
    One maximum flow is computed for each of at most 64 atoms (Dinic's algorithm, as implemented in SciPy).

    Args:
        relaxed: the relaxed problem.
        known: a bound that is known already, in nanoseconds.

    Returns:
        The larger of the two bounds, in nanoseconds.
    """
    if not relaxed.all_pay:
        return known
    fastest = relaxed.times.min(axis=0) + relaxed.always
    borders = fastest.copy()
    for tensor in relaxed.crossings:
        for atom in (tensor.writer, *tensor.readers):
            borders[atom] += tensor.time_ns
    most = max(step.replicas for step in relaxed.lineup.steps)
    unit = max(1, int(fastest.sum()) // _LARGEST_FLOW + 1)
    network = _border_network(relaxed, fastest // unit, unit)
    for tried, atom in enumerate(np.argsort(-borders, kind="stable")):
        if borders[atom] <= known * most or tried == _SURROUNDINGS:
            break
        cut = int(maximum_flow(network, int(atom), network.shape[0] - 1).flow_value)
        known = max(known, -(-cut * unit // most))
    return known


def _border_network(relaxed: Relaxed, times: Vector, unit: int) -> csr_array:
    """The network of the minimum cuts: a vertex for each atom, two for each tensor, and the sink.

    The vertices on the atom's side of a cut form its stage.
    """
    atoms, tensors = relaxed.problem.atoms, (*relaxed.crossings, *relaxed.given)
    sink = atoms + 2 * len(tensors)
    edges = [(atom, sink, int(time_ns)) for atom, time_ns in enumerate(times)]
    for number, tensor in enumerate(tensors):
        sent, received, cost = atoms + 2 * number, atoms + 2 * number + 1, tensor.time_ns // unit
        writer = sink if tensor.writer == CALLER else tensor.writer
        edges.append((received, writer, cost))
        edges += [(reader, received, _LARGEST_FLOW) for reader in tensor.readers]
        if tensor.writer != CALLER:
            edges.append((tensor.writer, sent, cost))
            edges += [(sent, reader, _LARGEST_FLOW) for reader in tensor.readers]
    rows, columns, capacities = (np.array(column, dtype=np.int32) for column in zip(*edges, strict=True))
    return csr_array((capacities, (rows, columns)), shape=(sink + 1, sink + 1))


def throughput_bound(relaxed: Relaxed) -> int:
    """A lower bound on the bottleneck, in nanoseconds.

    It assumes that work is divided freely over the devices, that every stage receives and sends one tensor, and that
    no stage is faster than the slowest atom. A binary search finds the smallest bottleneck for which that is enough.
    """
    fastest = relaxed.times.min(axis=0) + (relaxed.always if relaxed.all_pay else 0)
    most = max(step.replicas for step in relaxed.lineup.steps)
    least = -(-(int(fastest.max()) + relaxed.receives) // most)
    low, high = least, max(least, 1)
    while not _enough(relaxed, high):
        low, high = high + 1, 2 * high
        if high >= NEVER:
            return high
    while low < high:
        middle = (low + high) // 2
        if _enough(relaxed, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _enough(relaxed: Relaxed, target: int) -> bool:
    """Whether the devices can do all work within the target."""
    capacities = Capacities(relaxed, target)
    return bool(max(capacities.before[state] for state in relaxed.lineup.final) + 0.5 >= relaxed.total)


def latency_bound(problem: Problem) -> int:
    """A lower bound on the latency: the longest path of atoms, each on its fastest device. Takes linear time."""
    fastest = [min(column) for column in zip(*(kind.time_ns for kind in problem.kinds), strict=True)]
    done = [0] * problem.atoms
    for atom, readers in enumerate(successors(problem)):
        done[atom] += fastest[atom]
        for reader in readers:
            done[reader] = max(done[reader], done[atom])
    return max(done, default=0)


def memory_bound(problem: Problem, lineup: Lineup) -> int:
    """A lower bound on the largest memory of a stage, in bytes.

    It is the larger of an equal share of all constants and the largest memory of a single atom.
    """
    alone = stage_memory(problem, range(problem.atoms), problem.atoms)
    return max(
        -(-sum(weight.size_bytes for weight in problem.weights) // max(1, lineup.most_stages)), max(alone, default=0)
    )
