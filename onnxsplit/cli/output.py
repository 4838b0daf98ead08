"""Parts that all commands share: options, progress on a terminal, tables, JSON, and error messages."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from onnxsplit.cli.progress_line import PROGRESS
from onnxsplit.cli.streams import OutputFailed
from onnxsplit.cli.values import THREADS
from onnxsplit.errors import OnnxsplitError, in_one_line, one_line, without_controls
from onnxsplit.numbers import MOST_SIZE, MOST_STEP_ROWS, parse_whole

Command = Callable[..., Any]

PLAN = click.argument("plan", type=click.Path(path_type=Path), metavar="DIR")
MODEL = click.argument("model", type=click.Path(path_type=Path))


class SectionOption(click.Option):
    """An option that the help of its command lists under a heading.

    Attributes:
        section: the heading; options without one are listed last, as "Options".
    """

    def __init__(self, *names: Any, section: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose help names its environment variable; ``section`` is the heading that the help lists it under."""
    return click.option(*names, cls=SectionOption, show_envvar=True, **settings)


def path_option(*names: str, metavar: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that takes the path of a file or folder."""
    return option(*names, type=click.Path(path_type=Path), metavar=metavar, **settings)


def threads_option(command: Command) -> Command:
    """``--threads``."""
    return option("--threads", type=THREADS, metavar="N", help="Number of threads of every session.")(command)


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


_DECODER_OPTIONS: dict[str, dict[str, Any]] = {
    "--decoder": {
        "default": "auto",
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


class Output:
    """Output of a command: results go to stdout, progress and errors to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self._quiet = quiet or as_json
        self._verbose = verbose
        self._progress = sys.stderr.isatty() and not quiet

    def say(self, what: str) -> None:
        """Show progress: one line that is replaced, only on a terminal; with ``--verbose``, a line for each step."""
        if self._verbose:
            click.echo(what, err=True)
        elif self._progress:
            PROGRESS.show(what, sys.stderr.fileno())

    def done(self) -> None:
        """Remove the progress line."""
        PROGRESS.remove()

    def line(self, text: str = "") -> None:
        """Print a line for people; nothing with ``--quiet`` or ``--json``."""
        if not self._quiet:
            click.echo(text)

    def piece(self, text: str) -> None:
        """Print a part of a line at once; nothing with ``--json``."""
        if not self.as_json:
            click.echo(text, nl=False)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print a remark for people on stderr."""
        click.echo(text, err=True)

    def aside(self, text: str) -> None:
        """Print a dimmed remark for people on stderr; nothing with ``--quiet`` or ``--json``."""
        if not self._quiet:
            click.echo(click.style(text, dim=True), err=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the one JSON object of ``--json``; nothing without it."""
        if self.as_json:
            click.echo(msgspec.json.encode(value, enc_hook=_printable))

    def fail(self, error: Exception) -> int:
        """Print one message about an error; with ``--verbose``, also the traceback of an unforeseen one.

        Returns:
            The exit code.
        """
        self.done()
        kind, message = _described(error)
        message = _printable(without_controls(message))
        if self._verbose and not isinstance(error, OnnxsplitError):
            traceback.print_exception(error)
        click.echo(f"onnxsplit: {message}", err=True)
        self.result({"error": {"type": kind, "message": message}})
        return 1

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table for people: the first column is aligned to the left, the others to the right."""
        if self._quiet:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for position, column in enumerate(columns):
            table.add_column(column, justify="right" if position else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False).print(table)


class ManyValues(click.Command):
    """A command whose repeatable options also take several values at once: ``--dim a=1 b=2``."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their sections; those without one come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for parameter in sorted(options, key=lambda one: not getattr(one, "section", "")):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write ``--dim a b`` as ``--dim a --dim b``; the last values are left to arguments that still need one."""
        options = {name: p for p in self.params if isinstance(p, click.Option) for name in p.opts}
        wanted = sum(isinstance(p, click.Argument) and p.required for p in self.params)
        result: list[str] = []
        spare: list[int] = []  # positions in the result of values that an argument could take instead
        many, position = None, 0
        while position < len(args):
            token = args[position]
            option = options.get(token)
            if token.startswith("-"):
                many = token if option is not None and option.multiple else None
                takes_value = option is not None and not option.is_flag
                result += args[position : position + 1 + takes_value]
                position += 1 + takes_value
                continue
            if many is not None:
                result += [many, token]
                spare.append(len(result) - 1)
            else:
                wanted -= 1
                result.append(token)
            position += 1
        claimed = {place - 1 for place in spare[len(spare) - wanted :]} if wanted > 0 else set()
        return super().parse_args(ctx, [token for place, token in enumerate(result) if place not in claimed])


class FilePath(click.Path):
    """A file or a folder. An empty name is refused, because pathlib takes it for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail on an empty name."""
        if value == "":
            self.fail("the name is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


def make_command(function: Callable[..., Any]) -> click.Command:
    """Make a command from a function whose first argument is an :class:`Output`.

    Adds ``--json``, ``-q`` and ``-v``, and turns every error into one message.
    """

    @functools.wraps(function)
    def wrapped(*, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
        with _messages(output):
            function(output, **options)

    made = click.command(cls=ManyValues)(wrapped)
    for names, variable, words in (
        (("--json", "as_json"), "ONNXSPLIT_JSON", "Print one JSON object instead of text."),
        (("-q", "--quiet"), "ONNXSPLIT_QUIET", "Print nothing but errors."),
        (("-v", "--verbose"), "ONNXSPLIT_VERBOSE", "Print a line for each step on stderr."),
    ):
        made.params.append(SectionOption(names, is_flag=True, envvar=variable, show_envvar=True, help=words))
    for parameter in made.params:
        if isinstance(parameter.type, click.Path):
            parameter.type = FilePath(path_type=Path, exists=parameter.type.exists)
    return made


@contextmanager
def _messages(output: Output) -> Iterator[None]:
    try:
        yield
    except (OutputFailed, click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        raise SystemExit(output.fail(error)) from error
    except KeyboardInterrupt:
        output.done()
        click.echo("onnxsplit: interrupted", err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        output.done()


def _described(error: Exception) -> tuple[str, str]:
    """An error's type, as ``--json`` names it, and the message for a user."""
    kind = type(error).__name__
    match error:
        case OnnxsplitError():
            return kind, str(error)
        case OSError():
            what = error.strerror or one_line(error)
            return "OSError", f"{os.fsdecode(error.filename)}: {what}" if error.filename is not None else what
        case MemoryError():
            return kind, "there is not enough memory for this; free some, or use a smaller model or smaller sizes"
        case RecursionError():
            return kind, "the input is nested too deeply to be read"
        case _:
            return kind, f"internal error: {in_one_line(error)}. Please report it with the output of -v"


def _printable(value: object) -> str:
    """A value as text for JSON and messages; bytes of file names that are not text become escapes."""
    return str(value).encode(errors="backslashreplace").decode()


def milliseconds(time_ns: float) -> str:
    """A time as text: ``12.3 ms``."""
    return f"{time_ns / 1e6:.3g} ms" if time_ns < 1e6 else f"{time_ns / 1e6:,.1f} ms"


def binary(size_bytes: float) -> str:
    """A number of bytes as text: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError


def percent(share: float) -> str:
    """A share as text: ``12.3 %``."""
    return f"{share * 100:.1f} %"
