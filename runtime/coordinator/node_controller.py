"""Performs the effects on nodes: starts and ends their processes, and sends them messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future

from onnxsplit.plan import CALLER
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import Met
from runtime.coordinator.failure_detector import FailureDetector
from runtime.coordinator.interpreter import NodeEffects
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.setup import Channels, Setup
from runtime.coordinator.state import CoordinatorState
from runtime.coordinator.succession import Succession, TakeOver
from runtime.errors import PipelineError
from runtime.launcher import Handle
from runtime.logs import log_event
from runtime.topology import ReplicaKey
from runtime.wire import codec
from runtime.wire.messages.control import Assign, Cancel, Fate, Peer, Share, Stop, Trust, refusal

_log = logging.getLogger("runtime.coordinator")
_STOP_GRACE_S = 3.0


class NodeController(NodeEffects):
    """Sends messages to the nodes and owns their processes. Only the coordinator's thread uses it.

    Args:
        setup: how to run the plan.
        machine: the coordinator's state machine, which is only read here.
        links: the data links to the nodes.
        detector: watches the nodes.
        channels: the coordinator's sockets and servers.
        ready: gets the address to which nodes connect, or the reason why the pipeline will never be ready.
        all_drained: is done when no request is in flight and none will be.

    Attributes:
        handles: the processes that were started here, by the number of the node.
        lost: the nodes whose loss is not handled yet, by number: what happened, and what each is told to do.
        unreached: the identities of the nodes to which a message could not be sent.
        trusted: the allowed public keys, as last sent to the nodes.
        succession: asks nodes to start their successors.
        take_over: listens at further addresses for nodes.
    """

    def __init__(
        self,
        setup: Setup,
        machine: CoordinatorState,
        links: DataLinks,
        detector: FailureDetector,
        channels: Channels,
        *,
        ready: Future[str],
        all_drained: Future[None],
    ) -> None:
        self.handles: dict[int, Handle] = {}
        self.lost: dict[int, tuple[str, Fate]] = {}
        self.unreached: set[bytes] = set()
        self.trusted = setup.trusted() or frozenset()
        self._setup = setup
        self._machine = machine
        self._links = links
        self._detector = detector
        self._channels = channels
        self._ready = ready
        self._all_drained = all_drained
        self.succession = Succession(machine.roster, self.tell, setup.public_key)
        self.take_over = TakeOver(channels.sockets, channels.control)

    def tell(self, identity: bytes, header: bytes) -> bool:
        """Send a message to a node; False when its link is broken, until the node is heard again."""
        reached = self._channels.control.send(identity, header)
        if not reached:
            self.unreached.add(identity)
        return reached

    def tell_trusted(self, identity: bytes) -> None:
        """Tell a node which public keys are allowed."""
        self.tell(identity, codec.encode(Trust(tuple(self.trusted))))

    def take_for_dead(self, verdicts: Mapping[int, str], fate: Fate = "rejoin") -> None:
        """Declare nodes dead, and end those of their processes that were started here.

        Args:
            verdicts: by number, what happened to each.
            fate: what they are told to do if they still live.
        """
        for number, reason in verdicts.items():
            self._detector.end(number)
            self.lost.setdefault(number, (reason, fate))
            if number in self.handles:
                self.handles[number].kill()

    def look_for_exits(self, ready: set[object]) -> None:
        """Record the processes that have ended, by the descriptors that are readable."""
        for number, handle in list(self.handles.items()):
            if handle.fileno() in ready:
                self._channels.sockets.unwatch(handle.fileno())
                del self.handles[number]
                self._detector.end(number)
                self.lost.setdefault(number, (handle.story(), "rejoin"))
                handle.end(0.0)

    def end_processes(self) -> None:
        """Wait a while for all processes to end, then kill them."""
        deadline = time.monotonic() + _STOP_GRACE_S
        for handle in self.handles.values():
            handle.end(max(0.0, deadline - time.monotonic()))

    # Effects

    def start_node(self, slot: ReplicaKey, number: int) -> None:
        """Start a process. If that fails, for example without free memory or descriptors, it is tried again."""
        stage, replica = slot
        log_event(_log, logging.INFO, "node starts", stage=stage, replica=replica, number=number)
        launcher, address = self._setup.launcher, self._channels.control.address
        if launcher is None:
            return
        try:
            handle = launcher.start(connect=address, stage=stage, replica=replica, number=number)
        except OSError as error:
            self.lost[number] = f"could not be started: {error}", "rejoin"
            return
        self.handles[number] = handle
        self._channels.sockets.watch(handle.fileno())

    def kill_node(self, number: int) -> None:
        """End a process at once, if it was started here."""
        if number in self.handles:
            self.handles[number].kill()

    def give_stage(self, identity: bytes, slot: ReplicaKey) -> None:
        """Tell a node which stage it executes, and begin to watch it."""
        setup, files = self._setup, self._channels.files
        stage, replica = slot
        assign = Assign(
            plan_id=setup.plan_id,
            folder=str(setup.folder.resolve()),
            files=files.address if files is not None else "",
            stage=stage,
            replica=replica,
            provider=setup.providers[stage],
            threads=setup.threads,
            share_weights=setup.share_weights[stage],
            profile=setup.profile,
            beat_ns=int(setup.timings.beat_s * 1e9),
            silence_ns=int(setup.timings.silence_s * 1e9),
            balance=setup.balance,
            slots=setup.sequences.slots if setup.sequences is not None else 0,
            length=setup.sequences.length if setup.sequences is not None else 0,
        )
        self._channels.control.send(identity, codec.encode(Trust(tuple(self.trusted))))
        self._channels.control.send(identity, codec.encode(assign))
        node = self._machine.roster.by_identity(identity)
        if node is not None:
            predicted_ns = setup.plan.stages[stage].predicted_time_ns or 0
            self._detector.begin(node.number, predicted_ns, time.monotonic_ns())

    def introduce(self, identities: tuple[bytes, ...], *, meet: bool) -> Met | None:
        """Tell nodes which processes exist; with ``meet``, also connect to the nodes."""
        roster, channels = self._machine.roster, self._channels
        starting = self._machine.state is PipelinePhase.STARTING
        shortcut, key = str(self._setup.shortcut or ""), self._setup.public_key
        caller = Peer(0, CALLER, 0, False, channels.data.address, shortcut, self._links.memory, key)
        for identity, wire in roster.introduce(identities, caller, everyone=starting):
            self.tell(identity, codec.encode(wire))
        if not meet:
            return None
        peers = roster.peers(None, everyone=starting)
        for number in self._links.outlets.keys() - {peer.number for peer in peers}:
            self._detector.end(number)
        mapped, failures = self._links.meet(caller, peers, channels.results)
        self.take_for_dead(failures)
        return Met(mapped, time.monotonic_ns())

    def share_memory(self, identity: bytes | None, readers: tuple[int, ...]) -> None:
        """Let a node lend its memory to processes; the caller's own where ``identity`` is None."""
        if identity is None:
            self._links.lend_memory(readers)
        else:
            self.tell(identity, codec.encode(Share(readers)))

    def send_away(self, identity: bytes, reason: str, fate: Fate, *, again: bool) -> None:
        """Tell a node to stop, and what to do then."""
        log_event(_log, logging.DEBUG if again else logging.INFO, "node sent away", reason=reason)
        message = refusal(reason) if fate == "refused" else codec.encode(Stop(reason, fate))
        self._channels.control.send(identity, message)

    def forget(self, request: int, attempt: int, identities: tuple[bytes, ...]) -> None:
        """Tell nodes that an attempt was given up."""
        for identity in identities:
            self._channels.control.send(identity, codec.encode(Cancel(request, attempt)))

    def link_changed(self, story: str, *, is_dead: bool) -> None:
        """Log that a link is dead, or works again."""
        _log.log(logging.WARNING if is_dead else logging.INFO, "%s", story)

    def announce(self, error: PipelineError | None) -> None:
        """Tell the caller that the pipeline is ready, or why it will never be."""
        if error is None:
            log_event(_log, logging.INFO, "pipeline ready", nodes=len(self._machine.roster.nodes))
            self._ready.set_result(self._channels.control.address)
        else:
            self._ready.set_exception(error)

    def drained(self) -> None:
        """Tell the caller that no request is in flight, and none will be."""
        if not self._all_drained.done():
            self._all_drained.set_result(None)
