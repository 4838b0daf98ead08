"""Text about providers: what they leave to the CPU, and how far they move a model's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from onnxsplit.cli.output import milliseconds

if TYPE_CHECKING:
    from onnxsplit.plan import Plan
    from onnxsplit.stages.chain import StageOnProvider


def plan_lines(plan: Plan) -> Iterator[str]:
    """What the providers of a plan do with the whole model, and what they leave to the CPU of each stage."""
    for use in plan.providers:
        if use.refused is not None:
            yield f"{use.provider} does not run the whole model: {shorten(use.refused, 240)}"
            yield f"Of the whole model, {use.provider} cannot run {counted(use.left_to_cpu)}."
        elif use.whole_time_ns is not None:
            yield f"The whole model takes {milliseconds(use.whole_time_ns)} on {use.provider}."
    for stage in plan.stages:
        if stage.left_to_cpu:
            yield left_line(stage.index, stage.provider, stage.left_to_cpu)


def provider_lines(ran: Sequence[StageOnProvider], moved: float) -> Iterator[str]:
    """How the stages for other providers than the CPU were verified.

    Args:
        ran: these stages.
        moved: the largest distance by which one of these providers moves the whole model.
    """
    for stage in ran:
        if stage.problem is not None:
            yield f"Stage {stage.stage} was run on the CPU, as {stage.provider} cannot be used here: {stage.problem}"
        elif stage.left_to_cpu:
            yield left_line(stage.stage, stage.provider, stage.left_to_cpu)
    used = dict.fromkeys(stage.provider for stage in ran if stage.problem is None)
    if used:
        alone = f" It alone moves the whole model by {moved:.1e}; twice that is allowed." if moved else ""
        yield f"With optimisation on, stages ran on {' and '.join(used)}.{alone}"


def left_line(stage: int, provider: str, left: Mapping[str, int]) -> str:
    """Which ops of a stage its provider leaves to the CPU."""
    return f"Stage {stage}: {provider} leaves {counted(left)} to the CPU."


def counted(left: Mapping[str, int]) -> str:
    """Ops in words: ``3 ops (1 NonZero, 2 Resize)``."""
    total = sum(left.values())
    kinds = ", ".join(f"{number} {kind}" for kind, number in left.items())
    return f"{total} op{'' if total == 1 else 's'} ({kinds})"
