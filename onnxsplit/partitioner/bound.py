"""Lower bounds that need no search for a partition: what none can beat."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from onnxsplit.partitioner.lineup import Lineup
from onnxsplit.partitioner.objective import NEVER, Problem, stage_memory
from onnxsplit.partitioner.orders import successors
from onnxsplit.partitioner.relaxed import Capacities, Relaxed, Vector
from onnxsplit.plan import CALLER

_LARGEST_FLOW = 1 << 29  # capacities are 32-bit numbers
_SURROUNDINGS = 64  # atoms, those with the most to pay first


def lower_bound(problem: Problem, lineup: Lineup) -> int:
    """No partition has a smaller value of the objective."""
    match problem.objective:
        case "throughput":
            return throughput_bound(Relaxed(problem, lineup)) if problem.atoms else 0
        case "latency":
            return latency_bound(problem)
        case "memory":
            return memory_bound(problem, lineup)


def surroundings_bound(relaxed: Relaxed, known: int) -> int:
    """No bottleneck is smaller than the cheapest stage around any one atom; ``known`` is a bound there is already.

    A stage that holds an atom pays for the tensors on its border, or takes their other ends in and pays for those.
    The cheapest such set is a minimum cut: atoms cost their time inside, tensors their transfer where they cross.
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
    """Atoms, two vertices a tensor, and the sink: what is not cut off from an atom is in its stage."""
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
    """No bottleneck is smaller: every device does its share and pays for a tensor each way; no atom is parted."""
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
    capacities = Capacities(relaxed, target)
    return bool(max(capacities.before[state] for state in relaxed.lineup.final) + 0.5 >= relaxed.total)


def latency_bound(problem: Problem) -> int:
    """No request is faster: the longest path of atoms, each on the fastest device."""
    fastest = [min(column) for column in zip(*(kind.time_ns for kind in problem.kinds), strict=True)]
    done = [0] * problem.atoms
    for atom, readers in enumerate(successors(problem)):
        done[atom] += fastest[atom]
        for reader in readers:
            done[reader] = max(done[reader], done[atom])
    return max(done, default=0)


def memory_bound(problem: Problem, lineup: Lineup) -> int:
    """No largest need of memory is smaller: an equal share of the constants; an atom with its own constants."""
    alone = stage_memory(problem, range(problem.atoms), problem.atoms)
    return max(
        -(-sum(weight.size_bytes for weight in problem.weights) // max(1, lineup.most_stages)), max(alone, default=0)
    )
