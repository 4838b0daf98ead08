"""The command ``onnxsplit partition``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from onnxsplit.cli.help import RESULTS, option, path_option
from onnxsplit.cli.model_options import MODEL, custom_ops_words, examine_options
from onnxsplit.cli.output import Output, make_command, milliseconds
from onnxsplit.cli.values import NODES, SecondsParam, ShareParam, SizeParam, StageCountParam
from onnxsplit.effort import EFFORT_NAMES
from onnxsplit.numbers import MOST_ROUNDS
from onnxsplit.plan_files import check_plan_folder

if TYPE_CHECKING:
    from onnxsplit.planning.result import PlanningResult

_DEVICES = "Stages and devices"
_device_option = functools.partial(option, section=_DEVICES)
_cut_option = functools.partial(option, section="Where to cut")
_search_option = functools.partial(option, section="The search")
_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)  # strongest first
_EXAMINED = ("costs", "dims", "inputs", "outputs", "drop_outputs", "keep_inputs", "custom_ops")
_DECODER = ("decoder", "decode_rows", "context", "cache_tokens")


def _pairs(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """Devices by pattern."""
    pairs = {}
    for text in value:
        pattern, equals, device = text.rpartition("=")
        if not equals or not pattern or not device:
            raise click.BadParameter(f"{text!r} is not PATTERN=DEVICE", context, parameter)
        pairs[pattern] = device
    return pairs


def _groups(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> list[list[str]]:
    """Groups of outputs by name."""
    return [[name.strip() for name in text.split(",") if name.strip()] for text in value]


def _note_former_name(output: Output, former: str, name: str) -> None:
    """Tell a user the current name of an option."""
    now = f"--{name.replace('_', '-')}"
    output.note(f"--{former} is now {now}. This version accepts both; the next one refuses --{former}")


def _strongest_names(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Options of which the former and the current name are one: of values from two sources the stronger ones stay."""
    context = click.get_current_context()
    strongest = dict(options)
    for pair in names.items():
        sources = {name: context.get_parameter_source(name) for name in pair}
        ranks = {name: _SOURCES.index(source) for name, source in sources.items() if source in _SOURCES}
        strongest |= {name: () for name, rank in ranks.items() if rank > min(ranks.values())}
    return strongest


@make_command
@MODEL
@_device_option(
    "--stages",
    type=StageCountParam(),
    metavar="K|auto",
    help="Number of stages. auto: the fewest that fit --max-memory. Without it: the number of GPUs, else 2.",
)
@_device_option(
    "--devices", type=NODES, metavar="N", help="Number of devices of this host, for --parallel data and hybrid."
)
@_device_option(
    "--parallel",
    type=click.Choice(["model", "data", "hybrid"]),
    default="model",
    help="How devices share the work. model: each runs one stage; data: each runs the whole model; "
    "hybrid: stages have replicas.",
)
@_device_option(
    "--provider",
    default="auto",
    metavar="PROVIDER",
    help="Execution provider: cpu, cuda[:N], openvino, webgpu, auto, or one for each stage, as 0=cuda:0,1=cpu.",
)
@path_option(
    "--cluster",
    metavar="FILE",
    section=_DEVICES,
    help="Cluster file with the devices and links to cut for; onnxsplit cluster init writes one.",
)
@_device_option(
    "--place",
    multiple=True,
    metavar="PATTERN=DEVICE",
    callback=_pairs,
    help="Run the ops whose names match PATTERN only on this device of the cluster. Repeatable.",
)
@_device_option(
    "--max-memory", type=SizeParam(), metavar="SIZE", help="Most memory that a stage may take, as 512M or 2.5G."
)
@_cut_option(
    "--strategy",
    type=click.Choice(["layer", "network", "task"]),
    default="network",
    help="Where cuts are allowed. layer: between layers in the model's order; network: anywhere in the graph; "
    "task: before each output's own part, behind a shared backbone.",
)
@_cut_option(
    "--task",
    "tasks",
    multiple=True,
    metavar="OUT,OUT",
    callback=_groups,
    help="Outputs that share one part, for --strategy task. Repeatable.",
)
@_cut_option("--cut-at", multiple=True, metavar="TENSOR", help="Cut at exactly these tensors. Repeatable.")
@_cut_option(
    "--also-cut",
    multiple=True,
    metavar="TENSOR",
    help="Cut at this tensor, in addition to the cuts that the search chooses. Repeatable.",
)
@_cut_option("--no-cut", multiple=True, metavar="TENSOR", help="Never cut at this tensor. Repeatable.")
@_cut_option(
    "--border",
    type=click.Choice(["float32", "float16", "int8", "auto"]),
    default="float32",
    help="How float32 tensors cross between stages. float32: as they are; float16, int8: in fewer bits; auto: each in "
    "the form that is fastest on its link and keeps the outputs within --tolerance.",
)
@_cut_option(
    "--tolerance",
    type=ShareParam(),
    metavar="SHARE",
    help="Largest error of an output, relative to its scale, that narrow borders may cause; 1e-3 by default.",
)
@option("--cut", multiple=True, hidden=True)  # former name of --also-cut
@option("--keep", multiple=True, hidden=True)  # former name of --no-cut
@_cut_option(
    "--together",
    multiple=True,
    metavar="PATTERN",
    help="Keep the ops whose names match PATTERN in one stage, as '/layer3/*'. Repeatable.",
)
@examine_options
@_search_option(
    "--objective",
    type=click.Choice(["throughput", "latency", "memory"]),
    default="throughput",
    help="What to minimise. throughput: time of the slowest stage; latency: time of one request; "
    "memory: largest memory of a stage.",
)
@_search_option(
    "--effort",
    type=click.Choice(EFFORT_NAMES),
    default="normal",
    help="How much time measuring, searching and proving may take. normal: about 12 runs of the model and 10 s; quick: "
    "half of it; thorough: 10 times as much, and an optimisation level for each stage.",
)
@_search_option(
    "--rounds",
    type=click.IntRange(0, MOST_ROUNDS),
    metavar="N",
    help="Most rounds in which the real stages run and the cut is corrected.  [default: 3; quick 1, thorough 6]",
)
@_search_option(
    "--gap",
    type=ShareParam(),
    default="0%",
    help="Stop when the cut is proven to be within this share of the best one.",
)
@_search_option(
    "--time-limit",
    type=SecondsParam(),
    help="Most time that one search may take.  [default: 10 s; quick 2 s, thorough 60 s]",
)
@path_option(
    "-o",
    "--out",
    metavar="DIR",
    section=RESULTS,
    help="Plan directory to write. Without it: MODEL.plan in the current folder.",
)
@path_option("--html", metavar="FILE", section=RESULTS, help="Also write a report: one HTML page with drawings.")
@path_option(
    "--annotate",
    metavar="FILE",
    section=RESULTS,
    help="Also write a copy of the model that names the stage of each op.",
)
@option("--dry-run", is_flag=True, section=RESULTS, help="Show the plan without writing it.")
def command(
    output: Output,
    *,
    model: Path,
    out: Path | None,
    html: Path | None,
    annotate: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Cut MODEL, an ONNX file, into stages of balanced cost, and write a plan directory."""
    from onnxsplit.cli.plan_table import show_plan
    from onnxsplit.cli.providers import plan_lines
    from onnxsplit.files import check_outputs
    from onnxsplit.model.dominant_op import explain_dominant_op
    from onnxsplit.planning import planner
    from onnxsplit.planning.options import CURRENT_NAMES, CutOptions, by_current_name
    from onnxsplit.timed import reused_workers

    check_outputs(html, annotate)
    folder = out or planner.default_plan_folder(model)
    examined = {name: options.pop(name) for name in (*_EXAMINED, *_DECODER)}
    options = _strongest_names(options, CURRENT_NAMES)
    wanted = CutOptions(**by_current_name(options, functools.partial(_note_former_name, output)))
    if not dry_run:
        check_plan_folder(folder)
    with reused_workers():
        subject = planner.examine_for(model, wanted, **examined, say=output.say)
        made = (
            planner.dry_run(subject, wanted, say=output.say)
            if dry_run
            else planner.write_plan(subject, folder, wanted, say=output.say)
        )
    files = _beside(output, made, html, annotate)
    output.done()
    show_plan(output, made.plan)
    _show_decoder(output, made)
    for text in plan_lines(made.plan):
        output.line(text)
    if wanted.stages is None and wanted.parallel == "model" and len(made.plan.stages) == 1:
        why = explain_dominant_op(made.subject.graph)
        if why is not None:
            output.line(f"It is one stage: {why}.")
    output.line()
    if files:
        output.line(f"Wrote {', '.join(map(str, files))}.")
    if dry_run:
        output.line("Wrote no plan.")
    else:
        more = custom_ops_words(examined["custom_ops"])
        output.line(f"Wrote {folder}. Next: onnxsplit verify {folder} {model}{more}")
    output.result(
        {
            "plan": None if dry_run else folder,
            "files": files,
            "summary": made.plan,
            "no_decoder": made.subject.no_decoder or None,
            "prefill": made.subject.decoding.prefill if made.subject.decoding is not None else None,
        }
    )


def _beside(output: Output, made: PlanningResult, html: Path | None, annotate: Path | None) -> list[Path]:
    """Write the annotated model and the report, if they are requested; returns the files."""
    files: list[Path] = []
    if annotate is not None:
        from onnxsplit.views import annotate as annotation

        files += annotation.annotate(made, annotate)
    if html is not None:
        from onnxsplit.planning.sweep import sweep
        from onnxsplit.views.report import write_report

        write_report(made, html, sweep(made.subject, say=output.say))
        files.append(html)
    return files


def _show_decoder(output: Output, made: PlanningResult) -> None:
    """Print what is known of a decoder, or why a model that looks like one is none."""
    from onnxsplit.views.decoder import decoder_lines

    if made.plan.decoder is not None:
        for text in decoder_lines(made.plan, made.plan.decoder):
            output.line(text)
        decoding = made.subject.decoding
        for note in decoding.decoder.claim.notes if decoding is not None else ():
            output.line(f"Beside the model: {note}.")
        prefill = decoding.prefill if decoding is not None else None
        if prefill is not None:
            output.line(
                f"The whole model takes {milliseconds(prefill.time_ns)} for a prompt of {prefill.tokens} tokens."
            )
    elif made.subject.no_decoder:
        output.line(f"Not cut as a decoder: {made.subject.no_decoder}.")
