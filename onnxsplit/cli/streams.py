"""Standard output and standard error that are full, closed, or no longer read.

standard output is full or closed     one message on standard error, exit code 1
its reader is gone                    no message, exit code 141, as after SIGPIPE (``onnxsplit ... | head``)
standard error is full or closed      messages are lost; nothing else changes

On a terminal, both print above the line of progress (:mod:`onnxsplit.cli.progress_line`).
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Any

from onnxsplit.cli.progress_line import PROGRESS

_STDIN, _STDOUT, _STDERR = range(3)


class OutputFailed(Exception):
    """Standard output cannot be written to.

    Attributes:
        reader_gone: whether the reader of the pipe is gone.
        code: the exit code of the process.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.reader_gone = error.errno == errno.EPIPE
        self.code = 128 + signal.SIGPIPE if self.reader_gone else 1


class _Stream(io.FileIO):
    """A standard stream. What is written to the terminal that shows progress is printed above the line of progress."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._beside_progress = _is_progress_terminal(descriptor)

    def write(self, data: Any) -> int:
        """Write as :class:`io.FileIO` does: None says that a pipe that does not block is full."""
        plain = super().write
        if not self._beside_progress:
            return plain(data)
        return PROGRESS.above(lambda: plain(data), data)  # type: ignore[return-value]  # typeshed leaves out None


class _Stdout(_Stream):
    def write(self, data: Any) -> int:
        """Write; a failure is an :class:`OutputFailed`. All output passes through here."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error) from error


class _Stderr(_Stream):
    def write(self, data: Any) -> int:
        """Write what can be written; a failure cannot be reported anywhere."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _is_progress_terminal(descriptor: int) -> bool:
    """Whether a descriptor is the terminal of standard error, which shows progress."""
    return os.isatty(_STDERR) and os.fstat(descriptor).st_rdev == os.fstat(_STDERR).st_rdev


def prepare() -> None:
    """Make both streams behave as described above, and let no other file take one of the three standard descriptors."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the parent; open() takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDONLY if descriptor == _STDOUT else os.O_RDWR)
    sys.stdout = _text(_Stdout(_STDOUT), sys.stdout)
    sys.stderr = _text(_Stderr(_STDERR), sys.stderr)


def _text(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    """A text stream. Characters that its encoding lacks, and bytes of file names that are not text, become escapes."""
    is_stderr = raw.fileno() == _STDERR
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=is_stderr or raw.isatty(),
        write_through=is_stderr,
    )


def drop_output() -> None:
    """Discard everything that is still to be written to standard output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _STDOUT)
    os.close(null)
