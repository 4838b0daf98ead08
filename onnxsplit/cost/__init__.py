"""Costs of ops in integer nanoseconds: measured, or estimated by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxsplit.model.shapes import Shapes
from onnxsplit.plan import Level


@dataclass(frozen=True)
class OpCosts:
    """Compute time of every op of a graph.

    Attributes:
        time_ns: time of each op in nanoseconds; 0 for an op that is fused into another or folded away.
        whole_ns: time of one run of the whole model in one session, in nanoseconds.
        level: the optimisation level that the times hold for.
        source: ``measured`` or ``analytic``.
        shapes: types and shapes of the tensors, observed in a run or inferred.
        moved: the largest distance between the model's answers at a level that was tried and those at the lowest
            level, relative to the answers' scale; 0 when the model was not run.
    """

    time_ns: tuple[int, ...]
    whole_ns: int
    level: Level
    source: Literal["measured", "analytic"]
    shapes: Shapes
    moved: float = 0.0
