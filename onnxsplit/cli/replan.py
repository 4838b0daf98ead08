"""The command ``onnxsplit replan``."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxsplit.cli.help import RESULTS, option, path_option
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command, milliseconds
from onnxsplit.cli.values import NumberParam
from onnxsplit.numbers import LEAST_SPEED, MOST_GAIN_PERCENT, MOST_SPEED

if TYPE_CHECKING:
    from onnxsplit.planning.replan import Replanned, StageTime

_MOST_MS = 1e9


def _speeds(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Speeds by device or host."""
    speeds = {}
    for text in values:
        name, equals, number = text.rpartition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not NAME=SPEED", context, parameter)
        if name in speeds:
            raise click.BadParameter(f"{name!r} is given twice", context, parameter)
        speeds[name] = NumberParam(LEAST_SPEED, MOST_SPEED).convert(number, parameter, context)
    return speeds


def _times(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Times in nanoseconds."""
    if value is None:
        return None
    number = NumberParam(0, _MOST_MS, min_open=True)
    return [max(1, round(1e6 * number.convert(text, parameter, context))) for text in value.split(",")]


@make_command
@PLAN
@option(
    "--speeds",
    multiple=True,
    metavar="NAME=SPEED",
    callback=_speeds,
    help="Speed of a device, or of all devices of a host, relative to when the plan was made: h1=0.5 is half as fast. "
    "Without a cluster, devices are named 0, 1, ... Repeatable.",
)
@option(
    "--times",
    metavar="MS,MS,...",
    callback=_times,
    help="Time of a run of each stage now, in ms, at the speed that its device had.  [default: those in the plan]",
)
@option(
    "--least-gain",
    type=NumberParam(0, MOST_GAIN_PERCENT),
    default=0.0,
    metavar="PERCENT",
    help="Write nothing if the new cut is not faster by this much.",
)
@path_option(
    "-o",
    "--out",
    metavar="DIR",
    section=RESULTS,
    help="Plan directory to write. Without it: as PLAN.replan.plan in the current folder.",
)
def command(
    output: Output,
    *,
    plan: Path,
    speeds: dict[str, float],
    times: list[int] | None,
    least_gain: float,
    out: Path | None,
) -> None:
    """Cut the model of the plan in DIR again for other speeds of its devices, without the model and without a run."""
    from onnxsplit.planning.replan import replan

    folder = out or Path(f"{plan.absolute().name.removesuffix('.plan')}.replan.plan")
    made = replan(plan, out=folder, speeds=speeds, stage_times_ns=times, least_gain=least_gain, say=output.say)
    output.done()
    _show(output, made)
    if made.folder is not None:
        output.line(f"Wrote {made.folder}. Next: onnxsplit serve {made.folder}")
    else:
        output.line("Wrote no plan: the old cut stays." if made.gain == 1 else "Wrote no plan: the gain is too small.")
    output.result(
        {
            "plan": made.folder,
            "parent": made.parent,
            "gain": made.gain,
            "old_ns": made.old_ns,
            "new_ns": made.new_ns,
            "stages": [{"stage": number, "before": before, "after": after} for number, before, after in _pairs(made)],
            "seconds": made.seconds,
        }
    )


def _pairs(made: Replanned) -> list[tuple[int, StageTime | None, StageTime | None]]:
    """Each stage number with the stages of both cuts; None where a cut has fewer stages."""
    return [(number, *pair) for number, pair in enumerate(zip_longest(made.old_stages, made.new_stages))]


def _show(output: Output, made: Replanned) -> None:
    """Print the stages of both cuts as a table, and the gain."""
    rows = [(f"stage {number}", *_cells(before), *_cells(after)) for number, before, after in _pairs(made)]
    columns = ("", "before", "on", "after", "on ")
    output.table(columns, rows, may_go=("on", "on "), left=("on", "on "))
    name = "Latency" if made.plan.objective == "latency" else "Bottleneck"
    output.line(
        f"\n{name} at these speeds: {milliseconds(made.old_ns)} before, {milliseconds(made.new_ns)} after: "
        f"{made.gain:.2f} x."
    )


def _cells(stage: StageTime | None) -> tuple[str, str]:
    return ("", "") if stage is None else (milliseconds(stage.time_ns), ", ".join(stage.devices))
