"""The interface of launchers, which start node processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onnxsplit.plan import Plan
from runtime.wire.security import Security

PROCESS_BYTES = 256 << 20
"""Memory of a node in addition to its stage: Python and ONNX Runtime."""


@dataclass(frozen=True)
class Rendezvous:
    """The addresses at which a coordinator and its nodes meet, and how their links are protected.

    Attributes:
        control: address for the nodes' control links.
        data: address for results.
        files: address at which nodes can fetch stage files; empty when they all see the plan's folder.
        home: a folder that only the user can open, for sockets on this host.
        security: how links over tcp are protected.
        trusted: returns the public keys of the nodes that are allowed now; None when links are plain.
        single_host: whether all nodes run on this host and share its cores.
    """

    control: str
    data: str
    files: str
    home: Path
    security: Security = Security()  # noqa: RUF009 - it is frozen
    trusted: Callable[[], frozenset[str]] | None = None
    single_host: bool = False


class Handle(Protocol):
    """A node process that a launcher has started.

    Attributes:
        pid: its process id; 0 while it is not known.
    """

    pid: int

    def fileno(self) -> int:
        """A descriptor that is readable when the process has ended."""
        ...

    def story(self) -> str:
        """How the process ended: its exit code or signal, the path of its log, and the log's last lines."""
        ...

    def kill(self) -> None:
        """Kill the process at once."""
        ...

    def end(self, grace_s: float) -> None:
        """Wait for the process to end, kill it after ``grace_s`` seconds, and reap it."""
        ...


class Launcher(Protocol):
    """Starts nodes.

    Attributes:
        rendezvous: where the nodes and the coordinator meet.
    """

    rendezvous: Rendezvous

    def start(self, *, connect: str, stage: int, replica: int, number: int) -> Handle:
        """Start one node.

        Args:
            connect: the coordinator's control address.
            stage: the stage that the node is to execute.
            replica: which replica of it.
            number: the node's number, which no other process of the pipeline has or had.
        """
        ...

    def beside(self, plan: Plan, *, replicas: tuple[int, ...] | None = None, background_s: float = 0.0) -> Launcher:
        """A new launcher of the same kind, for the nodes of another plan of the same model, beside those of this one.

        A launcher without this method cannot take part in a change of the plan while it serves.

        Args:
            plan: the other plan.
            replicas: the number of nodes of every stage; the plan's when None.
            background_s: how long the first node of each slot loads at idle priority at most; 0 for not at all. See
                :mod:`runtime.background`.

        Raises:
            LaunchFailed: there is no room for them.
            CustomOpsError: the plan needs a library of custom ops that was not given to this launcher.
        """
        ...

    def profile(self, stage: int, replica: int) -> list[dict[str, Any]]:
        """The events of ONNX Runtime's profile of a node that has ended; empty when there is none."""
        ...

    def close(self, *, keep_logs: bool) -> None:
        """Remove the launcher's folder with sockets and logs; with ``keep_logs``, everything except the logs."""
        ...
