"""The command ``onnxsplit place``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import option, path_option
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command, milliseconds, percent

if TYPE_CHECKING:
    from onnxsplit.partitioner import Parallel


@make_command
@PLAN
@path_option("--cluster", required=True, metavar="FILE", help="Cluster file with the devices and links.")
@path_option("-o", "--out", metavar="DIR", help="Plan directory to write. Without it: DIR is changed.")
@option(
    "--parallel",
    type=click.Choice(["model", "hybrid"]),
    default="model",
    help="How devices are used. model: one device for each stage; hybrid: the remaining devices run replicas.",
)
def command(output: Output, *, plan: Path, cluster: Path, out: Path | None, parallel: Parallel) -> None:
    """Move the stages of the plan in DIR to the devices of a cluster, without cutting the model again."""
    from onnxsplit.plan_summary import stages_by_host
    from onnxsplit.planning.place import place

    placed = place(plan, cluster, out=out, parallel=parallel)
    rows: list[tuple[Any, ...]] = [
        (
            f"stage {stage.index}",
            milliseconds(stage.predicted_time_ns),
            ", ".join(stage.devices),
            ", ".join(stage.hosts),
        )
        for stage in placed.stages
    ]
    output.table(("", "predicted", "devices", "hosts"), rows, may_go=("hosts", "predicted", "devices"))
    prediction = placed.prediction
    output.line(
        f"\nBottleneck {milliseconds(prediction.bottleneck_ns)} with transfers; no placement of these stages is below "
        f"{milliseconds(prediction.lower_bound_ns)} (gap {percent(prediction.gap)})."
    )
    several = len(stages_by_host(placed)) > 1
    waiting = " --launcher none --bind tcp://HOST:PORT  (HOST: this host's address)" * several
    output.line(f"Wrote {out or plan}. Next: onnxsplit serve {out or plan}{waiting}")
    output.result({"plan": out or plan, "summary": placed})
