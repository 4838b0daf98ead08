"""Arguments and options that say which model or plan, and how the model is examined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from onnxsplit.cli.help import Command, option, path_option
from onnxsplit.cli.values import THREADS
from onnxsplit.numbers import MOST_SIZE, MOST_STEP_ROWS, parse_whole

PLAN = click.argument("plan", type=click.Path(path_type=Path), metavar="DIR")
MODEL = click.argument("model", type=click.Path(path_type=Path))


def threads_option(command: Command, section: str = "") -> Command:
    """``--threads``."""
    text = "Number of threads of every session."
    return option("--threads", type=THREADS, metavar="N", section=section, help=text)(command)


def inputs_option(command: Command, section: str = "", *, several: bool = False) -> Command:
    """``--inputs``."""
    text = "File with example inputs by name." + " Repeatable: answers are compared on all." * several
    return path_option("--inputs", multiple=several, metavar="FILE.npz", section=section, help=text)(command)


examples_option = functools.partial(inputs_option, several=True)


def dims_option(command: Command, section: str = "") -> Command:
    """``--dim NAME=N``, repeatable."""
    return option(
        "--dim",
        "dims",
        multiple=True,
        metavar="NAME=N",
        section=section,
        callback=_parse_dims,
        help="Size of a free dimension that costs are taken at; 0 for an empty key/value cache. Repeatable.",
    )(command)


def io_options(command: Command, section: str = "") -> Command:
    """``--outputs``, ``--drop-output``, ``--keep-input``: the inputs and outputs that the model is cut with."""
    for names, metavar, callback, text in reversed(_IO_OPTIONS):
        settings = {"metavar": metavar, "callback": callback, "section": section, "help": text}
        command = option(*names, multiple=True, **settings)(command)
    return command


def examine_options(command: Command) -> Command:
    """Options of commands that examine a model: costs, sizes, example inputs, inputs and outputs, custom ops."""
    section = "The model and its costs"
    for add in (decoder_options, custom_ops_option, io_options, examples_option, dims_option, costs_option):
        command = add(command, section)
    return command


def decoder_options(command: Command, section: str = "") -> Command:
    """``--decoder``, ``--decode-rows``, ``--context``, ``--cache-tokens``."""
    for name, settings in reversed(_DECODER_OPTIONS.items()):
        command = option(name, section=section, **settings)(command)
    return command


def _parse_decoder(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    return value.lower() if value.lower() in ("auto", "off") else value


_DECODER_OPTIONS: dict[str, dict[str, Any]] = {
    "--decoder": {
        "default": "auto",
        "callback": _parse_decoder,
        "metavar": "auto|off|FILE",
        "help": "Whether the model is a decoder whose caches stay on the nodes. auto: found out and proven by runs; "
        "off: caches are ordinary inputs and outputs; FILE: TOML with what is to be taken for granted.",
    },
    "--decode-rows": {
        "type": click.IntRange(1, MOST_STEP_ROWS),
        "default": 4,
        "metavar": "N",
        "help": "For a decoder: number of sequences in the step that costs are taken at.",
    },
    "--context": {
        "type": click.IntRange(0, MOST_SIZE),
        "default": 512,
        "metavar": "N",
        "help": "For a decoder: number of positions of each of these sequences before the step.",
    },
    "--cache-tokens": {
        "type": click.IntRange(0, MOST_SIZE),
        "metavar": "N",
        "help": "For a decoder: positions, over all sequences, for which stages need memory. Without it: those of the "
        "step.",
    },
}


def _parse_outputs(
    _context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...] | None:
    return tuple(name.strip() for text in value for name in text.split(",") if name.strip()) if value else None


_IO_OPTIONS: tuple[tuple[tuple[str, ...], str, Callable[..., Any] | None, str], ...] = (
    (("--outputs",), "NAME,NAME", _parse_outputs, "Keep only these outputs of the model. Repeatable."),
    (("--drop-output", "drop_outputs"), "NAME", None, "Leave out this output. Repeatable."),
    (
        ("--keep-input", "keep_inputs"),
        "NAME",
        None,
        "Keep this input, which has a default value, as an input; otherwise it becomes a constant. Repeatable.",
    ),
)


def custom_ops_option(command: Command, section: str = "") -> Command:
    """``--custom-ops``, repeatable. It loads code, so neither the environment nor a settings file can give it."""
    return option(
        "--custom-ops",
        "custom_ops",
        multiple=True,
        allow_from_autoenv=False,
        metavar="FILE.so",
        section=section,
        help="Library of custom ops that the model needs, or onnxruntime-extensions. Its code runs on this host. "
        "Repeatable.",
    )(command)


def custom_ops_words(given: Sequence[str]) -> str:
    """``--custom-ops`` as it was given, for the text of the command to run next."""
    return "".join(f" --custom-ops {text}" for text in given)


def costs_option(command: Command, section: str = "") -> Command:
    """``--costs``."""
    return option(
        "--costs",
        type=click.Choice(["measured", "analytic"]),
        section=section,
        help="Source of the times of ops. Without it: measured if the model runs on this host, else analytic.",
    )(command)


def _parse_dims(context: click.Context, parameter: click.Parameter, value: Sequence[str]) -> dict[str, int]:
    dims = {}
    for text in value:
        name, equals, size = text.rpartition("=")
        number = parse_whole(size, MOST_SIZE)
        if not equals or not name or number is None:
            raise click.BadParameter(f"{text!r} is not NAME=N with N from 0 to {MOST_SIZE}", context, parameter)
        dims[name] = number
    return dims
