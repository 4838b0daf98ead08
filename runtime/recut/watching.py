"""Looks at a running plan: what its nodes have done, and for how long it was full."""

from __future__ import annotations

import time
from collections.abc import Callable

from onnxsplit.plan import Plan
from runtime.recut.drift import Baseline
from runtime.recut.running_plan import RunningPlan
from runtime.recut.window import DriftSettings, Look, Window, total, window_between

_SAMPLE_S = 0.1
_LONELY_S = 1.0  # a plan that no request enters for so long is not watched any longer


class PlanWatch:
    """Watches a running plan. One thread uses it.

    Args:
        running: the plan.

    Attributes:
        running: as given.
    """

    def __init__(self, running: RunningPlan) -> None:
        self.running = running
        self._last = self._look()
        self._samples = self._full = 0

    def sample(self) -> None:
        """Note whether the pipeline is full now. Call this several times between two windows."""
        self._samples += 1
        self._full += self.running.is_full

    def window(self) -> Window:
        """What has happened since the last window, or since this was made."""
        before, self._last = self._last, self._look()
        full = self._full / max(1, self._samples)
        self._samples = self._full = 0
        plan = self.running.plan
        devices = {(node.stage, node.replica): device_of(plan, node.stage, node.replica) for node in self._last.nodes}
        return window_between(before, self._last, devices, full=full)

    @property
    def seconds(self) -> float:
        """The time since the last window."""
        return (time.monotonic_ns() - self._last.now_ns) / 1e9

    def _look(self) -> Look:
        coordinator = self.running.coordinator
        sequences = coordinator.sequences()
        answered = sequences.steps if sequences is not None else coordinator.requests.count - coordinator.in_flight
        return Look(now_ns=time.monotonic_ns(), answered=answered, nodes=coordinator.stats())


def watched(running: RunningPlan, settings: DriftSettings, most_s: float, stopped: Callable[[], bool]) -> Window:
    """What a plan does in a window that is long enough to compare, or in the time until it is clear that none comes.

    Args:
        running: the plan.
        settings: when a window is enough.
        most_s: the most seconds to wait for such a window.
        stopped: tells that the window is not wanted any more.
    """
    watch, begun = PlanWatch(running), time.monotonic()
    window = None
    while True:
        for _ in range(round(_LONELY_S / _SAMPLE_S / 2)):
            if not stopped():
                time.sleep(_SAMPLE_S)
                watch.sample()
        more = watch.window()
        window = more if window is None else window + more
        took = time.monotonic() - begun
        if stopped() or window.is_enough(settings) or took > most_s or (took > _LONELY_S and not window.answered):
            return window


def measured(plan: Plan, window: Window, settings: DriftSettings) -> tuple[dict[str, float], list[int] | None]:
    """What a new plan would be made for, if only the present one and a window of it are known.

    Args:
        plan: the plan.
        window: what it does now.
        settings: when a window is enough.

    Returns:
        The speeds of devices, relative to when the plan was made and to the fastest; and the times of the stages in
        nanoseconds at the speeds of then. No speeds, and None, if too few requests tell.
    """
    if window.trouble or not window.is_enough(settings):
        return {}, None
    totals = {place: total(runs) for place, runs in Baseline.of([window]).runs.items()}
    usual = [stage.measured_time_ns or stage.predicted_time_ns for stage in plan.stages]
    speeds = {}
    for device in {device for _, device in totals}:
        there = [(stage, *runs) for (stage, each), runs in totals.items() if each == device]
        usual_ns = sum(requests * usual[stage] for stage, requests, _ in there)
        if usual_ns:
            speeds[device] = usual_ns / max(1, sum(ran_ns for *_, ran_ns in there))
    fastest = max(speeds.values(), default=1.0)
    speeds = {device: speed / fastest for device, speed in speeds.items()}
    times = [0] * len(plan.stages)
    for (stage, device), (requests, ran_ns) in totals.items():
        times[stage] = times[stage] or round(ran_ns * speeds.get(device, 1.0) / max(1, requests))
    return speeds, times if all(times) else None


def device_of(plan: Plan, stage: int, replica: int) -> str:
    """The name of a replica's device; replicas beyond those of the plan share the last device of their stage."""
    planned = plan.stages[stage]
    names = planned.devices
    if not names and plan.target is not None:
        names = tuple(plan.target.devices[number].name for number in planned.device_numbers)
    return names[min(replica, len(names) - 1)] if names else str(stage)
