"""What a re-cut would gain, and what it has gained. Pure.

Gains are ratios of rates: 1.2 means that the pipeline answers 20 % more requests in the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from runtime.coordinator.counters import OTHER_COSTS
from runtime.recut.drift import Drift
from runtime.recut.window import DriftSettings, Window

StageTimes = Sequence[Sequence[tuple[str, int]]]
"""For every stage, the device of each replica, and the time of one run there in ns, at speed 1."""

_FULL = 0.8  # share of the time from which a pipeline counts as full
_EXPLAINED = 0.2  # the rate seen may differ from the predicted one by this share
_BUSY = 0.5  # share of the time that the slowest stage must be busy; else nobody waits for it
_WORSE = 0.03  # a new plan that is slower by this share is given up
_SAME_COST = 0.05  # rates are compared if the mean costs of requests differ by at most this share


@dataclass(frozen=True, kw_only=True)
class NewPlan:
    """A plan that was made for changed speeds.

    Attributes:
        plan: the plan directory.
        speeds: the speeds that it was made for, by device, relative to the baseline of the running plan.
        old_ns: time between two requests with the running plan at these speeds, as the planner predicts it.
        new_ns: the same with the new plan.
        old: stage times of the running plan.
        new: stage times of the new plan.
    """

    plan: str
    speeds: Mapping[str, float]
    old_ns: int
    new_ns: int
    old: StageTimes = ()
    new: StageTimes = ()

    def gain_at(self, speeds: Mapping[str, float]) -> float:
        """The gain at other speeds: the planner's, times the changes of both plans' slowest stages.

        Without stage times, the gain is the same at all speeds.
        """
        gain = self.old_ns / max(1, self.new_ns)
        if not self.old or not self.new:
            return gain
        old = slowest_ns(self.old, speeds) / slowest_ns(self.old, self.speeds)
        return gain * old * slowest_ns(self.new, self.speeds) / slowest_ns(self.new, speeds)


def slowest_ns(times: StageTimes, speeds: Mapping[str, float]) -> float:
    """Time between two requests: the largest over all stages. Replicas share the work in proportion to their speeds.

    Args:
        times: the stage times.
        speeds: the speed of every device; 1 where it lacks a device.
    """
    return max(1 / sum(speeds.get(device, 1.0) / max(1, time_ns) for device, time_ns in stage) for stage in times)


def possible_gain(window: Window, drift: Drift, slowness: Mapping[str, float]) -> float:
    """The gain if the new plan were as even as the running one was in the baseline, on devices of the present speeds.

    Args:
        window: the window.
        drift: the window compared with the baseline.
        slowness: the slowness of every device.
    """
    times = [
        [
            (node.device, round(drift.places[stage, node.device]))
            for node in nodes
            if (stage, node.device) in drift.places
        ]
        for stage, nodes in window.stages.items()
    ]
    speeds = {device: 1 / ratio for device, ratio in slowness.items()}
    return slowest_ns(times, speeds) / slowest_ns(times, {}) * fmean(speeds.values())


def contradiction(window: Window) -> str:
    """Why a new cut would not do what the session times predict; empty if nothing speaks against it."""
    stage, slowest = window.bottleneck()
    predicted, seen = 1e9 / max(1.0, slowest), window.answered / window.seconds
    is_full = window.full_s >= _FULL * window.seconds
    if seen > (1 + _EXPLAINED) * predicted or (is_full and seen < (1 - _EXPLAINED) * predicted):
        return (
            f"{seen:.3g} requests/s were answered, and the time of the slowest stage ({stage}) allows {predicted:.3g}: "
            "the stages' times do not explain the rate"
        )
    if seen < _BUSY * predicted:
        return f"the slowest stage ({stage}) is busy {100 * seen / predicted:.0f} % of the time: no request waits long"
    return ""


@dataclass(frozen=True, kw_only=True)
class RecutProof:
    """Whether a new plan stays.

    Attributes:
        kept: whether it stays.
        gain: the measured gain; None if the figures prove nothing.
        why: the reason, in one sentence.
    """

    kept: bool
    gain: float | None
    why: str


def verdict(before: Window, after: Window, settings: DriftSettings) -> RecutProof:
    """Compare the old plan with the new one.

    The rates are compared if the pipeline was full both times and requests were equally large. Else the times of the
    slowest stages are, for requests of the same costs.

    Args:
        before: a window of the old plan, after the drift.
        after: a window of the new plan.
        settings: when a window is enough.
    """
    gain, what = _rates(before, after), "rate"
    if gain is None:
        gain, what = _times(before, after, settings.requests), "time of the slowest stage"
    if gain is None or not (before.is_enough(settings) and after.is_enough(settings)):
        return RecutProof(
            kept=True, gain=None, why="too few requests of the same sizes were answered to compare both plans"
        )
    kept = gain > 1 - _WORSE
    outcome = "the new plan stays" if kept else "the old plan comes back"
    return RecutProof(
        kept=kept, gain=gain, why=f"by the {what}, the new plan answers {gain:.2f} times as many: {outcome}"
    )


def _rates(before: Window, after: Window) -> float | None:
    """The gain by the rates; None if these cannot be compared."""
    if any(window.full_s < _FULL * window.seconds or not window.answered for window in (before, after)):
        return None
    cost, other = _mean_cost(before), _mean_cost(after)
    if cost is None or other is None or abs(cost - other) > _SAME_COST * cost:
        return None
    return (after.answered / after.seconds) / (before.answered / before.seconds)


def _mean_cost(window: Window) -> float | None:
    """The mean cost of its requests; None if it is not known of all."""
    runs = [item for node in window.nodes.values() for item in node.runs.items()]
    if any(cost == OTHER_COSTS for cost, _ in runs):
        return None
    return sum(cost * requests for cost, (requests, _) in runs) / max(1, sum(requests for _, (requests, _) in runs))


def _times(before: Window, after: Window, least_requests: int) -> float | None:
    """The gain by the time of the slowest stage, for requests as they were before; None without common costs."""
    stages = [*before.pooled().values(), *after.pooled().values()]
    common = set.intersection(*(set(runs) for runs in stages)) - {OTHER_COSTS}
    if min(sum(runs[cost][0] for cost in common) for runs in stages) < least_requests:
        return None
    weights = {cost: stages[0][cost][0] for cost in common}

    def slowest(window: Window) -> float:
        return max(
            sum(weight * runs[cost][1] / runs[cost][0] for cost, weight in weights.items()) / len(window.stages[stage])
            for stage, runs in window.pooled().items()
        )

    return slowest(before) / slowest(after)
