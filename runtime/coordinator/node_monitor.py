"""Exchanges heartbeats with the nodes, and finds dead nodes and dead links."""

from __future__ import annotations

import logging
import time

from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import CoordinatorEvent, LinksSeen, Reconnected, TimedOut
from runtime.coordinator.failure_detector import FailureDetector
from runtime.coordinator.interpreter import control_event
from runtime.coordinator.node_controller import NodeController
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.reach import Reachability
from runtime.coordinator.setup import Channels, Setup
from runtime.coordinator.state import CoordinatorState
from runtime.errors import PipelineError, ProtocolError
from runtime.logs import DropLog
from runtime.wire import codec
from runtime.wire.messages.control import (
    Beat,
    Hello,
    NodeBeat,
    Stop,
    Succeeded,
    SucceedRefused,
    SuccessorEnded,
    refusal,
)
from runtime.wire.security import check_address

_log = logging.getLogger("runtime.coordinator")
_drops = DropLog(_log)


class NodeMonitor:
    """Receives the nodes' messages and monitors the nodes. Only the coordinator's thread uses it.

    Args:
        setup: how to run the plan.
        machine: the coordinator's state machine, which is only read here.
        links: the data links to the nodes.
        detector: finds dead nodes.
        control: sends messages to the nodes.
        channels: the coordinator's sockets and servers.
    """

    def __init__(
        self,
        setup: Setup,
        machine: CoordinatorState,
        links: DataLinks,
        detector: FailureDetector,
        control: NodeController,
        channels: Channels,
    ) -> None:
        self._setup = setup
        self._machine = machine
        self._roster = machine.roster
        self._links = links
        self._detector = detector
        self._control = control
        self._channels = channels
        self._reach = Reachability(setup.timings.unreachable_s)

    def hear(self) -> list[CoordinatorEvent]:
        """Receive all messages of nodes that have arrived; returns the events."""
        events: list[CoordinatorEvent] = []
        while (message := self._channels.control.receive()) is not None:
            identity, header, key = message
            now_ns = time.monotonic_ns()
            try:
                said = codec.decode_node_control(header)
                if isinstance(said, Hello):
                    self._check(said, key)
            except (ProtocolError, PipelineError) as error:
                _drops.note(error)
                continue
            if isinstance(said, Succeeded | SucceedRefused | SuccessorEnded):
                self._control.succession.hear(identity, said)
            elif isinstance(said, NodeBeat):
                events += self._heard(identity, said, now_ns)
            elif isinstance(said, Hello) and (trusted := self._setup.trusted()) is not None and key not in trusted:
                # Its connection was opened before its key was revoked.
                self._channels.control.send(identity, refusal(f"its key was revoked ({key})"))
            elif (event := control_event(identity, said, now_ns)) is not None:
                events.append(event)
        return events

    def _check(self, hello: Hello, key: str) -> None:
        """Refuse a node that claims a key it did not authenticate with, or an address that is not allowed."""
        if self._setup.rendezvous.trusted is not None and hello.key != key:
            raise ProtocolError("a node claims a key that it did not authenticate with")
        check_address(hello.address, self._setup.rendezvous.security)

    def _heard(self, identity: bytes, beat: NodeBeat, now_ns: int) -> list[CoordinatorEvent]:
        """Handle a node's heartbeat."""
        control = self._control
        node = self._roster.by_identity(identity)
        if node is None:  # it was cut off, declared dead, and is back
            told = "the pipeline declared it dead, or was started again"
            self._channels.control.send(identity, codec.encode(Stop(told, "rejoin")))
            return []
        self._reach.seen(node.number, beat.unreachable, now_ns)
        node.sequences, node.state_bytes, node.running_ns = beat.sequences, beat.state_bytes, beat.running_ns
        verdict = self._detector.heard(node.number, beat, now_ns)
        if verdict is not None:
            control.take_for_dead({node.number: verdict})
        if identity not in control.unreached:
            return []
        control.unreached.remove(identity)
        control.tell_trusted(identity)
        return [Reconnected(identity)]

    def beat(self, beat: Beat, running_s: float) -> list[CoordinatorEvent]:
        """Send heartbeats, and look for nodes that send none; returns the events.

        Args:
            beat: what nodes may forget.
            running_s: for how long the coordinator has been running.
        """
        control, now_ns = self._control, time.monotonic_ns()
        header = codec.encode(beat)
        control.unreached &= {node.identity for node in self._roster}
        for node in self._roster:
            if node.identity and not control.tell(node.identity, header):
                self._detector.closed(node.number, now_ns)
                if node.released and node.number not in control.handles:  # it was told to end, and has ended
                    control.take_for_dead({node.number: "has left"}, "end")
        self._look_at_keys()
        events = self._look_at_links(now_ns)
        control.take_for_dead(self._detector.silent(now_ns))
        control.succession.look()
        control.take_over.look()
        return events + self._look_at_starts(now_ns, running_s)

    def _look_at_keys(self) -> None:
        """Send the allowed public keys to nodes if they have changed, and declare nodes dead whose key was revoked."""
        control, trusted = self._control, self._setup.trusted()
        if trusted is None or trusted == control.trusted:
            return
        control.trusted = trusted
        for node in self._roster:
            if node.identity:
                control.tell_trusted(node.identity)
            if node.hello is not None and node.hello.key not in trusted:
                control.take_for_dead({node.number: f"had its key revoked ({node.hello.key})"}, "refused")

    def _look_at_links(self, now_ns: int) -> list[CoordinatorEvent]:
        """The event for the dead links, if these have changed."""
        self._reach.seen(0, self._links.look_at_links(), now_ns)
        heard = {0, *self._detector.heard_lately(now_ns)}
        dead = self._reach.dead(self._roster.linked, heard, now_ns)
        return [LinksSeen(dead, now_ns)] if dead != self._machine.links.stories.keys() else []

    def _look_at_starts(self, now_ns: int, running_s: float) -> list[CoordinatorEvent]:
        """Find nodes that are not ready in time. No node is late while stage files are being sent."""
        setup, files, patience_s = self._setup, self._channels.files, self._setup.start_timeout_s
        if patience_s is None or (files is not None and files.idle_s < patience_s):
            return []
        if self._machine.state is not PipelinePhase.STARTING:
            if setup.launcher is not None:
                self._control.take_for_dead(dict(self._roster.late(now_ns, patience_s)))
            return []
        if running_s <= patience_s:
            return []
        missing = ", ".join(f"stage {stage} (node {stage}.{replica})" for stage, replica in self._roster.missing())
        return [TimedOut(f"not ready after {patience_s:.0f} s: {missing}")]
