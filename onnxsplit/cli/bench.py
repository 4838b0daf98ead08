"""``onnxsplit bench``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.output import PLAN, Output, inputs_option, make_command, milliseconds, option, threads_option


@make_command
@PLAN
@option(
    "--model",
    type=click.Path(path_type=Path),
    help="The source model: compare with whole-model sessions too.",
)
@inputs_option
@threads_option
@option("--slices", type=click.IntRange(min=3), default=20, help="Interleaved slices of each contender.")
@option("--slice-seconds", type=click.FloatRange(min=0.05), default=0.5, help="Length of one slice.")
@option("--inflight", type=click.IntRange(min=1), help="Requests in flight. Without it: two a node.")
def command(
    output: Output,
    *,
    plan: Path,
    model: Path | None,
    inputs: Path | None,
    threads: int | None,
    slices: int,
    slice_seconds: float,
    inflight: int | None,
) -> None:
    """Measure the plan in DIR against its ceiling: the stage files running at once with no communication."""
    from runtime.bench import bench

    report = bench(
        plan,
        model=model,
        inputs=inputs,
        threads=threads,
        slices=slices,
        slice_seconds=slice_seconds,
        inflight=inflight,
        say=output.say,
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
        f"{milliseconds(report.latency_p99_ns)} p99; its stages alone, in turn: {milliseconds(report.stages_ns)}."
    )
    output.line(f"{report.slices} slices of {slice_seconds} s each, taken in turn; {report.threads} thread(s) a stage.")
    output.line(f'Next: put it to work from Python with runtime.Pipeline.launch("{plan}")')
    output.result({"bench": report})
