"""Options of the commands that run a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import (
    LANGUAGE_MODELS,
    MODELS,
    NODES,
    REQUESTS,
    RESULTS,
    Command,
    OptionTable,
    add_options,
    under,
)
from onnxsplit.cli.model_options import custom_ops_option, threads_option
from onnxsplit.cli.output import Output
from onnxsplit.cli.values import NumberParam, SizeParam
from onnxsplit.numbers import MOST_ATTEMPTS, MOST_INFLIGHT, MOST_SECONDS, MOST_SIZE, parse_whole, real_problem
from onnxsplit.plan_base import MOST_NODES
from runtime.balance.replicas import MOST_SCALE_S, ReplicaRange, Replicas
from runtime.wire.messages.sequences import MOST_NEW_TOKENS, MOST_ROWS

if TYPE_CHECKING:
    from runtime import Pipeline


def running_options(command: Command) -> Command:
    """Options for running a plan. A command takes them as keywords and passes them to :func:`keywords`."""
    return _with_options(command, _MEMORY)


def serving_options(command: Command) -> Command:
    """The same options for ``serve``, whose ``--shared-memory`` concerns the memory of clients."""
    return _with_options(command, _NO_MEMORY)


def _with_options(command: Command, memory: OptionTable) -> Command:
    command = custom_ops_option(command, MODELS)
    nodes = [*under(NODES, _NODES), *under(NODES, memory), *under(NODES, _TIMING)]
    command = add_options([*nodes, *under(REQUESTS, _REQUESTS), *under(LANGUAGE_MODELS, _DECODING)])(command)
    return threads_option(command, NODES)


def tracing_options(command: Command) -> Command:
    """Options for recording a timeline. A command passes them to :func:`keywords`, too."""
    return add_options(under(RESULTS, _TRACING))(command)


def parameter_names(*tables: OptionTable) -> list[str]:
    """The names under which a command is given the options of some tables."""
    return [names[-1].lstrip("-").replace("-", "_") for table in tables for names, _ in table]


def _replicas(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Replicas:
    counts: dict[int, int | ReplicaRange] = {}
    for text in texts:
        stage, equals, count = text.rpartition("=")
        number, index = _count(count), parse_whole(stage, MOST_NODES - 1)
        if number is None or (equals and index is None):
            allowed = f"neither N nor STAGE=N, with N from 1 to {MOST_NODES} or a range of such numbers, as 1:4"
            raise click.BadParameter(f"{text!r} is {allowed}", context, parameter)
        if not equals and len(texts) > 1:
            raise click.BadParameter(f"{text!r} is for all stages; give it alone", context, parameter)
        if index is None:
            return number
        if index in counts:
            raise click.BadParameter(f"{text!r} is the second number for stage {index}; give one", context, parameter)
        counts[index] = number
    return counts or None


def _count(text: str) -> int | ReplicaRange | None:
    """A number of replicas or a range, as ``2`` or ``1:4``; None if the text is neither."""
    ends = [parse_whole(part, MOST_NODES) for part in text.split(":", 1)]
    if ":" not in text:
        return ends[0] or None
    least, most = ends
    return ReplicaRange(least=least, most=most) if least and most and least <= most else None


def _timings(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    timings: dict[str, float] = {}
    for text in texts:
        name, _, seconds = text.partition("=")
        try:
            timings[name] = float(seconds)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=SECONDS", context, parameter) from None
        problem = real_problem(name, timings[name], MOST_SECONDS)
        if problem:
            raise click.BadParameter(problem, context, parameter)
    return timings


_NODES: OptionTable = [
    (
        ("--provider",),
        {
            "help": "Execution provider: cpu, cuda[:N], openvino, webgpu, auto, or by stage: 0=cuda:0,1=cpu. "
            "Default: the plan's."
        },
    ),
    (
        ("--replicas",),
        {
            "multiple": True,
            "metavar": "N|STAGE=N",
            "callback": _replicas,
            "help": "Number of nodes of every stage, or of one stage. With a range such as 1:4, the load decides, for "
            "nodes that are started on this host. Repeatable. Default: the plan's.",
        },
    ),
    (
        ("--scale-up-after",),
        {
            "type": NumberParam(0.001, MOST_SCALE_S),
            "default": 3.0,
            "metavar": "SECONDS",
            "help": "With a range of --replicas: how long requests must wait before a busy stage gets another node.",
        },
    ),
    (
        ("--scale-down-after",),
        {
            "type": NumberParam(0.001, MOST_SCALE_S),
            "default": 30.0,
            "metavar": "SECONDS",
            "help": "With a range of --replicas: how long a stage must have had a node too many before it loses one.",
        },
    ),
    (
        ("--share-weights/--no-share-weights",),
        {
            "default": None,
            "help": "Let the nodes of a stage map one packed copy of its weights. Default: where a stage has replicas.",
        },
    ),
    (
        ("--balance",),
        {
            "type": click.Choice(["completion", "resource", "task", "latency", "round-robin"]),
            "default": "completion",
            "help": "How a node is chosen among those of a stage.",
        },
    ),
]
_REQUESTS: OptionTable = [
    (
        ("--mode",),
        {
            "type": click.Choice(["sync", "async"]),
            "default": "async",
            "help": "Run one request at a time (sync) or many (async).",
        },
    ),
    (
        ("--inflight",),
        {
            "type": click.IntRange(1, MOST_INFLIGHT),
            "help": "Most requests in flight. Default: two to eight for each node.",
        },
    ),
    (
        ("--inflight-bytes",),
        {
            "type": SizeParam(),
            "help": "Most bytes of requests in flight, as 512M. Default: a quarter of the free memory.",
        },
    ),
    (
        ("--micro-batch",),
        {
            "type": click.IntRange(0, MOST_SIZE),
            "help": "Rows that run at once. Larger batches are split; 0 splits none. Default: the plan's batch size.",
        },
    ),
    (
        ("--attempts",),
        {
            "type": click.IntRange(1, MOST_ATTEMPTS),
            "default": 3,
            "help": "Number of nodes that a request may be tried on before it fails. 1: a request fails with its node.",
        },
    ),
]
_DECODING: OptionTable = [
    (
        ("--cache-bytes",),
        {
            "type": SizeParam(),
            "help": "Most bytes of caches on each node, as 2G. Default: a quarter of the free memory, "
            "divided by the number of nodes.",
        },
    ),
    (
        ("--max-rows",),
        {
            "type": click.IntRange(1, MOST_ROWS),
            "default": 16,
            "help": "Most texts that are continued at once, for each replica.",
        },
    ),
    (
        ("--max-length",),
        {"type": click.IntRange(2, MOST_SIZE), "help": "Most tokens of a text. Default: the model's."},
    ),
    (
        ("--prefill-chunk",),
        {
            "type": click.IntRange(1, MOST_NEW_TOKENS),
            "default": 128,
            "help": "Most tokens of a prompt that run at once.",
        },
    ),
    (
        ("--decode-groups",),
        {
            "type": click.IntRange(1, MOST_ROWS),
            "help": "Number of groups of sequences in flight. Default: as many as stages.",
        },
    ),
    (
        ("--prefix-reuse/--no-prefix-reuse",),
        {"default": True, "help": "Compute a beginning that several prompts share only once."},
    ),
]
_MEMORY: OptionTable = [
    (
        ("--shared-memory/--no-shared-memory",),
        {"default": True, "help": "Pass tensors between nodes of one host in shared memory."},
    )
]
_NO_MEMORY: OptionTable = [
    (
        ("--no-shared-memory",),
        {
            "is_flag": True,
            "help": "Pass tensors between nodes through sockets instead of shared memory.",
        },
    )
]
_TIMING: OptionTable = [
    (
        ("--timing", "timings"),
        {
            "multiple": True,
            "metavar": "NAME=SECONDS",
            "callback": _timings,
            "help": "Set a time limit after which a node counts as failed or is tried again, by its name in "
            "runtime.timings.Timings: silence_s, stall_s, lost_s, backoff_s, circuit_s, ... Repeatable.",
        },
    )
]
_TRACING: OptionTable = [
    (
        ("--trace",),
        {
            "type": click.Path(path_type=Path),
            "metavar": "FILE.json",
            "help": "Write a timeline of the run, which ui.perfetto.dev opens.",
        },
    ),
    (
        ("--trace-ops",),
        {"is_flag": True, "help": "Add every op to the timeline of --trace, with ONNX Runtime's profiler."},
    ),
]


def keywords(output: Output, running: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords for :meth:`onnxsplit.Pipeline.launch`."""
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
    """Write the timeline of a closed pipeline, if a file was given."""
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
