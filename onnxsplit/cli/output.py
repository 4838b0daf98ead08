"""What commands share: options, progress on a terminal, tables, JSON, and one message for an error."""

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

from onnxsplit.cli.streams import OutputFailed
from onnxsplit.cli.values import THREADS
from onnxsplit.errors import OnnxsplitError, in_one_line, one_line
from onnxsplit.numbers import MOST_SIZE, parse_whole

Command = Callable[..., Any]

PLAN = click.argument("plan", type=click.Path(path_type=Path), metavar="DIR")
MODEL = click.argument("model", type=click.Path(path_type=Path))


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose help names its environment variable."""
    return click.option(*names, show_envvar=True, **settings)


def threads_option(command: Command) -> Command:
    """``--threads``."""
    return option("--threads", type=THREADS, help="Threads of every session.")(command)


def inputs_option(command: Command) -> Command:
    """``--inputs``."""
    return option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="Example inputs by name.")(
        command
    )


def dims_option(command: Command) -> Command:
    """``--dim NAME=N``, many times."""
    return option(
        "--dim",
        "dims",
        multiple=True,
        metavar="NAME=N",
        callback=_parse_dims,
        help="Size of a free dimension; 0 for a past that is empty. Repeatable.",
    )(command)


def io_options(command: Command) -> Command:
    """``--outputs``, ``--drop-output``, ``--keep-input``: what of the model is cut."""
    for names, metavar, callback, text in reversed(_ENDS):
        command = option(*names, multiple=True, metavar=metavar, callback=callback, help=text)(command)
    return command


def _parse_outputs(
    _context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...] | None:
    return tuple(name.strip() for text in value for name in text.split(",") if name.strip()) if value else None


_ENDS: tuple[tuple[tuple[str, ...], str, Callable[..., Any] | None, str], ...] = (
    (("--outputs",), "NAME,NAME", _parse_outputs, "Cut for these outputs alone. Repeatable."),
    (("--drop-output", "drop_outputs"), "NAME", None, "Leave this output out. Repeatable."),
    (
        ("--keep-input", "keep_inputs"),
        "NAME",
        None,
        "Leave this input with a default an input: without it, it becomes a constant. Repeatable.",
    ),
)


def custom_ops_option(command: Command) -> Command:
    """``--custom-ops``, many times. It loads code, so neither the environment nor a settings file can give it."""
    return option(
        "--custom-ops",
        "custom_ops",
        multiple=True,
        allow_from_autoenv=False,
        metavar="FILE.so",
        help="Library of custom ops that the model needs, or onnxruntime-extensions. It runs here as code. Repeatable.",
    )(command)


def custom_ops_words(given: Sequence[str]) -> str:
    """``--custom-ops`` as it was given, for a command to run next."""
    return "".join(f" --custom-ops {text}" for text in given)


def costs_option(command: Command) -> Command:
    """``--costs``."""
    return option(
        "--costs",
        type=click.Choice(["measured", "analytic"]),
        help="Where times come from. Without it: measured where the model runs here, else analytic.",
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
    """What a command says: results on stdout, progress and errors on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self._quiet = quiet or as_json
        self._verbose = verbose
        self._progress = sys.stderr.isatty() and not quiet
        self._shown = False

    def say(self, what: str) -> None:
        """Progress: one line that is replaced, on a terminal only; a line each when verbose."""
        if self._verbose:
            click.echo(what, err=True)
        elif self._progress:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write(f"\r\x1b[2K{what[: width - 1]}")
            sys.stderr.flush()
            self._shown = True

    def done(self) -> None:
        """Remove the progress line."""
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False

    def line(self, text: str = "") -> None:
        """A line for people; nothing when quiet or with ``--json``."""
        if not self._quiet:
            click.echo(text)

    def note(self, text: str) -> None:
        """A remark for people on stderr."""
        click.echo(text, err=True)

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object of ``--json``."""
        if self.as_json:
            click.echo(msgspec.json.encode(value, enc_hook=_printable))

    def fail(self, error: Exception) -> int:
        """Say what went wrong, in one message; with ``--verbose``, of what nobody foresaw, where too.

        Returns:
            The exit code.
        """
        self.done()
        kind, message = _in_words(error)
        message = _printable(message)
        if self._verbose and not isinstance(error, OnnxsplitError):
            traceback.print_exception(error)
        click.echo(f"onnxsplit: {message}", err=True)
        self.result({"error": {"type": kind, "message": message}})
        return 1

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people: the first column to the left, the others to the right."""
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write ``--dim a b`` as ``--dim a --dim b``; what the arguments still need is left to them."""
        options = {name: p for p in self.params if isinstance(p, click.Option) for name in p.opts}
        wanted = sum(isinstance(p, click.Argument) for p in self.params)
        result: list[str] = []
        spare: list[int] = []  # places in the result of values that an argument could claim instead
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
    """A file or a folder. An empty name is refused: to pathlib it is the folder that the command runs in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if value == "":
            self.fail("the name is empty; name a file or a folder", param, ctx)
        return super().convert(value, param, ctx)


def make_command(function: Callable[..., Any]) -> click.Command:
    """Make a command of a function that takes an :class:`Output` first: adds ``--json``, ``-q``, ``-v`` and errors."""

    @functools.wraps(function)
    def wrapped(*, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
        with _messages(output):
            function(output, **options)

    run: Command = wrapped
    for names, variable, words in (
        (("-v", "--verbose"), "ONNXSPLIT_VERBOSE", "Say each step, a line each, on stderr."),
        (("-q", "--quiet"), "ONNXSPLIT_QUIET", "Say nothing but errors."),
        (("--json", "as_json"), "ONNXSPLIT_JSON", "Print one JSON object instead of text."),
    ):
        run = option(*names, is_flag=True, envvar=variable, help=words)(run)
    made = click.command(cls=ManyValues)(run)
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


def _in_words(error: Exception) -> tuple[str, str]:
    """An error's type, as ``--json`` names it, and what to tell a user."""
    kind = type(error).__name__
    match error:
        case OnnxsplitError():
            return kind, str(error)
        case OSError():
            what = error.strerror or one_line(error)
            return "OSError", f"{os.fsdecode(error.filename)}: {what}" if error.filename is not None else what
        case MemoryError():
            return kind, "there is not enough memory for this; free some, or take a smaller model or smaller sizes"
        case RecursionError():
            return kind, "what was given is nested too deeply to be read"
        case _:
            return kind, f"internal error: {in_one_line(error)}. Please report it with what -v shows"


def _printable(value: object) -> str:
    """Text for JSON and messages; parts of file names that are not text come out as escapes."""
    return str(value).encode(errors="backslashreplace").decode()


def milliseconds(time_ns: float) -> str:
    """``12.3 ms``."""
    return f"{time_ns / 1e6:.3g} ms" if time_ns < 1e6 else f"{time_ns / 1e6:,.1f} ms"


def binary(size_bytes: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError


def percent(share: float) -> str:
    """``12.3 %``."""
    return f"{share * 100:.1f} %"
