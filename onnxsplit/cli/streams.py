"""Standard output and standard error, where they may be full, closed, or read by nobody any more.

standard output full        one message on standard error, exit code 1
standard output closed      the same
its reader is gone          no message, exit code 141, as of a program that SIGPIPE ends (``onnxsplit ... | head``)
standard error full or gone what is said there is lost, and nothing else changes
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Any

_STDIN, _STDOUT, _STDERR = range(3)


class OutputFailed(Exception):
    """Standard output takes nothing more.

    Attributes:
        code: what the process is to exit with.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror}")
        self.nobody_reads = error.errno == errno.EPIPE
        self.code = 128 + signal.SIGPIPE if self.nobody_reads else 1


class _Stdout(io.FileIO):
    def write(self, data: Any) -> int:
        """Write, and say so in our own words when it fails: this is the one place that all output goes through."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error) from error


class _Stderr(io.FileIO):
    def write(self, data: Any) -> int:
        """Write what can be written; there is no other place to complain at."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Make both streams behave as said above, and keep the three standard descriptors from becoming other files."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by whoever started us; open() takes the lowest number that is free: this one
            os.open(os.devnull, os.O_RDONLY if descriptor == _STDOUT else os.O_RDWR)
    sys.stdout = _text(_Stdout(_STDOUT, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Stderr(_STDERR, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: Any) -> io.TextIOWrapper:
    """A text stream; what its encoding lacks, and parts of file names that are not text, come out as escapes."""
    is_stderr = raw.fileno() == _STDERR
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=is_stderr or raw.isatty(),
        write_through=is_stderr,
    )


def drop_output() -> None:
    """Let everything that is still to be written to standard output go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)
