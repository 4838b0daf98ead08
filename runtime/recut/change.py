"""What is wanted of a change to another plan, and what is known of it so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.recut.offline import Replan
from runtime.recut.result import Recut, RecutSeconds
from runtime.recut.running_plan import RunningPlan
from runtime.recut.window import Window


@dataclass(frozen=True)
class PlanWish:
    """A plan that a pipeline is to change to.

    Attributes:
        folder: the plan directory; None plans the model anew.
        speeds: for a new plan: the speeds of devices, relative to when the present plan was made; None for those that
            can be measured now.
        stage_times_ns: for a new plan: times of the present stages at full speed; None for those of the present plan.
        made: the plan, if it was planned anew already.
        before: what the present plan did lately; None to look at it first.
    """

    folder: Path | None = None
    speeds: Mapping[str, float] | None = None
    stage_times_ns: Sequence[int] | None = None
    made: Replan | None = None
    before: Window | None = None

    @property
    def must_gain(self) -> bool:
        """Whether the plan stays only if it is better: it was not given by the caller."""
        return self.folder is None


class Change:
    """What is known of one change so far.

    Args:
        wish: the plan that is wanted.
        old: the plan that takes requests.
    """

    def __init__(self, wish: PlanWish, old: RunningPlan) -> None:
        self.wish = wish
        self.old = old
        self.new: RunningPlan | None = None
        self.new_id = old.plan_id
        self.swapped = False
        self.predicted_gain: float | None = None
        self.measured_gain: float | None = None
        self.before: Window | None = None
        self.seconds = RecutSeconds()
        self.remove_plan: Callable[[], None] = lambda: None

    def timed(self, step: str) -> TimedStep:
        """Take the time of a step; a context manager."""
        return TimedStep(self, step)

    def result(self, *, kept: bool, why: str) -> Recut:
        """The result of the change."""
        return Recut(
            old=self.old.plan_id,
            new=self.new_id,
            kept=kept,
            predicted_gain=self.predicted_gain,
            measured_gain=self.measured_gain,
            seconds=self.seconds,
            why=why,
        )


class TimedStep:
    """Takes the time of a step of a change."""

    def __init__(self, change: Change, step: str) -> None:
        self._change, self._step = change, step
        self._begun = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        took = time.monotonic() - self._begun
        self._change.seconds = replace(self._change.seconds, **{self._step: took})
