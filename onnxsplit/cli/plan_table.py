"""A plan as a table and a few lines of text."""

from __future__ import annotations

from onnxsplit.cli.output import Output, binary, milliseconds, percent
from onnxsplit.plan import BatchClaim, Costs, Plan
from onnxsplit.views.borders import borders_text

_BUSY = 0.15  # the share of the cores that others may use before the machine is called busy


def _also_dropped(inputs: tuple[str, ...]) -> str:
    """Text about the inputs that were dropped with an output."""
    return f", and with it the input {', '.join(inputs)}, which no other output needs" if inputs else ""


def show_plan(output: Output, plan: Plan) -> None:
    """Print a plan: its stages as a table, how sure its times are, the proven bound, and the verdict."""
    _show_stages(output, plan)
    output.line()
    output.line(_times_text(plan.costs))
    _show_figures(output, plan)
    if plan.borders is not None:
        output.line(borders_text(plan.borders))
    if plan.batch is not None:
        output.line(_rows_text(plan, plan.batch))
    if plan.dropped_outputs:
        output.line(f"Left out: the output {', '.join(plan.dropped_outputs)}" + _also_dropped(plan.dropped_inputs))
    for name in plan.defaults:
        output.line(f"Input {name} stays an input; a request that leaves it out gets the model's own value.")
    for library in plan.custom_ops:
        stages = ", ".join(str(stage.index) for stage in plan.stages if library.name in stage.custom_ops) or "none"
        output.line(f"Custom ops of {library.name} ({library.sha256[:12]}) are needed by the stages: {stages}.")
    if plan.dims:
        output.line("Sizes used: " + ", ".join(f"{name}={size}" for name, size in plan.dims.items()))


def _show_stages(output: Output, plan: Plan) -> None:
    """Print the stages as a table."""
    costs = plan.costs
    stage_times = [s.measured_time_ns or s.predicted_time_ns for s in plan.stages]
    sent = [sum(cut.bytes for cut in plan.cuts if cut.from_stage == stage.index) for stage in plan.stages]
    whole = (
        milliseconds(costs.whole_time_ns),
        "",
        binary(costs.whole_weight_bytes),
        binary(costs.whole_peak_memory_bytes),
    )
    rows = [("whole model", *whole, "", "", "")]
    rows += [
        (
            f"stage {stage.index}",
            milliseconds(time_ns),
            milliseconds(stage.predicted_time_ns),
            binary(stage.weight_bytes),
            binary(stage.peak_memory_bytes),
            binary(sent[stage.index]),
            f"{stage.ops}",
            ", ".join(stage.devices) if stage.devices else f"{stage.replicas} replicas" if stage.replicas > 1 else "",
        )
        for stage, time_ns in zip(plan.stages, stage_times, strict=True)
    ]
    if plan.stages:
        rows.append(("ideal stage", milliseconds(sum(stage_times) // len(plan.stages)), "", "", "", "", "", ""))
    placed = any(row[-1] for row in rows)
    columns = ("", "time", "predicted", "weights", "memory", "bytes out", "ops", "device")
    output.table(
        columns if placed else columns[:-1],
        [row if placed else row[:-1] for row in rows],
        may_go=("predicted", "ops", "bytes out", "memory", "weights", "device", "time"),
    )


def _show_figures(output: Output, plan: Plan) -> None:
    """Print the objective with its bound, and the verdict."""
    costs, prediction = plan.costs, plan.prediction
    if prediction.lower_bound_bytes is not None:
        output.line(
            f"Largest memory of a stage {binary(prediction.peak_memory_bytes or 0)}; no cut is below "
            f"{binary(prediction.lower_bound_bytes)} (gap {percent(prediction.gap)})."
        )
    elif plan.stages:
        name, value = "Bottleneck", prediction.bottleneck_ns
        if plan.objective == "latency":
            name, value = "Latency", prediction.latency_ns
        output.line(
            f"{name} {milliseconds(value)} with transfers; no cut is below "
            f"{milliseconds(prediction.lower_bound_ns)} (gap {percent(prediction.gap)}"
            + (f", times ±{percent(costs.interval)})." if costs.interval is not None else ").")
        )
    if plan.verdict is not None:
        output.line(plan.verdict.text)


def _times_text(costs: Costs) -> str:
    """Text about where the times come from, and how sure they are."""
    if costs.note:
        return f"Times are {costs.source}: {costs.note}"
    if costs.interval is None:
        return f"Times are {costs.source}."
    if costs.disturbed > _BUSY:
        return (
            f"Times are measured on a busy machine (other processes used {percent(costs.disturbed)} of its cores): "
            f"±{percent(costs.interval)}."
        )
    return f"Times are measured, ±{percent(costs.interval)}."


def _rows_text(plan: Plan, claim: BatchClaim) -> str:
    """Text about the inputs and outputs that have a batch axis, or about why requests are neither split nor joined."""
    if claim.why_not:
        return f"Batches are neither split nor joined: {claim.why_not}."
    states = plan.decoder.pasts() | plan.decoder.presents() if plan.decoder is not None else frozenset()
    axes = {name: plan.tensors[name].batch_axis for name in (*plan.inputs, *plan.outputs) if name not in states}
    carrying = ", ".join(f"{name} (axis {axis})" for name, axis in axes.items() if axis is not None)
    carrying += " and the states" if states else ""
    return f"Batch axes: {carrying}. The model's structure proves them; {claim.trials} trials agree."
