"""``onnxsplit partition``."""

from __future__ import annotations

import re
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

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class StageCount(click.ParamType):  # type: ignore[type-arg]  # older click has no parameter here
    """A number, or ``auto``."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            return self.fail(f"{value!r} is neither a number nor auto", param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg]  # as above
    """Bytes, with K, M, G or T for powers of 1024."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if found is None:
            return self.fail(f"{value!r} is no size; write 512M or 2.5G", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


@make_command
@MODEL
@option(
    "--stages",
    type=StageCount(),
    metavar="K|auto",
    help="Number of stages; auto: the fewest that fit --max-memory. Without it: the GPUs found, else 2.",
)
@option("--cut-at", multiple=True, metavar="TENSOR", help="Cut exactly here. Repeatable.")
@option("--max-memory", type=Size(), metavar="SIZE", help="Memory no stage may exceed, as 512M or 2.5G.")
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
@option(
    "--rounds", type=click.IntRange(min=0), default=3, help="Times the real stages are run to correct the cut, at most."
)
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
