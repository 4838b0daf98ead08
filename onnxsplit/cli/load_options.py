"""Options of ``onnxsplit load``, in the words of Triton's perf_analyzer where it has the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from onnxsplit.cli.help import MEASURING, OptionTable
from onnxsplit.cli.running import parameter_names
from onnxsplit.cli.values import NumberParam, RangeParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE, parse_whole

_MOST_RATE_PER_S, _MOST_CONCURRENCY = 1e6, 10_000
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of HTTP
_OWN_HEADERS = ("content-length", "transfer-encoding", "inference-header-content-length")
_LOAD, _REQUEST, _TEXT = "The load", "The requests", "Texts, for URLs that end with /v1"


def _shapes(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        shape = [parse_whole(size, MOST_SIZE) for size in sizes.split(",")]
        if not name or None in shape:
            raise click.BadParameter(f"{text!r} is not NAME:SIZE,SIZE,... as input:1,3,224,224", context, parameter)
        shapes[name] = tuple(size for size in shape if size is not None)
    return shapes


def _headers(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not _HEADER.fullmatch(name.strip()) or not text.isprintable() or not text.isascii():
            raise click.BadParameter("it is not NAME:VALUE, as 'Authorization: Bearer TOKEN'", context, parameter)
        if name.strip().lower() in _OWN_HEADERS:
            raise click.BadParameter(
                f"{name.strip()} says how long a request is, and is set by load", context, parameter
            )
        headers[name.strip()] = value.strip()
    return headers


def _fields(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name:
            raise click.BadParameter(f"{text!r} is not NAME:VALUE, as ignore_eos:true", context, parameter)
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields


LOAD_OPTIONS: OptionTable = [
    (
        ("--rate", "--request-rate-range", "rate"),
        {
            "type": RangeParam(whole=False, most=_MOST_RATE_PER_S),
            "metavar": "N|START:END[:STEP]",
            "section": _LOAD,
            "help": "Requests per second, whether or not answers come. Without STEP, rates double.",
        },
    ),
    (
        ("--concurrency", "--concurrency-range", "concurrency"),
        {
            "type": RangeParam(whole=True, most=_MOST_CONCURRENCY),
            "metavar": "N|START:END[:STEP]",
            "section": _LOAD,
            "help": "Requests in flight: each answer starts the next. Without STEP, they double.  [default: 1]",
        },
    ),
    (
        ("--request-distribution",),
        {
            "type": click.Choice(["constant", "poisson"]),
            "default": "constant",
            "section": _LOAD,
            "help": "Gaps between the requests of --rate: all equal, or exponential, as those of many clients are.",
        },
    ),
    (
        ("--seed",),
        {
            "type": click.IntRange(0, MOST_SIZE),
            "default": 0,
            "metavar": "N",
            "section": _LOAD,
            "help": "Seed of exponential gaps.",
        },
    ),
    (
        ("-l", "--latency-threshold"),
        {
            "type": NumberParam(0, MOST_SECONDS * 1e3, min_open=True),
            "metavar": "MS",
            "section": _LOAD,
            "help": "Search the range for the strongest load whose latency is at most MS: the p99, or --percentile.",
        },
    ),
    (
        ("-m", "--model"),
        {"metavar": "NAME", "section": _REQUEST, "help": "Model of the server. Default: the only one."},
    ),
    (
        ("--input-data",),
        {
            "multiple": True,
            "metavar": "FILE|random|zero",
            "section": _REQUEST,
            "help": "Inputs: .npz with one request, or .json as perf_analyzer reads it. All are sent in turn. "
            "Repeatable. Default: a plan's example inputs; for a server random.",
        },
    ),
    (
        ("--shape", "shapes"),
        {
            "multiple": True,
            "callback": _shapes,
            "metavar": "NAME:SIZE,...",
            "section": _REQUEST,
            "help": "Shape of an input whose sizes may vary. Repeatable.",
        },
    ),
    (
        ("-b", "--batch-size"),
        {"type": click.IntRange(1, MOST_SIZE), "metavar": "N", "section": _REQUEST, "help": "Rows of each request."},
    ),
    (
        ("-H", "--header", "headers"),
        {
            "multiple": True,
            "callback": _headers,
            "metavar": "NAME:VALUE",
            "section": _REQUEST,
            "help": "Header of each request. Repeatable.",
        },
    ),
    (
        ("--endpoint",),
        {
            "type": click.Choice(["chat", "completions"]),
            "default": "chat",
            "section": _TEXT,
            "help": "Ask for answers to conversations, or for continuations of prompts.",
        },
    ),
    (
        ("--max-tokens",),
        {
            "type": click.IntRange(1, MOST_SIZE),
            "default": 64,
            "metavar": "N",
            "section": _TEXT,
            "help": "Most tokens of an answer.",
        },
    ),
    (
        ("--prompt-words",),
        {
            "type": click.IntRange(1, 100_000),
            "default": 64,
            "metavar": "N",
            "section": _TEXT,
            "help": "Words of the prompts that are made up where there is no --input-data.",
        },
    ),
    (
        ("--extra-inputs",),
        {
            "multiple": True,
            "callback": _fields,
            "metavar": "NAME:VALUE",
            "section": _TEXT,
            "help": "Further field of each request, as ignore_eos:true. Repeatable.",
        },
    ),
    (
        ("--warmup",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 1.0,
            "metavar": "SECONDS",
            "section": MEASURING,
            "help": "Time at the beginning of each load that is not measured.",
        },
    ),
    (
        ("-p", "--measurement-interval"),
        {
            "type": NumberParam(1, MOST_SECONDS * 1e3),
            "default": 2000.0,
            "metavar": "MS",
            "section": MEASURING,
            "help": "Length of one window. Each load is measured until three windows in a row agree.",
        },
    ),
    (
        ("-s", "--stability-percentage"),
        {
            "type": NumberParam(0, 1000, min_open=True),
            "default": 10.0,
            "metavar": "PERCENT",
            "section": MEASURING,
            "help": "How far the rate and the latency of each window may be from the mean of the three.",
        },
    ),
    (
        ("-r", "--max-trials"),
        {
            "type": click.IntRange(3, 1_000_000),
            "default": 10,
            "metavar": "N",
            "section": MEASURING,
            "help": "Most windows of each load.",
        },
    ),
    (
        ("--request-count",),
        {
            "type": click.IntRange(1, 10**9),
            "metavar": "N",
            "section": MEASURING,
            "help": "Number of requests of each load to measure, instead of windows.",
        },
    ),
    (
        ("--percentile",),
        {
            "type": NumberParam(0, 100, min_open=True),
            "metavar": "N",
            "section": MEASURING,
            "help": "Percentile of the latency that must agree between windows. Default: the mean.",
        },
    ),
    (
        ("-f", "--csv"),
        {
            "type": click.Path(path_type=Path),
            "metavar": "FILE.csv",
            "section": MEASURING,
            "help": "Write the results to this file, too, in perf_analyzer's columns.",
        },
    ),
]


def check_fitting(context: click.Context, target: str, running: Iterable[str]) -> None:
    """Refuse options of the command line that mean nothing for this target or load, as they would change nothing.

    Settings of files and of the environment are not refused: they are for several targets.

    Args:
        context: the command's context.
        target: the URL or the folder.
        running: the names of the parameters that say how to run a plan.
    """
    sources = {option.name: context.get_parameter_source(str(option.name)) for option in context.command.params}
    if re.fullmatch(r"[^/:]+:\d+(/v1/?)?", target) and not Path(target).exists():
        raise click.UsageError(f"{target} is not a folder; for a server, write http://{target} or grpc://{target}")
    url, texts = "://" in target, "://" in target and target.rstrip("/").endswith("/v1")
    of_texts = parameter_names([row for row in LOAD_OPTIONS if row[1]["section"] == _TEXT])
    rules: list[tuple[bool, Iterable[str], str]] = [
        (url, running, "says how to run a plan, and a URL is that of a server that runs already"),
        (not url, ("model", "headers"), "is for servers; a plan is one model, and takes no headers"),
        (not texts, of_texts, "is for texts, and for URLs that end with /v1"),
        (texts, ("shapes", "batch_size"), "is for tensors, and this URL answers with texts"),
        (context.params["rate"] is None, ("request_distribution", "seed"), "is for loads with --rate"),
    ]
    for wrong, names, why in rules:
        for option in context.command.params:
            if wrong and option.name in names and sources[option.name] is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{max(option.opts, key=len)} {why}; leave it out")
