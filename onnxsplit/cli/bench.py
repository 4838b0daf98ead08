"""The command ``onnxsplit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.output import PLAN, Output, inputs_option, make_command, milliseconds, option
from onnxsplit.cli.running import keywords, running_options, tracing_options, write_trace
from onnxsplit.cli.values import NumberParam


@make_command
@PLAN
@option(
    "--model", type=click.Path(path_type=Path), help="Source model. If given, whole-model sessions are measured too."
)
@inputs_option
@running_options
@tracing_options
@option(
    "--slices",
    type=click.IntRange(3, 10_000),
    default=20,
    metavar="N",
    help="Number of slices of time for each contender.",
)
@option("--slice-seconds", type=NumberParam(0.05, 3600), default=0.5, metavar="SECONDS", help="Length of one slice.")
def command(
    output: Output,
    *,
    plan: Path,
    model: Path | None,
    inputs: Path | None,
    slices: int,
    slice_seconds: float,
    **running: Any,
) -> None:
    """Measure the plan in DIR, and compare it with its ceiling: its stage files run at once, without communication."""
    from runtime.bench import bench

    report = bench(
        plan,
        model=model,
        inputs=inputs,
        slices=slices,
        slice_seconds=slice_seconds,
        closed=lambda pipeline: write_trace(output, pipeline, running["trace"]),
        say=output.say,
        **keywords(output, running),
    )
    output.done()
    rows = [
        (
            row.name,
            f"{row.per_s:.1f}",
            f"{row.low:.1f} to {row.high:.1f}",
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
        )
        for row in report.rows
    ]
    output.table(("requests a second", "median", "95 % interval", "pipeline over it", "95 % interval"), rows)
    output.line(
        f"\nOne request at a time: {milliseconds(report.latency_p50_ns)} median, "
        f"{milliseconds(report.latency_p99_ns)} p99; its stages one after the other in one process: "
        f"{milliseconds(report.stages_ns)}"
        + (f"; the whole model: {milliseconds(report.whole_ns)}." if report.whole_ns is not None else ".")
    )
    output.line(
        f"{report.slices} slices of {slice_seconds} s for each contender, in turns; "
        f"{report.threads} thread(s) for each stage."
    )
    output.line(f'Next: run it from Python with runtime.Pipeline.launch("{plan}")')
    output.result({"bench": report})
