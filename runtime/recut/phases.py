"""The phases of a change to another plan, and what leads from one to the next. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto


class RecutPhase(Enum):
    """What a pipeline does about its plan."""

    STEADY = auto()
    PLANNING = auto()
    LOADING = auto()
    WARMING = auto()
    SWAPPED = auto()
    PROVING = auto()
    ENDED = auto()

    def __str__(self) -> str:
        return self.name.lower()


class RecutChange(Enum):
    """What can happen to a change of the plan."""

    PLAN = "a new plan is wanted"
    LOAD = "a plan is given"
    GAIN = "the new plan is better"
    NO_GAIN = "no plan is better"
    READY = "all new nodes are ready"
    SAME = "the answers are the same"
    DIFFER = "the answers differ"
    DRAINED = "the old nodes are idle"
    KEEP = "the new plan is kept"
    ROLL_BACK = "the old plan takes requests again"
    FAIL = "it failed"
    CLOSE = "the pipeline is closed"


TRANSITIONS: Mapping[tuple[RecutPhase, RecutChange], RecutPhase] = {
    (RecutPhase.STEADY, RecutChange.PLAN): RecutPhase.PLANNING,
    (RecutPhase.STEADY, RecutChange.LOAD): RecutPhase.LOADING,
    (RecutPhase.PLANNING, RecutChange.GAIN): RecutPhase.LOADING,
    (RecutPhase.PLANNING, RecutChange.NO_GAIN): RecutPhase.STEADY,
    (RecutPhase.PLANNING, RecutChange.FAIL): RecutPhase.STEADY,
    (RecutPhase.LOADING, RecutChange.READY): RecutPhase.WARMING,
    (RecutPhase.LOADING, RecutChange.FAIL): RecutPhase.STEADY,
    (RecutPhase.WARMING, RecutChange.SAME): RecutPhase.SWAPPED,
    (RecutPhase.WARMING, RecutChange.DIFFER): RecutPhase.STEADY,
    (RecutPhase.WARMING, RecutChange.FAIL): RecutPhase.STEADY,
    (RecutPhase.SWAPPED, RecutChange.DRAINED): RecutPhase.PROVING,
    (RecutPhase.SWAPPED, RecutChange.ROLL_BACK): RecutPhase.STEADY,
    (RecutPhase.PROVING, RecutChange.KEEP): RecutPhase.STEADY,
    (RecutPhase.PROVING, RecutChange.ROLL_BACK): RecutPhase.STEADY,
    **{(phase, RecutChange.CLOSE): RecutPhase.ENDED for phase in RecutPhase},
}
