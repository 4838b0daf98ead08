"""Lower bounds that need no search: what no partition can beat."""

from __future__ import annotations

from onnxsplit.partitioner.lineup import Lineup
from onnxsplit.partitioner.objective import NEVER, Problem, stage_memory
from onnxsplit.partitioner.orders import successors
from onnxsplit.partitioner.relaxed import Capacities, Relaxed


def lower_bound(problem: Problem, lineup: Lineup) -> int:
    """No partition has a smaller value of the objective."""
    match problem.objective:
        case "throughput":
            return throughput_bound(Relaxed(problem, lineup)) if problem.atoms else 0
        case "latency":
            return latency_bound(problem)
        case "memory":
            return memory_bound(problem, lineup)


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
