"""One device of a busy pipeline gets slower, and the pipeline changes its plan by itself: what callers see of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.recut.observed import AROUND_S, ClosedLoop, Figures, History, wait_for_usual_times
from runtime import Pipeline

_SETTLE_S = 3.0  # requests that were sent before a change are answered by then


@dataclass(frozen=True)
class Episode:
    """The figures of one change of the plan.

    Attributes:
        before: the time before the device got slower.
        drifted: the time from then until the new plan began to load, or until the wait was given up.
        loading: the time in which the new plan loaded and its answers were compared.
        around: the seconds around the swap.
        after: the time after the change.
        planned_per_s: the requests per second that the new plan promises.
        swap_s: seconds from the drift to the swap.
        loaded_s: the moments between which the new plan loaded.
        why: what became of the change, or why there was none.
    """

    before: Figures
    drifted: Figures
    loading: Figures | None
    around: Figures | None
    after: Figures | None
    planned_per_s: float
    swap_s: float
    loaded_s: tuple[float, float]
    why: str

    @property
    def row(self) -> dict[str, Any]:
        """The figures and their ratios, by name; those of a change that did not take place are absent."""
        row = {
            "before": self.before.per_s,
            "drifted": self.drifted.per_s,
            "p99_before_s": self.before.p99_s,
            "p99_drifted_s": self.drifted.p99_s,
            "longest_before_s": self.before.longest_s,
            "longest_drifted_s": self.drifted.longest_s,
            "why": self.why,
        }
        if self.loading is None or self.around is None or self.after is None:
            return row
        return row | {
            "loading": self.loading.per_s,
            "after": self.after.per_s,
            "planned": self.planned_per_s,
            "swap_s": self.swap_s,
            "gain": self.after.per_s / self.drifted.per_s,
            "planned_gain": self.planned_per_s / self.drifted.per_s,
            "of_planned": self.after.per_s / self.planned_per_s,
            "while_loading": self.loading.per_s / self.drifted.per_s,
            "p99_around_s": self.around.p99_s,
            "p99_after_s": self.after.p99_s,
            "longest_around_s": self.around.longest_s,
            "p99_ratio": self.around.p99_s / self.drifted.p99_s,
            "longest_ratio": self.around.longest_s / self.drifted.longest_s,
        }


def episode(
    pipeline: Pipeline, loop: ClosedLoop, history: History, slow_down: Callable[[], None], seconds: float
) -> Episode:
    """Slow a device down, and wait for the change of the plan.

    Args:
        pipeline: the pipeline; it changes its plan by itself.
        loop: its requests, which are being sent.
        history: its history.
        slow_down: makes a device slower.
        seconds: the time before and after the change that is measured; at most ten times as long is waited for it.
    """
    between = loop.answers.between
    wait_for_usual_times(pipeline)
    begun = time.monotonic()
    time.sleep(seconds)
    before = between(begun, time.monotonic())
    slow_down()
    drift = time.monotonic()
    if not history.wait_for_change(10 * seconds) or not history.swaps:
        drifted = between(drift + _SETTLE_S, time.monotonic())
        why = pipeline.recuts.last or pipeline.recuts.advice
        return Episode(before, drifted, None, None, None, 0.0, 0.0, (0.0, 0.0), why)
    ended, swap = time.monotonic(), history.swaps[0]
    time.sleep(max(seconds, AROUND_S))
    loading_at = history.spans("loading")[0][0]
    return Episode(
        before=before,
        drifted=between(min(drift + _SETTLE_S, loading_at - 1), loading_at),
        loading=between(loading_at, swap),
        around=between(swap - AROUND_S, swap + AROUND_S),
        after=between(ended, time.monotonic()),
        planned_per_s=pipeline.plan.prediction.throughput_per_s,
        swap_s=swap - drift,
        loaded_s=(loading_at, ended),
        why=pipeline.recuts.last,
    )
