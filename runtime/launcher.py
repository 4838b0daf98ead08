"""What a launcher is: it starts node processes and hands back handles to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.wire.security import Security


@dataclass(frozen=True)
class Rendezvous:
    """Where a coordinator and its nodes meet, and what protects them there.

    Attributes:
        control: where nodes report.
        data: where results come in.
        files: where nodes can ask for stage files; empty where they all see the plan's folder.
        home: a folder that only the user can open, for sockets of this host.
        security: what protects links by tcp.
        trusted: the public keys of the nodes that are allowed now; None where links are plain.
        single_host: all nodes run on this host and share its cores.
    """

    control: str
    data: str
    files: str
    home: Path
    security: Security = Security()  # noqa: RUF009 - it is frozen
    trusted: Callable[[], frozenset[str]] | None = None
    single_host: bool = False


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

    rendezvous: Rendezvous

    def start(self, *, connect: str, stage: int, replica: int, number: int) -> Handle:
        """Start one node that reports to ``connect``; ``number`` is this process's alone."""
        ...

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:
        """The events of ONNX Runtime's profile that a node left when it ended; empty when it left none."""
        ...

    def close(self, *, keep_logs: bool) -> None:
        """Remove what the launcher made: its folder with sockets and logs."""
        ...
