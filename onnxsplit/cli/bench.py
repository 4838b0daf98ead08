"""The command ``onnxsplit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.output import PLAN, Output, inputs_option, make_command, milliseconds, option
from onnxsplit.cli.running import keywords, running_options, tracing_options, write_trace
from onnxsplit.cli.values import NumberParam
from onnxsplit.numbers import MOST_SIZE, parse_whole
from runtime.wire.messages.sequences import MOST_ROWS


def _decode(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, tokens = text.partition("x")
    numbers = parse_whole(rows, MOST_ROWS), parse_whole(tokens, MOST_SIZE)
    if not numbers[0] or not numbers[1]:
        raise click.BadParameter(
            f"{text!r} is not ROWSxTOKENS, as 8x128, with at most {MOST_ROWS} rows", context, parameter
        )
    return numbers[0], numbers[1]


@make_command
@PLAN
@option(
    "--model", type=click.Path(path_type=Path), help="Source model. If given, whole-model sessions are measured too."
)
@inputs_option
@running_options
@tracing_options
@option(
    "--decode",
    callback=_decode,
    metavar="ROWSxTOKENS",
    help="Measure how fast sequences are continued instead: so many at once, by so many tokens each, as 8x128.",
)
@option(
    "--context",
    type=click.IntRange(1, MOST_SIZE),
    metavar="N",
    help="With --decode: number of tokens at the beginning of each text.  [default: at most 64]",
)
@option(
    "--slices",
    type=click.IntRange(3, 10_000),
    metavar="N",
    help="Number of slices of time for each contender; with --decode, number of turns.  [default: 20; 5]",
)
@option("--slice-seconds", type=NumberParam(0.05, 3600), default=0.5, metavar="SECONDS", help="Length of one slice.")
def command(
    output: Output,
    *,
    plan: Path,
    model: Path | None,
    inputs: Path | None,
    decode: tuple[int, int] | None,
    context: int | None,
    slices: int | None,
    slice_seconds: float,
    **running: Any,
) -> None:
    """Measure the plan in DIR, and compare it with its ceiling: its stage files run at once, without communication."""
    from runtime.bench import bench

    if decode is not None:
        _bench_decode(output, plan, model, decode, context, slices or 5, running)
        return
    if context is not None:
        raise click.UsageError("--context belongs to --decode ROWSxTOKENS")
    report = bench(
        plan,
        model=model,
        inputs=inputs,
        slices=slices or 20,
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


def _bench_decode(
    output: Output,
    plan: Path,
    model: Path | None,
    decode: tuple[int, int],
    context: int | None,
    turns: int,
    running: dict[str, Any],
) -> None:
    """Measure how fast the plan continues sequences."""
    from onnxsplit.cli.decoding import whole_model
    from runtime.bench_decode import bench_decode

    sequences, tokens = decode
    peers = {"peers": whole_model(model, running["custom_ops"])} if model is not None else {}
    report = bench_decode(
        plan,
        sequences=sequences,
        tokens=tokens,
        context=context,
        turns=turns,
        closed=lambda pipeline: write_trace(output, pipeline, running["trace"]),
        say=output.say,
        **peers,
        **keywords(output, running),
    )
    output.done()
    rows = [
        (
            row.rate.name,
            f"{row.rate.per_s:.1f}",
            f"{row.rate.ratio:.3f}",
            milliseconds(row.first_ns),
            milliseconds(row.between_ns),
            milliseconds(row.between_p99_ns),
        )
        for row in report.rows
    ]
    output.table(("contender", "tokens/s", "ratio", "first token", "between", "p99"), rows)
    output.line(
        f"\n{report.sequences} sequence(s) at once, continued by {report.tokens} tokens after {report.context}; "
        f"{report.turns} turns of each; {report.threads} thread(s) for each session. The ratio is the pipeline's rate "
        "divided by that of the contender."
    )
    output.result({"bench": report})
