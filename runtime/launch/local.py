"""Nodes as processes on this host.

All of a pipeline's sockets and logs are in one folder that only the user can open. It is removed when the pipeline
closes (logs of nodes that failed are kept); when the launching process dies, the nodes remove it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxsplit.session import quiet_environment
from runtime.home import private_folder
from runtime.launcher import Rendezvous

_LOG_TAIL_BYTES = 2000
_LOG_TAIL_LINES = 10


class LocalHandle:
    """A node process. Its standard input is its lifeline: it ends when this process does."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._log = log
        self._descriptor = os.pidfd_open(process.pid)

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._descriptor

    def story(self) -> str:
        """How it ended, and its last words."""
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with self._log.open("rb") as stream:
            stream.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        words = "".join(f"\n    {line}" for line in lines) if lines else " (empty)"
        return f"{how}; its log {self._log} ends with:{words}"

    def kill(self) -> None:
        """End it at once, also when it is stopped or stuck."""
        self._process.kill()

    def end(self, grace_s: float) -> None:
        """Give it time, then kill it, and reap it."""
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()  # not before: to a node that still runs it means that this process died
        os.close(self._descriptor)


class LocalLauncher:
    """Starts nodes on this host. ``folder`` is there from the start and holds sockets and logs.

    Args:
        memory_bytes: of shared memory for a node's outputs at most; 0 for none.
        custom_ops: by stage, the libraries of custom ops that its nodes may load, as their command line names them.

    Attributes:
        folder: the sockets and logs.
        rendezvous: in it.
        module: what nodes execute.
    """

    module = "runtime.node"

    def __init__(self, *, memory_bytes: int, custom_ops: Mapping[int, Sequence[str]] | None = None) -> None:
        self._memory_bytes = memory_bytes
        self._custom_ops = custom_ops or {}
        self.folder = private_folder()
        self.rendezvous = Rendezvous(
            control=f"ipc://{self.folder / 'control'}",
            data=f"ipc://{self.folder / 'results'}",
            files="",
            home=self.folder,
            single_host=True,
        )

    def start(self, *, connect: str, stage: int, replica: int, number: int, more: Sequence[str] = ()) -> LocalHandle:
        """Start ``python -m runtime.node``, with modules of the user's folder kept out of its way.

        ``more`` are further words of that command.
        """
        log = self.folder / f"node-{stage}.{replica}.log"
        command = [sys.executable, "-P", "-m", self.module, "--connect", connect]
        command += ["--stage", str(stage), "--replica", str(replica), "--home", str(self.folder)]
        command += ["--number", str(number), "--memory", str(self._memory_bytes), *more]
        for library in self._custom_ops.get(stage, ()):
            command += ["--custom-ops", library]
        with log.open("ab") as stream:  # what the process before it said stays
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=quiet_environment()
            )
        return LocalHandle(process, log)

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:
        """What the node's session wrote into the folder."""
        for file in self.folder.glob(f"profile-{stage}.{replica}_*.json"):
            with suppress(ValueError):  # the node was killed while it wrote
                events: list[dict[str, Any]] = json.loads(file.read_bytes())
                return events
        return []

    def close(self, *, keep_logs: bool) -> None:
        """Remove the folder; with ``keep_logs``, all but the logs."""
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in self.folder.iterdir():
            if file.suffix != ".log":
                file.unlink(missing_ok=True)
