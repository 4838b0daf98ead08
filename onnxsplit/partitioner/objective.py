"""What makes a partition good: the problem an algorithm sees, and the one score all of them are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CALLER = -1
"""Stands for the caller where an atom is expected: the writer of the model's inputs."""

Assignment = tuple[int, ...]
"""The stage of every atom."""


@dataclass(frozen=True)
class Transfer:
    """A tensor that may have to cross.

    Attributes:
        writer: the atom that writes it, or :data:`CALLER`.
        readers: atoms that read it, ascending, without the writer.
        time_ns: what one crossing costs the stage that sends it and, likewise, the stage that receives it.
        to_caller: True when it also goes to the caller, wherever its writer is.
        size_bytes: what it takes in the memory of a stage that writes or reads it.
    """

    writer: int
    readers: tuple[int, ...]
    time_ns: int
    to_caller: bool = False
    size_bytes: int = 0


@dataclass(frozen=True)
class Weight:
    """A constant: every stage with one of its readers holds it once."""

    size_bytes: int
    readers: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A graph of atoms in topological order.

    Attributes:
        time_ns: compute time of every atom.
        transfers: tensors between atoms; every reader's index is greater than its writer's.
        weights: constants.
        inner_bytes: by atom, tensors that never leave it.
        max_memory_bytes: no stage may need more; None for no limit.
    """

    time_ns: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    weights: tuple[Weight, ...] = ()
    inner_bytes: tuple[int, ...] = ()
    max_memory_bytes: int | None = None


class Infeasible(Exception):
    """No partition keeps every stage within the memory allowed."""


@dataclass(frozen=True)
class Score:
    """A partition's figures, in nanoseconds.

    Attributes:
        compute_ns: by stage.
        transfer_ns: by stage, sent and received.
        latency_ns: of one request: the longest path over the stages.
    """

    compute_ns: tuple[int, ...]
    transfer_ns: tuple[int, ...]
    latency_ns: int

    @property
    def stage_ns(self) -> tuple[int, ...]:
        """Compute and transfers by stage."""
        return tuple(c + t for c, t in zip(self.compute_ns, self.transfer_ns, strict=True))

    @property
    def bottleneck_ns(self) -> int:
        """The slowest stage: with all stages busy, one request leaves in this time."""
        return max(self.stage_ns, default=0)


def score(problem: Problem, assignment: Sequence[int]) -> Score:
    """Score a partition. A tensor is sent once to every stage that reads it; sender and receiver both pay.

    The stages of an assignment are numbered in topological order: no tensor flows to a lower stage.
    """
    stages = max(assignment, default=-1) + 1
    compute, transfer = [0] * stages, [0] * stages
    sources: list[set[int]] = [set() for _ in range(stages)]
    for atom, time_ns in enumerate(problem.time_ns):
        compute[assignment[atom]] += time_ns
    for flow in problem.transfers:
        home = None if flow.writer == CALLER else assignment[flow.writer]
        for stage in {assignment[reader] for reader in flow.readers} - {home}:
            transfer[stage] += flow.time_ns
            if home is not None:
                transfer[home] += flow.time_ns
                sources[stage].add(home)
        if flow.to_caller and home is not None:
            transfer[home] += flow.time_ns
    done = [0] * stages
    for stage in range(stages):
        start = max((done[source] for source in sources[stage]), default=0)
        done[stage] = start + compute[stage] + transfer[stage]
    return Score(tuple(compute), tuple(transfer), max(done, default=0))
