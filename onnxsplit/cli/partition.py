"""``onnxsplit partition``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.output import (
    MODEL,
    Output,
    binary,
    costs_option,
    dims_option,
    inputs_option,
    make_command,
    milliseconds,
    option,
    percent,
)


@make_command
@MODEL
@option("--stages", type=int, metavar="K", help="Number of stages. Without it: the GPUs found, else 2.")
@option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Plan directory. Without it: MODEL.plan here.",
)
@option("--provider", default="auto", help="cpu, cuda[:N], auto, or by stage: 0=cuda:0,1=cpu.")
@costs_option
@dims_option
@inputs_option
@option("--rounds", type=click.IntRange(min=0), default=2, help="Corrections by running the real stages, at most.")
def command(output: Output, *, model: Path, out: Path | None, **options: Any) -> None:
    """Cut MODEL into cost-balanced stages and write a plan directory."""
    from onnxsplit.planner import default_target, partition

    folder = out or default_target(model)
    plan = partition(model, out=folder, say=output.say, **options)
    output.done()
    costs, prediction = plan.costs, plan.prediction
    stage_times = [s.measured_time_ns or s.predicted_time_ns for s in plan.stages]
    sent = [sum(cut.bytes for cut in plan.cuts if cut.from_stage == stage.index) for stage in plan.stages]
    rows = [
        (
            "whole model",
            milliseconds(costs.whole_time_ns),
            "",
            binary(costs.whole_weight_bytes),
            binary(costs.whole_peak_memory_bytes),
            "",
            "",
        )
    ]
    rows += [
        (
            f"stage {stage.index}",
            milliseconds(time_ns),
            milliseconds(stage.predicted_time_ns),
            binary(stage.weight_bytes),
            binary(stage.peak_memory_bytes),
            binary(sent[stage.index]),
            f"{stage.ops}",
        )
        for stage, time_ns in zip(plan.stages, stage_times, strict=True)
    ]
    ideal = sum(stage_times) // len(plan.stages)
    rows.append(("ideal stage", milliseconds(ideal), "", "", "", "", ""))
    output.table(("", "time", "predicted", "weights", "memory", "bytes out", "ops"), rows)
    output.line()
    output.line(f"Times are {costs.source}" + (f": {costs.note}" if costs.note else "."))
    output.line(
        f"Bottleneck {milliseconds(prediction.bottleneck_ns)} with transfers; no cut is below "
        f"{milliseconds(prediction.lower_bound_ns)} (gap {percent(prediction.gap)})."
    )
    if plan.dims:
        output.line("Sizes used: " + ", ".join(f"{name}={size}" for name, size in plan.dims.items()))
    output.line(f"\nWrote {folder}. Next: onnxsplit verify {folder} {model}")
    output.result({"plan": folder, "summary": plan})
