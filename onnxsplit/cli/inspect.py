"""The command ``onnxsplit inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import option, path_option
from onnxsplit.cli.model_options import MODEL, custom_ops_words, examine_options, threads_option
from onnxsplit.cli.output import Output, binary, make_command, milliseconds, percent
from onnxsplit.cli.series import folded

if TYPE_CHECKING:
    from onnxsplit.planning.sweep import SweepRow
    from onnxsplit.views.inspection import Inspection

_SHOWN_TYPES = 10
_SHOWN_NAMES = 3


@make_command
@MODEL
@examine_options
@threads_option
@option("--cuts", type=click.IntRange(0, 1000), default=5, metavar="N", help="Number of cheapest cuts in two to show.")
@option("--sweep", is_flag=True, help="Also search for the best cut into each of 1 to 16 stages.")
@path_option("--html", metavar="FILE", help="Write a report as one HTML page; includes --sweep.")
def command(output: Output, *, model: Path, cuts: int, sweep: bool, html: Path | None, **options: Any) -> None:
    """Show the ops of MODEL, their cost and memory, and where the model can be cut."""
    from onnxsplit.files import check_outputs
    from onnxsplit.planning.examine import examine
    from onnxsplit.views.inspection import inspect_subject

    check_outputs(html)
    subject = examine(model, **options, say=output.say)
    facts = inspect_subject(subject, cuts=cuts)
    swept: tuple[SweepRow, ...] = ()
    if sweep or html is not None:
        from onnxsplit.planning import sweep as sweeping

        swept = sweeping.sweep(subject, say=output.say)
    if html is not None:
        from onnxsplit.planning.options import CutOptions
        from onnxsplit.planning.planner import dry_run
        from onnxsplit.views.report import write_report

        write_report(dry_run(subject, CutOptions(stages=1), say=output.say), html, swept)
    output.done()
    output.line(
        f"{model}: IR {facts.ir_version}, {facts.ops} ops in {facts.atoms} atoms, {binary(facts.weight_bytes)} weights"
    )
    output.line(
        f"One run: {milliseconds(facts.time_ns)} ({facts.source}), "
        f"{binary(facts.peak_memory_bytes)} of memory at its peak"
    )
    if facts.note:
        output.line(f"Costs are analytic: {facts.note}")
    for title, tensors in (("Input", facts.inputs), ("Output", facts.outputs)):
        for (name, spec), count in folded([(name, f"{spec}") for name, spec in tensors.items()], names=1):
            output.line(f"{title} {name}: {spec}" if count == 1 else f"{count} {title.lower()}s {name}: {spec}")
    _show_decoder(output, facts)
    output.line()
    rows = [
        (row.op_type, f"{row.count}", milliseconds(row.time_ns), percent(row.time_ns / max(1, facts.time_ns)))
        for row in facts.op_types[:_SHOWN_TYPES]
    ]
    output.table(("op type", "ops", "time", "share"), rows, may_go=("ops", "share", "time"))
    output.line()
    rows = [
        (_listed(cut.tensors), binary(cut.bytes), milliseconds(cut.before_ns), milliseconds(cut.after_ns))
        for cut in facts.cuts
    ]
    output.table(("best cuts in two: tensors", "bytes", "before", "after"), rows, may_go=("after", "before", "bytes"))
    for problem in facts.multi_device:
        output.line(f"Multi-device fields: {problem}")
    if swept:
        _show_sweep(output, swept)
    output.line()
    if html is not None:
        output.line(f"Wrote {html}.")
    output.line(f"Next: onnxsplit partition {model}{custom_ops_words(options['custom_ops'])}")
    output.result({"model": model, "inspection": facts, "sweep": swept})


def _show_decoder(output: Output, facts: Inspection) -> None:
    """Print the states of a decoder, or why a model that looks like one is none."""
    if facts.no_decoder:
        output.line(f"Not a decoder: {facts.no_decoder}.")
    if not facts.states:
        return
    output.line()
    states = folded([(s.past, s.present, s.kind, binary(s.bytes)) for s in facts.states], names=2)
    output.table(
        ("state", "next", "kind", "bytes of each", "states"),
        [(*row, f"{count}") for row, count in states],
        may_go=("next", "kind", "states", "bytes of each"),
    )
    output.line(f"Rows of unequal length: {facts.rows}. Chunks of prompts: {facts.chunk}.")


def _show_sweep(output: Output, swept: tuple[SweepRow, ...]) -> None:
    """Print the figures of the best cut into each number of stages."""
    output.line()
    output.table(
        ("stages", "bottleneck", "no cut below", "gap", "latency", "largest in memory"),
        [
            (
                f"{row.stages}",
                milliseconds(row.bottleneck_ns),
                milliseconds(row.lower_bound_ns),
                percent(row.gap),
                milliseconds(row.latency_ns),
                binary(row.peak_memory_bytes),
            )
            for row in swept
        ],
        may_go=("latency", "largest in memory", "no cut below", "gap", "bottleneck"),
    )


def _listed(names: tuple[str, ...]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
