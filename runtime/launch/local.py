"""Starts nodes as processes on this host.

All sockets and logs of a pipeline are in one folder that only the user can open. The folder is removed when the
pipeline closes, except for the logs of nodes that failed. When the launching process dies, the nodes remove it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnxsplit.custom_ops import find_libraries, needed_libraries
from onnxsplit.plan import Plan
from onnxsplit.session import quiet_environment, without_interrupts
from runtime.background import hold_back
from runtime.home import private_folder
from runtime.launcher import Rendezvous
from runtime.topology import ReplicaKey

_LOG_TAIL_BYTES = 2000
_LOG_TAIL_LINES = 10


class LocalHandle:
    """A node process. Its standard input is its lifeline: the node ends when this process ends."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, timer: threading.Timer | None = None) -> None:
        self.pid = process.pid
        self._timer = timer  # ends its time at idle priority; None for none
        self._process = process
        self._log = log
        self._descriptor = os.pidfd_open(process.pid)

    def fileno(self) -> int:
        """A descriptor that is readable when the process has ended."""
        return self._descriptor

    def story(self) -> str:
        """How the process ended, with the last lines of its log."""
        self._cancel_timer()
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with self._log.open("rb") as stream:
            stream.seek(max(0, self._log.stat().st_size - _LOG_TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        if not lines:
            return f"{how}; its log is empty"
        return f"{how}; its log {self._log} ends with:" + "".join(f"\n    {line}" for line in lines)

    def kill(self) -> None:
        """Kill the process at once, even if it is suspended or stuck."""
        self._process.kill()

    def end(self, grace_s: float) -> None:
        """Wait for the process to end, kill it after ``grace_s`` seconds, and reap it."""
        self._cancel_timer()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()  # not earlier: a running node takes this as the death of this process
        os.close(self._descriptor)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class LocalLauncher:
    """Starts nodes on this host.

    Args:
        memory_bytes: the largest size of a node's outputs in shared memory at once; 0 for no shared memory.
        custom_ops: for each stage, the libraries of custom ops that its nodes may load, as the command line names them.
        background_s: how long the first node of each slot loads at idle priority at most; 0 for not at all.

    Attributes:
        folder: a private folder for sockets and logs, which the constructor makes.
        rendezvous: where the nodes and the coordinator meet, in that folder.
        module: the Python module that node processes run.
    """

    module = "runtime.node"

    def __init__(
        self,
        *,
        memory_bytes: int,
        custom_ops: Mapping[int, Sequence[str]] | None = None,
        background_s: float = 0.0,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._custom_ops = custom_ops or {}
        self._background_s = background_s
        self._begun: set[ReplicaKey] = set()
        self.folder = private_folder()
        self.rendezvous = Rendezvous(
            control=f"ipc://{self.folder / 'control'}",
            data=f"ipc://{self.folder / 'results'}",
            files="",
            home=self.folder,
            single_host=True,
        )

    def start(self, *, connect: str, stage: int, replica: int, number: int, more: Sequence[str] = ()) -> LocalHandle:
        """Start ``python -P -m runtime.node``; with -P, modules in the current folder cannot replace installed ones.

        Args:
            connect: the coordinator's control address.
            stage: the stage that the node is to execute.
            replica: which replica of it.
            number: the node's number.
            more: further words of the command.
        """
        log = self.folder / f"node-{stage}.{replica}.log"
        command = [sys.executable, "-P", "-m", self.module, "--connect", connect]
        command += ["--stage", str(stage), "--replica", str(replica), "--home", str(self.folder)]
        command += ["--number", str(number), "--memory", str(self._memory_bytes), *more]
        for library in self._custom_ops.get(stage, ()):
            command += ["--custom-ops", library]
        seconds = self._background_s if (stage, replica) not in self._begun else 0.0  # a lost node is missed
        self._begun.add((stage, replica))
        if seconds:
            command.append("--background")
        with log.open("ab") as stream, without_interrupts():  # the log of an earlier process stays
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=quiet_environment()
            )
        return LocalHandle(process, log, hold_back(process.pid, seconds))

    def beside(
        self,
        plan: Plan,
        *,
        replicas: tuple[int, ...] | None = None,  # noqa: ARG002  this host has no places to reserve
        background_s: float = 0.0,
    ) -> LocalLauncher:
        """A launcher with a folder of its own, the same memory, and the libraries that the plan's stages need."""
        libraries = find_libraries(list(dict.fromkeys(path for paths in self._custom_ops.values() for path in paths)))
        needed = {
            stage.index: tuple(library.path for library in needed_libraries(libraries, plan, stage.index))
            for stage in plan.stages
            if stage.custom_ops
        }
        return LocalLauncher(memory_bytes=self._memory_bytes, custom_ops=needed, background_s=background_s)

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:
        """The events of ONNX Runtime's profile of a node that has ended; empty when there is none."""
        for file in self.folder.glob(f"profile-{stage}.{replica}_*.json"):
            with suppress(ValueError):  # the node was killed while it wrote
                events: list[dict[str, Any]] = json.loads(file.read_bytes())
                return events
        return []

    def close(self, *, keep_logs: bool) -> None:
        """Remove the folder; with ``keep_logs``, everything in it except logs that say something."""
        if not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in self.folder.iterdir():
            if file.suffix != ".log" or not file.stat().st_size:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # logs are left
            self.folder.rmdir()
