"""Parts that all commands share: progress on a terminal, tables, JSON, and error messages."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from onnxsplit.cli.help import ManyValues, SectionOption
from onnxsplit.cli.progress_line import PROGRESS
from onnxsplit.cli.streams import OutputFailed
from onnxsplit.cli.values import FilePath
from onnxsplit.errors import OnnxsplitError, in_one_line, one_line, without_controls

if TYPE_CHECKING:
    from onnxsplit.cli.tables import Cell


class Output:
    """Output of a command: results go to stdout, progress and errors to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self._quiet = quiet or as_json
        self._verbose = verbose
        self._progress = (
            sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown") and not quiet
        )

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

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        may_go: Sequence[str] = (),
        left: Collection[str] = (),
        prose: Collection[str] = (),
    ) -> None:
        """Print a table for people, as :func:`~onnxsplit.cli.tables.fitted` lays it out.

        On a terminal that is too narrow, columns are left out, and a line says so. Anything else than a terminal gets
        all columns.
        """
        if self._quiet:
            return
        from onnxsplit.cli.tables import fitted, not_shown, table_console

        console = table_console()
        room = console.width if sys.stdout.isatty() else None
        table, dropped = fitted(columns, rows, room=room, may_go=may_go, left=left, prose=prose)
        console.print(table)
        if dropped:
            self.line(click.style(not_shown(dropped), dim=True))


_MODES = (
    (("--json", "as_json"), "ONNXSPLIT_JSON", "Print one JSON object instead of text."),
    (("-q", "--quiet"), "ONNXSPLIT_QUIET", "Print nothing but errors."),
    (("-v", "--verbose"), "ONNXSPLIT_VERBOSE", "Print a line for each step on stderr."),
)


def make_command(function: Callable[..., Any], *, modes: bool = True) -> click.Command:
    """Make a command from a function whose first argument is an :class:`Output`, and turn errors into one message.

    Args:
        function: the function.
        modes: whether the command has ``--json``, ``-q`` and ``-v``.
    """

    @functools.wraps(function)
    def wrapped(*, as_json: bool = False, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
        with _messages(output):
            function(output, **options)

    made = click.command(cls=ManyValues)(wrapped)
    for names, variable, words in _MODES if modes else ():
        made.params.append(SectionOption(names, is_flag=True, envvar=variable, help=words))
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
