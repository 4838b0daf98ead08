"""``onnxsplit inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    threads_option,
)

_SHOWN_TYPES = 10
_SHOWN_NAMES = 3


@make_command
@MODEL
@costs_option
@dims_option
@inputs_option
@threads_option
@option("--cuts", default=5, help="How many of the cheapest cuts in two to show.")
def command(output: Output, *, model: Path, cuts: int, **options: Any) -> None:
    """Show what MODEL is made of, what it costs, and where it can be cut."""
    from onnxsplit.inspection import inspect_model

    found = inspect_model(model, cuts=cuts, say=output.say, **options)
    output.done()
    output.line(
        f"{model}: IR {found.ir_version}, {found.ops} ops in {found.atoms} atoms, {binary(found.weight_bytes)} weights"
    )
    output.line(
        f"One run: {milliseconds(found.time_ns)} ({found.source}), {binary(found.peak_memory_bytes)} at its peak"
    )
    if found.note:
        output.line(f"Costs are analytic: {found.note}")
    for title, tensors in (("Input", found.inputs), ("Output", found.outputs)):
        for name, spec in tensors.items():
            output.line(f"{title} {name}: {spec}")
    output.line()
    rows = [
        (row.op_type, f"{row.count}", milliseconds(row.time_ns), percent(row.time_ns / max(1, found.time_ns)))
        for row in found.op_types[:_SHOWN_TYPES]
    ]
    output.table(("op type", "ops", "time", "share"), rows)
    output.line()
    rows = [
        (_listed(cut.tensors), binary(cut.bytes), milliseconds(cut.before_ns), milliseconds(cut.after_ns))
        for cut in found.cuts
    ]
    output.table(("best cuts in two: tensors", "bytes", "before", "after"), rows)
    output.line(f"\nNext: onnxsplit partition {model}")
    output.result({"model": model, "inspection": found})


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
