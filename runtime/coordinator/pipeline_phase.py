"""The phases of a pipeline, and what leads from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto


class PipelinePhase(Enum):
    """The state of a pipeline."""

    STARTING = auto()
    READY = auto()
    DRAINING = auto()
    FAILED = auto()
    CLOSED = auto()


class PipelineChange(Enum):
    """What can happen to a pipeline."""

    ALL_READY = "all nodes are ready"
    DRAIN = "drain"
    FAIL = "a node fails"
    CLOSE = "close"


TRANSITIONS: Mapping[tuple[PipelinePhase, PipelineChange], PipelinePhase] = {
    (PipelinePhase.STARTING, PipelineChange.ALL_READY): PipelinePhase.READY,
    (PipelinePhase.STARTING, PipelineChange.FAIL): PipelinePhase.FAILED,
    (PipelinePhase.READY, PipelineChange.DRAIN): PipelinePhase.DRAINING,
    **{(state, PipelineChange.CLOSE): PipelinePhase.CLOSED for state in PipelinePhase},
}
