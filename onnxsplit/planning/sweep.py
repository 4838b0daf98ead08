"""What each number of stages would give, so that one can be chosen."""

from __future__ import annotations

from collections.abc import Iterable

from onnxsplit.partitioner import Effort, line_up, search, stage_memory
from onnxsplit.plan import PlanStruct
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import alike
from onnxsplit.progress import Say, silent

_EFFORT = Effort(gap=0.01, seconds=2.0)


class SweepRow(PlanStruct, frozen=True, kw_only=True):
    """The best cut found for a number of stages, each on a device of its own. Nanoseconds and bytes."""

    stages: int
    bottleneck_ns: int
    lower_bound_ns: int
    gap: float
    latency_ns: int
    peak_memory_bytes: int


def sweep(subject: Subject, stages: Iterable[int] = range(1, 17), *, say: Say = silent) -> tuple[SweepRow, ...]:
    """Search for every number of stages that the model can be cut into, by its costs alone: nothing is run."""
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
