"""Launchers: what starts node processes.

A launcher is asked for a node and returns a :class:`Handle`; the coordinator watches the handle's descriptor, which
becomes readable when the process is gone. Local processes are the first kind.
"""

from __future__ import annotations

from typing import Any, Protocol


class Handle(Protocol):
    """A process that was started for one node."""

    pid: int

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        ...

    def story(self) -> str:
        """How it ended: exit code or signal, the last lines of its log, and where the log is."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    def end(self, grace_s: float) -> None:
        """Wait for it to end by itself for a while, then kill it; reap it."""
        ...


class Launcher(Protocol):
    """Starts nodes."""

    def start(self, *, connect: str, stage: int, replica: int, number: int) -> Handle:
        """Start one node that reports to ``connect``; ``number`` is this process's alone."""
        ...

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:
        """The events of ONNX Runtime's profile that a node left when it ended; empty when it left none."""
        ...

    def close(self, *, keep_logs: bool) -> None:
        """Remove what the launcher made: its folder with sockets and logs."""
        ...
