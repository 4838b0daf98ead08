"""A plan in one line, and as a drawing for notebooks. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxsplit.drawing.stages import StageBox, drawing_of, size_text, time_text

if TYPE_CHECKING:
    from onnxsplit.plan import Plan


def one_line(plan: Plan) -> str:
    """The model, the number of stages, the predicted figures and their proof."""
    count, prediction = len(plan.stages), plan.prediction
    return (
        f"<Plan of {plan.model.name}: {count} stage{'s' * (count != 1)}, bottleneck "
        f"{time_text(prediction.bottleneck_ns)} ({plan.costs.source}), at most {prediction.gap:.1%} above the best>"
    )


def drawing(plan: Plan) -> str:
    """The stages with their times and weights, as HTML."""
    boxes = [
        StageBox(
            f"stage {stage.index}",
            (
                f"{time_text(stage.predicted_time_ns)}, {size_text(stage.weight_bytes)} of weights",
                f"{stage.provider}" + (f", {stage.replicas} replicas" if stage.replicas > 1 else ""),
            ),
        )
        for stage in plan.stages
    ]
    return drawing_of(one_line(plan).strip("<>"), boxes, edges(plan))


def edges(plan: Plan) -> dict[tuple[int, int], int]:
    """The bytes that one request moves from one stage to another."""
    found: dict[tuple[int, int], int] = {}
    for cut in plan.cuts:
        for target in cut.to_stages:
            found[cut.from_stage, target] = found.get((cut.from_stage, target), 0) + cut.bytes
    return found


def stages_by_host(plan: Plan) -> dict[str, list[int]]:
    """The stages that the plan places on each host, with one entry for each replica; empty if it names no hosts."""
    found: dict[str, list[int]] = {}
    for stage in plan.stages:
        for host in stage.hosts:
            found.setdefault(host, []).append(stage.index)
    return found
