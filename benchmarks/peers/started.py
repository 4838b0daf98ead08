"""Processes of other systems, which benchmarks measure in turns with ours and control line by line."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import ended, example_path
from onnxsplit.session import quiet_environment

HERE = Path(__file__).parent
INFLIGHT = 4
"""Requests in flight: two per stage, the pipeline's default."""


class Unavailable(Exception):
    """A peer cannot run here; the message is the last line that it wrote."""


class PeerProcess:
    """A process that says ``ready``, and then answers each line with one line of JSON."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors
        self._line()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip().splitlines()
            raise Unavailable(words[-1] if words else "it ended without a word")
        return line

    def ask(self, line: object) -> Any:
        """Send a line, and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        return json.loads(self._line())

    def rate(self, seconds: float) -> float:
        """Measure the answers per second of a peer that runs a plan."""
        answer = self.ask(seconds)
        return float(answer["requests"] / answer["seconds"])


@contextmanager
def process(script: str, python: str, *words: object) -> Iterator[PeerProcess]:
    """Start a script of this folder in an interpreter that has its packages."""
    command = [python, str(HERE / script), *map(str, words)]
    with tempfile.TemporaryFile() as errors:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=quiet_environment()
        )
        try:
            yield PeerProcess(started, errors)
        finally:
            ended(started, 60)
            assert started.stdout is not None
            started.stdout.close()


@contextmanager
def running(name: str, python: str, plan: Path) -> Iterator[PeerProcess]:
    """Start a peer that runs the stages of a plan."""
    with process(f"{name}_peer.py", python, plan, example_path(plan), "--inflight", INFLIGHT) as peer:
        yield peer
