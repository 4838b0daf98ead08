"""A comparison of numbers of stages, from which a user can choose one."""

from __future__ import annotations

from collections.abc import Iterable

from onnxsplit.partitioner import Effort, line_up, search, stage_memory
from onnxsplit.plan_base import PlanStruct
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import alike
from onnxsplit.progress import Say, silent

_EFFORT = Effort(gap=0.01, seconds=2.0)  # for each search


class SweepRow(PlanStruct, frozen=True, kw_only=True):
    """The best cut that was found for a number of stages, each on a device of its own.

    Attributes:
        stages: the number of stages.
        bottleneck_ns: time of the slowest stage with its transfers, in nanoseconds.
        lower_bound_ns: a lower bound on that time for any cut into this number of stages.
        gap: how far the time is above the bound, as a share of the bound.
        latency_ns: time of one request through all stages, in nanoseconds.
        peak_memory_bytes: the largest memory of a stage.
    """

    stages: int
    bottleneck_ns: int
    lower_bound_ns: int
    gap: float
    latency_ns: int
    peak_memory_bytes: int


def sweep(subject: Subject, stages: Iterable[int] = range(1, 17), *, say: Say = silent) -> tuple[SweepRow, ...]:
    """Search for the best cut for each number of stages, by the costs alone; nothing is run.

    Args:
        subject: the model.
        stages: the numbers of stages, ascending; numbers above the model's number of atoms are left out.
        say: called with each step.
    """
    rows = []
    for count in stages:
        if count > len(subject.atoms.ops):
            break
        say(f"searching for the best cut into {count} stages")
        problem = subject.problem(subject.costs.time_ns, alike(count))
        result = search(problem, line_up(problem, count), _EFFORT)
        rows.append(
            SweepRow(
                stages=count,
                bottleneck_ns=result.score.bottleneck_ns,
                lower_bound_ns=result.bound,
                gap=result.gap,
                latency_ns=result.score.latency_ns,
                peak_memory_bytes=max(stage_memory(problem, result.partition.stage_of, count)),
            )
        )
    return tuple(rows)
