"""What ops cost, in integer nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxsplit.model.shapes import Shapes
from onnxsplit.plan import Level


@dataclass(frozen=True)
class OpCosts:
    """Compute time of every op of a graph.

    Attributes:
        time_ns: by op; an op that is fused into another or folded away costs nothing.
        whole_ns: the whole model in one session.
        level: the optimisation level the times hold for.
        source: ``measured`` or ``analytic``.
        shapes: shapes as far as the model of cost knows them: observed in a run, or inferred.
        moved: how far the whole model's answers at the levels that were tried are from those at the lowest, over their
            scale; 0 when it was not run.
    """

    time_ns: tuple[int, ...]
    whole_ns: int
    level: Level
    source: Literal["measured", "analytic"]
    shapes: Shapes
    moved: float = 0.0
