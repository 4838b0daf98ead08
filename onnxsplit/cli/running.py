"""Options of commands that run a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.output import Command, Output, custom_ops_option, option, threads_option
from onnxsplit.cli.values import SizeParam
from onnxsplit.numbers import MOST_ATTEMPTS, MOST_INFLIGHT, MOST_SECONDS, MOST_SIZE, parse_whole, real_problem
from onnxsplit.plan import MOST_NODES

if TYPE_CHECKING:
    from runtime import Pipeline


def running_options(command: Command) -> Command:
    """How to run: options that a command takes as ``**running`` and turns into keywords with :func:`keywords`."""
    return threads_option(_with([*_OPTIONS, _MEMORY, _TIMING], custom_ops_option(command)))


def serving_options(command: Command) -> Command:
    """The same for ``serve``, whose ``--shared-memory`` is about the memory of clients."""
    return threads_option(_with([*_OPTIONS, _NO_MEMORY, _TIMING], custom_ops_option(command)))


def tracing_options(command: Command) -> Command:
    """What to record of a run that ends; taken as ``**running``, too."""
    return _with(_TRACING, command)


def _with(options: list[tuple[tuple[str, ...], dict[str, Any]]], command: Command) -> Command:
    for names, settings in reversed(options):
        command = option(*names, **settings)(command)
    return command


def _replicas(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> int | dict[int, int] | None:
    found: dict[int, int] = {}
    for text in texts:
        stage, equals, count = text.rpartition("=")
        number, index = parse_whole(count, MOST_NODES), parse_whole(stage, MOST_NODES - 1)
        if not number or (equals and index is None):
            wanted = f"neither N nor STAGE=N with N from 1 to {MOST_NODES}"
            raise click.BadParameter(f"{text!r} is {wanted}", context, parameter)
        if not equals and len(texts) > 1:
            raise click.BadParameter(f"{text!r} is for all stages; give it alone", context, parameter)
        if index is None:
            return number
        found[index] = number
    return found or None


def _timings(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, _, seconds = text.partition("=")
        try:
            found[name] = float(seconds)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=SECONDS", context, parameter) from None
        problem = real_problem(name, found[name], MOST_SECONDS)
        if problem:
            raise click.BadParameter(problem, context, parameter)
    return found


_OPTIONS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("--provider",), {"help": "cpu, cuda[:N], auto, or by stage: 0=cuda:0,1=cpu. Without it: the plan's."}),
    (
        ("--replicas",),
        {
            "multiple": True,
            "metavar": "N|STAGE=N",
            "callback": _replicas,
            "help": "Nodes of every stage, or of one; repeatable. Without it: the plan's.",
        },
    ),
    (
        ("--mode",),
        {"type": click.Choice(["sync", "async"]), "default": "async", "help": "One request at a time, or many."},
    ),
    (
        ("--inflight",),
        {"type": click.IntRange(1, MOST_INFLIGHT), "help": "Requests in flight at most. Without it: two a node."},
    ),
    (
        ("--inflight-bytes",),
        {"type": SizeParam(), "help": "Of their tensors at most, as 512M. Without it: a quarter of the free memory."},
    ),
    (
        ("--micro-batch",),
        {
            "type": click.IntRange(0, MOST_SIZE),
            "help": "Rows that run as one; larger batches are split, 0 never does. Without it: the plan's batch size.",
        },
    ),
    (
        ("--share-weights/--no-share-weights",),
        {
            "default": None,
            "help": "Whether nodes map one packed copy of a stage's weights. Without it: where a stage has replicas.",
        },
    ),
    (
        ("--balance",),
        {
            "type": click.Choice(["completion", "resource", "task", "latency", "round-robin"]),
            "default": "completion",
            "help": "How to choose among the nodes of a stage.",
        },
    ),
    (
        ("--attempts",),
        {
            "type": click.IntRange(1, MOST_ATTEMPTS),
            "default": 3,
            "help": "Give a request up when it killed so many nodes. 1: what a dead node had is an error at once.",
        },
    ),
]
_MEMORY: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--shared-memory/--no-shared-memory",),
    {"default": True, "help": "Whether tensors cross in shared memory on one host."},
)
_NO_MEMORY: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--no-shared-memory",),
    {"is_flag": True, "help": "Let tensors cross between nodes through sockets, not in shared memory."},
)
_TIMING: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--timing", "timings"),
    {
        "multiple": True,
        "metavar": "NAME=SECONDS",
        "callback": _timings,
        "help": "When a node counts as failed, and when it is tried again; NAME as in runtime.timings.Timings: "
        "silence_s, stall_s, lost_s, backoff_s, circuit_s, ... Repeatable.",
    },
)
_TRACING: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (
        ("--trace",),
        {
            "type": click.Path(path_type=Path),
            "metavar": "FILE.json",
            "help": "Write a timeline of the run; ui.perfetto.dev opens it.",
        },
    ),
    (("--trace-ops",), {"is_flag": True, "help": "With --trace: also every op, by ONNX Runtime's profiler."}),
]


def keywords(output: Output, running: Mapping[str, Any]) -> dict[str, Any]:
    """What :meth:`runtime.Pipeline.launch` is to be called with."""
    if running.get("trace_ops") and running["trace"] is None:
        raise click.UsageError("--trace-ops adds to a timeline; name its file with --trace FILE.json")
    from onnxsplit.files import check_outputs
    from runtime.timings import timings

    check_outputs(running.get("trace"))
    running = dict(running)
    if running.pop("no_shared_memory", False):
        running["shared_memory"] = False
    return {
        **running,
        "timings": timings(running["timings"]),
        "trace": running.get("trace") is not None,
        "progress": lambda ready, total: output.say(f"{ready} of {total} nodes ready"),
    }


def write_trace(output: Output, pipeline: Pipeline, file: Path | None) -> None:
    """Write the timeline of a pipeline that was closed, when it was asked for."""
    from onnxsplit.errors import InputError
    from onnxsplit.files import replacing

    if file is None:
        return
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(pipeline.trace()))
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}. Choose another file with --trace") from error
    output.line(f"Wrote {file}; open it in https://ui.perfetto.dev")
