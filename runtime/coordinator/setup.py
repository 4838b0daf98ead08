"""The settings of a coordinator, and the sockets that it opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.plan import Plan
from runtime.balance.replicas import ReplicaRange
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.status import StatusServer
from runtime.files.server import FileServer
from runtime.launcher import Launcher, Rendezvous
from runtime.timings import Timings
from runtime.wire.links import AnsweringInlet, Inlet
from runtime.wire.messages.control import Policy
from runtime.wire.sockets import Sockets


@dataclass(frozen=True)
class Setup:
    """The settings of a coordinator.

    Attributes:
        folder: the plan directory.
        plan: its plan.
        plan_id: the plan's identity.
        ranges: the allowed numbers of nodes of every stage.
        scale_up_after_s: how long a stage with a range must be pressed before it gets another node.
        scale_down_after_s: how long it must have slack before it loses one.
        providers: the provider of every stage.
        threads: threads of every node's session; 0 for the plan's number.
        share_weights: whether the replicas of each stage map one copy of its weights.
        trace: whether to record the stages that each request passes, with times.
        profile: whether ONNX Runtime profiles the sessions.
        balance: how to choose among replicas.
        attempts: a request is refused after this many nodes were lost while they executed it.
        timings: when something counts as failed, and when to try again.
        memory_bytes: the most shared memory for the inputs of requests; 0 for none.
        elastic: whether to accept nodes beyond the number of replicas, for as long as they stay.
        rendezvous: where the nodes and the coordinator meet. Without a launcher, its home is removed at the end.
        launcher: starts the nodes; None waits for nodes that are started by hand.
        start_timeout_s: time for all nodes to become ready; None waits for ever.
        progress: called with the number of ready nodes and the number of all nodes whenever the former changes.
        sequences: the limits of sequences; None where the plan has no decoder.
        succeeds: whether nodes of another coordinator start its nodes: if one is lost before all are ready, nobody
            starts another, and the launch fails.
    """

    folder: Path
    plan: Plan
    plan_id: str
    ranges: tuple[ReplicaRange, ...]
    scale_up_after_s: float
    scale_down_after_s: float
    providers: tuple[str, ...]
    threads: int
    share_weights: tuple[bool, ...]
    trace: bool
    profile: bool
    balance: Policy
    attempts: int
    timings: Timings
    memory_bytes: int
    elastic: bool
    rendezvous: Rendezvous
    launcher: Launcher | None
    start_timeout_s: float | None
    progress: Callable[[int, int], None]
    sequences: SequenceLimits | None = None
    succeeds: bool = False

    @property
    def is_patient(self) -> bool:
        """Whether to wait for another node when one is lost before all were ready."""
        return self.launcher is None and not self.succeeds

    @property
    def replicas(self) -> tuple[int, ...]:
        """The number of nodes of every stage at the start."""
        return tuple(each.least for each in self.ranges)

    @property
    def scales(self) -> bool:
        """Whether the load decides about the number of nodes of a stage."""
        return not all(each.is_fixed for each in self.ranges)

    @property
    def shortcut(self) -> Path | None:
        """The socket path to which nodes on this host send results without frames; None without shared memory."""
        return self.rendezvous.home / "results.fragments" if self.memory_bytes else None

    @property
    def public_key(self) -> str:
        """The coordinator's public key; empty where links are plain."""
        pair = self.rendezvous.security.pair
        return pair.public if pair is not None else ""

    def trusted(self) -> frozenset[str] | None:
        """The public keys that are allowed now; None where links are plain."""
        trusted = self.rendezvous.trusted
        return None if trusted is None else trusted()


@dataclass(frozen=True)
class Channels:
    """The open sockets and servers of a running coordinator.

    Attributes:
        sockets: the sockets of the coordinator's thread.
        results: the sockets for requests and results.
        control: the inlet for control messages of nodes.
        data: the inlet for results.
        status: answers other processes that ask for the pipeline's status.
        files: gives stage files to nodes that do not see the plan's folder; None where all do.
    """

    sockets: Sockets
    results: Sockets
    control: AnsweringInlet
    data: Inlet
    status: StatusServer
    files: FileServer | None


@contextmanager
def open_channels(setup: Setup) -> Iterator[Channels]:
    """Open the sockets and servers of a coordinator, and close them at the end."""
    rendezvous, security = setup.rendezvous, setup.rendezvous.security
    with ExitStack() as stack:
        sockets = stack.enter_context(Sockets(linger_s=0.5, security=security))
        results = stack.enter_context(Sockets(security=security))
        control = sockets.answering(rendezvous.control)
        data = results.inlet(rendezvous.data, shortcut=setup.shortcut)
        files = None
        if rendezvous.files:
            server = FileServer(rendezvous.files, setup.folder, setup.plan, setup.plan_id, security=security)
            files = stack.enter_context(server)
        status = stack.enter_context(StatusServer(rendezvous.home))
        yield Channels(sockets, results, control, data, status, files)
