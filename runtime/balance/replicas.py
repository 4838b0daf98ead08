"""The number of replicas of a stage: fixed, or a range within which the load decides. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxsplit.errors import InputError, PlanError, shown
from onnxsplit.numbers import is_whole, whole_problem
from onnxsplit.plan_base import MOST_NODES

MOST_SCALE_S = 3600.0
"""The longest time of a load, in seconds, after which the number of nodes may be made to change."""


@dataclass(frozen=True, kw_only=True)
class ReplicaRange:
    """A stage has at least ``least`` nodes and at most ``most``; the load decides how many.

    Attributes:
        least: the number of nodes at the start, and without load; from 1.
        most: the largest number of nodes, from ``least`` to 255.
    """

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"

    @property
    def is_fixed(self) -> bool:
        """Whether it leaves no choice."""
        return self.least == self.most


Replicas = int | ReplicaRange | Mapping[int, int | ReplicaRange] | None
"""The option ``replicas``: the same for all stages, or by the index of a stage; None for the plan's numbers."""


def replica_ranges(wanted: Replicas, planned: Sequence[int]) -> tuple[ReplicaRange, ...]:
    """The range of every stage; a fixed number is a range with equal ends.

    Args:
        wanted: the option ``replicas``.
        planned: the plan's number of replicas of every stage.

    Raises:
        PlanError: replicas of a stage that the plan does not have.
        InputError: a number is not a whole number or is below one, a range is empty, or there are more nodes than a
            pipeline can have.
    """
    counts: dict[int, int | ReplicaRange] = dict(enumerate(planned))
    if isinstance(wanted, Mapping):
        unknown = [stage for stage in wanted if not is_whole(stage) or stage not in counts]
        if unknown:
            raise PlanError(f"replicas for stage {shown(unknown[0])}; the plan has the stages 0 to {len(counts) - 1}")
        counts.update({int(stage): count for stage, count in wanted.items()})
    elif wanted is not None:
        counts = dict.fromkeys(counts, wanted)
    ranges = tuple(_range(stage, counts[stage]) for stage in sorted(counts))
    check_total([each.most for each in ranges])
    return ranges


def check_total(counts: Sequence[int]) -> None:
    """Check the number of nodes of all stages together.

    Raises:
        InputError: a pipeline cannot have so many.
    """
    if sum(counts) > MOST_NODES:
        raise InputError(f"the stages have {sum(counts)} replicas together; at most {MOST_NODES} nodes make a pipeline")


def _range(stage: int, count: int | ReplicaRange) -> ReplicaRange:
    if not isinstance(count, ReplicaRange):
        problem = whole_problem(f"replicas of stage {stage}", count, 1, MOST_NODES)
        if problem:
            raise InputError(problem)
        return ReplicaRange(least=int(count), most=int(count))
    least, most = count.least, count.most
    if not (is_whole(least) and is_whole(most) and 1 <= least <= most <= MOST_NODES):
        raise InputError(
            f"replicas of stage {stage} have the range {shown(least)} to {shown(most)}; a range begins at 1 or more, "
            f"and ends at its beginning or above it, and at {MOST_NODES} at most"
        )
    return ReplicaRange(least=int(least), most=int(most))


def first_range(wanted: Replicas) -> ReplicaRange | None:
    """A range that an option asks for; None where all numbers are fixed."""
    counts = wanted.values() if isinstance(wanted, Mapping) else (wanted,)
    return next((count for count in counts if isinstance(count, ReplicaRange)), None)
