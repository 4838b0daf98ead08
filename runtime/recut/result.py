"""What became of a change to another plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecutSeconds:
    """How long the steps of a change took, in seconds; 0 for steps that were not reached.

    Attributes:
        planning: the search for the plan, and writing it.
        loading: until all new nodes were ready, and a given plan was known to be one of the same model.
        warming: comparing the answers of both plans.
        draining: until the old nodes were idle.
    """

    planning: float = 0.0
    loading: float = 0.0
    warming: float = 0.0
    draining: float = 0.0


@dataclass(frozen=True)
class Recut:
    """What became of a change to another plan that did not fail.

    Attributes:
        old: the identity of the plan that ran before.
        new: the identity of the plan that was to replace it; that of the old one where no plan is better.
        kept: whether the new plan runs now.
        predicted_gain: the throughput of the new plan over that of the old one, as predicted; None for a plan that the
            caller has given.
        measured_gain: the same as measured; None where too few requests came to tell.
        seconds: how long the steps took.
        why: why the new plan is kept or not, in a sentence.
    """

    old: str
    new: str
    kept: bool
    predicted_gain: float | None
    measured_gain: float | None
    seconds: RecutSeconds
    why: str
