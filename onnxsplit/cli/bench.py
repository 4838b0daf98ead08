"""The command ``onnxsplit bench``."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from onnxsplit.cli.help import MEASURING, option
from onnxsplit.cli.model_options import PLAN, inputs_option
from onnxsplit.cli.output import Output, binary, make_command, milliseconds
from onnxsplit.cli.running import keywords, running_options, tracing_options, write_trace
from onnxsplit.cli.values import NumberParam
from onnxsplit.errors import one_line
from onnxsplit.numbers import MOST_SIZE, parse_whole
from runtime.wire.messages.sequences import MOST_ROWS

if TYPE_CHECKING:
    from runtime.bench import BenchReport
    from runtime.bench_load import LoadLatency


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
    "--model",
    type=click.Path(path_type=Path),
    section=MEASURING,
    help="Whole model to compare with. Default: the plan's stages, merged in memory.",
)
@functools.partial(inputs_option, section=MEASURING)
@running_options
@tracing_options
@option(
    "--decode",
    callback=_decode,
    metavar="ROWSxTOKENS",
    section=MEASURING,
    help="Measure how fast sequences are continued instead: so many at once, by so many tokens each, as 8x128.",
)
@option(
    "--context",
    type=click.IntRange(1, MOST_SIZE),
    metavar="N",
    section=MEASURING,
    help="With --decode: number of tokens at the beginning of each text.  [default: at most 64]",
)
@option(
    "--slices",
    type=click.IntRange(3, 10_000),
    metavar="N",
    section=MEASURING,
    help="Number of slices of time for each contender; with --decode, number of turns.  [default: 20; 5]",
)
@option(
    "--slice-seconds",
    type=NumberParam(0.05, 3600),
    default=0.5,
    metavar="SECONDS",
    section=MEASURING,
    help="Length of one slice.",
)
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

    if model is not None:
        _check_kind(model)
    if decode is not None:
        _bench_decode(output, plan, model, decode, context, slices or 5, running)
        return
    if context is not None:
        raise click.UsageError("--context belongs to --decode ROWSxTOKENS")
    wanted = keywords(output, running)
    with _whole(output, plan, model) as (whole, reason):
        report = bench(
            plan,
            model=whole,
            merged=model is None,
            inputs=inputs,
            slices=slices or 20,
            slice_seconds=slice_seconds,
            closed=lambda pipeline: write_trace(output, pipeline, running["trace"]),
            say=output.say,
            **wanted,
        )
    output.done()
    if reason:
        report = msgspec.structs.replace(report, without_whole=reason)
    _show(output, report, slice_seconds)
    output.line(f'Next: run it from Python with onnxsplit.Pipeline.launch("{plan}")')
    output.result({"bench": report})


def _check_kind(model: Path) -> None:
    """Refuse a plan and a file of tensors by their kind; ONNX Runtime would only say that it cannot read them."""
    from onnxsplit.model.source import open_model

    if model.is_dir() or model.suffix == ".npz":
        open_model(model, hashed=False)


@contextmanager
def _whole(output: Output, folder: Path, model: Path | None) -> Iterator[tuple[Path | None, str]]:
    """The whole model: the one that was given, or the plan's stages merged in a file; or why there is none."""
    from onnxsplit.errors import ModelError, PlanError
    from onnxsplit.memory import free_memory_bytes
    from onnxsplit.plan_files import load_plan
    from onnxsplit.stages.merge import merge

    plan = load_plan(folder)
    if model is not None or plan.decoder is not None:
        yield (
            model,
            "" if model else "the plan has a decoder; measure it with --decode, and the whole model with --model",
        )
        return
    weights = sum(stage.weight_bytes for stage in plan.stages)
    copies = 2 * (sum(stage.replicas for stage in plan.stages) + 2) + 1  # each session packs its weights once more
    if copies * weights > (free := free_memory_bytes()):
        yield None, f"it would need {binary(copies * weights)} of memory, and {binary(free)} are free"
        return
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        output.say("merging the stages")
        try:
            merge(folder, Path(scratch) / "merged.onnx")
        except (ModelError, PlanError, ValueError) as error:
            yield None, f"its stages cannot be merged: {one_line(error, 300)}"
        else:
            yield Path(scratch) / "merged.onnx", ""


def _show(output: Output, report: BenchReport, slice_seconds: float) -> None:
    """Print rates, all relative to one contender, and latencies under load."""
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
    ratio = f"x {report.basis}"
    output.table(
        ("requests a second", "median", "95 % interval", ratio, "95 % interval"),
        rows,
        may_go=("95 % interval", "95 % interval", ratio, "median"),
    )
    if report.without_whole:
        output.line(f"\nThe whole model was not measured: {report.without_whole}.")
    rates = {load.share: load.rate_per_s for load in report.loads}
    columns = [cell for share, rate in rates.items() for cell in (f"p50 at {share:.0%} ({rate:.1f}/s)", "p99")]
    output.line("\nLatency at shares of the pipeline's rate; requests come at random, and do not wait for answers:\n")
    output.table(("", *columns), _load_rows(report.loads), may_go=tuple(reversed(columns)))
    whole = f"; the whole model: {milliseconds(report.whole_ns)}" if report.whole_ns is not None else ""
    output.line(
        f"\nOne request at a time: {milliseconds(report.latency_p50_ns)} median; its stages one after the other in one "
        f"process: {milliseconds(report.stages_ns)}{whole}."
    )
    output.line(
        f"{report.slices} slices of {slice_seconds} s for each contender, in turns; "
        f"{report.threads} thread(s) for each stage."
    )


def _load_rows(loads: Sequence[LoadLatency]) -> list[tuple[str, ...]]:
    """A row for each contender, with its percentiles at each share."""
    rows: dict[str, list[str]] = {}
    for load in loads:
        behind = "" if load.keeps_up else ", growing"
        few = "" if load.has_percentiles else f" (slowest of {load.requests})"
        rows.setdefault(load.name, []).extend([milliseconds(load.p50_ns), f"{milliseconds(load.p99_ns)}{few}{behind}"])
    return [(name, *cells) for name, cells in rows.items()]


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
    ratio = f"x {report.basis}"
    output.table(
        ("contender", "tokens/s", ratio, "first token", "between", "p99"),
        rows,
        may_go=("p99", "first token", "between", ratio, "tokens/s"),
    )
    output.line(
        f"\n{report.sequences} sequence(s) at once, continued by {report.tokens} tokens after {report.context}; "
        f"{report.turns} turns of each; {report.threads} thread(s) for each session."
    )
    output.result({"bench": report})
