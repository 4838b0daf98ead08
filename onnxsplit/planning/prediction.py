"""What a plan predicts: its figures and its proof, from the score of its partition."""

from __future__ import annotations

from onnxsplit.partitioner import Score
from onnxsplit.plan import Prediction


def prediction(score: Score, bound: int, op_bound: int) -> Prediction:
    """The prediction of a plan.

    Args:
        score: the figures of the plan's partition.
        bound: a value that no partition of the same atoms goes below: nanoseconds, or bytes for the objective
            ``memory``.
        op_bound: the same if every op could be cut from every other; not used for the objective ``memory``.
    """
    in_bytes = score.objective == "memory"
    return Prediction(
        bottleneck_ns=score.bottleneck_ns,
        throughput_per_s=1e9 / max(1, score.bottleneck_ns),
        latency_ns=score.latency_ns,
        lower_bound_ns=0 if in_bytes else bound,
        gap=score.value / max(1, bound) - 1 if score.stage_ns else 0.0,
        op_lower_bound_ns=0 if in_bytes else op_bound,
        peak_memory_bytes=max(score.memory_bytes, default=0) if in_bytes else None,
        lower_bound_bytes=bound if in_bytes else None,
    )
