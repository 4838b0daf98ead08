"""What ops and transfers cost, in integer nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxsplit.plan import Level
from onnxsplit.shapes import Shapes

HOP_LATENCY_NS = 60_000
"""What handing over one tensor costs each of the two processes, whatever its size."""

HOP_BYTES_PER_S = 6_000_000_000
"""Bytes a second that a process can send or receive on one host."""


@dataclass(frozen=True)
class OpCosts:
    """Compute time of every op of a graph.

    Attributes:
        time_ns: by op; an op that is fused into another or folded away costs nothing.
        whole_ns: the whole model in one session.
        level: the optimisation level the times hold for.
        source: ``measured`` or ``analytic``.
        shapes: shapes as far as the model of cost knows them: observed in a run, or inferred.
    """

    time_ns: tuple[int, ...]
    whole_ns: int
    level: Level
    source: Literal["measured", "analytic"]
    shapes: Shapes


def transfer_ns(size_bytes: int) -> int:
    """What one crossing of a tensor costs the stage that sends it, and the one that receives it."""
    return HOP_LATENCY_NS + size_bytes * 1_000_000_000 // HOP_BYTES_PER_S
