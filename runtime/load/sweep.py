"""Loads of several strengths, one after the other, and the search for the strongest that keeps a latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxsplit.errors import InputError
from onnxsplit.plan_base import PlanStruct
from runtime.errors import PipelineError
from runtime.load.endpoint import Endpoint
from runtime.load.loop import Progress, measure
from runtime.load.patterns import Pattern
from runtime.load.point import LoadPoint
from runtime.load.served_model import Spent
from runtime.load.windows import Measuring

MOST_LEVELS = 1000
"""The most loads of one sweep."""


class PartTime(PlanStruct, frozen=True, kw_only=True):
    """The mean times of one request in the model, or in one of its stages.

    Attributes:
        name: the model's name, or the stage's.
        count: number of requests that it answered during the load, those of the warm-up included.
        queue_ns: time that a request waited there.
        compute_ns: time that it ran there.
        total_ns: time from its arrival until its answer.
        failed: number of requests that failed there.
    """

    name: str
    count: int
    queue_ns: int
    compute_ns: int
    total_ns: int
    failed: int


class LoadRow(PlanStruct, frozen=True, kw_only=True):
    """One load, and where the time of its requests went.

    Attributes:
        point: how the target answered.
        parts: times in the server: the model as a whole, if the server knows that, and each stage.
        elsewhere_ns: mean time of a request that the server does not know of: network, connections, and this client;
            None where the server does not tell its time.
    """

    point: LoadPoint
    parts: tuple[PartTime, ...]
    elsewhere_ns: int | None


def run_load(endpoint: Endpoint, pattern: Pattern, rules: Measuring, progress: Progress) -> LoadRow:
    """Send one load, and take the difference of the server's statistics.

    Raises:
        InputError: a number is out of range.
    """
    before = _spent(endpoint)
    point = measure(endpoint.target, pattern, rules, progress=progress)
    parts = _differences(before, _spent(endpoint))
    whole = parts[0] if parts and not parts[0].name.startswith("stage ") else None
    elsewhere = point.mean_of_all_ns - whole.total_ns if whole is not None and point.mean_of_all_ns else None
    return LoadRow(point=point, parts=tuple(parts), elsewhere_ns=elsewhere)


def _spent(endpoint: Endpoint) -> Sequence[Spent]:
    """What the model and its stages have done so far; nothing where the server has died meanwhile."""
    try:
        return endpoint.spent()
    except PipelineError:
        return ()


def _differences(before: Sequence[Spent], after: Sequence[Spent]) -> list[PartTime]:
    earlier = {part.name: part for part in before}
    found = []
    for part in after:
        added = part.since(earlier[part.name]) if part.name in earlier else part
        count = max(1, added.count)
        found.append(
            PartTime(
                name=part.name,
                count=added.count,
                queue_ns=added.queue_ns // count,
                compute_ns=added.compute_ns // count,
                total_ns=added.total_ns // count,
                failed=added.failed,
            )
        )
    return found


def levels(start: float, end: float, step: float | None) -> list[float]:
    """The strengths of a range: by steps, or doubled each time without a step; the end is the last.

    Raises:
        InputError: the range is empty or has too many loads.
    """
    if not 0 < start <= end:
        raise InputError(f"the range {start:g}:{end:g} must begin above 0 and end at its beginning or above it")
    if step is not None and not step > 0:
        raise InputError(f"the step {step:g} of the range {start:g}:{end:g} must be above 0")
    found = [start]
    while found[-1] < end:
        if len(found) >= MOST_LEVELS:
            raise InputError(f"the range {start:g}:{end:g} has more than {MOST_LEVELS} loads; choose a larger step")
        found.append(min(end, found[-1] * 2 if step is None else start + len(found) * step))
    return found


def search(strengths: Sequence[float], keeps: Callable[[float], bool]) -> float | None:
    """Find the greatest strength that keeps a limit, by bisection; None where not even the least does.

    Args:
        strengths: in rising order.
        keeps: measures one, and says whether it keeps the limit.
    """
    least, most = -1, len(strengths)  # the one before is known to keep it, this one not to
    tried = 0
    while most - least > 1:
        middle = 0 if not tried else len(strengths) - 1 if tried == 1 else (least + most) // 2
        tried += 1
        if not least < middle < most:
            middle = (least + most) // 2
        if keeps(strengths[middle]):
            least = middle
        else:
            most = middle
    return strengths[least] if least >= 0 else None


def keeps_latency(point: LoadPoint, most_ns: float) -> bool:
    """Whether a load was answered in time, without failures, and as fast as its requests came."""
    return 0 < point.judged_ns <= most_ns and not point.failed and point.keeps_up
