"""The simulated processes of nodes."""
# ruff: noqa: ARG002 - subclasses need the parameters

from __future__ import annotations

import random
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onnxsplit.plan import CALLER, Plan
from runtime.node import events as n
from runtime.node.slots import Placed
from runtime.node.state import NodePhase, NodeState
from runtime.testing.decoder import SimulatedSlots, draw
from runtime.testing.network import SimulatedLink, SimulatedNetwork
from runtime.topology import ReplicaKey, StepGraph
from runtime.wire.messages.control import Leaving, Peer, Ready
from runtime.wire.messages.data import ANY, AttemptKey, Fragment, Step, TensorHead
from runtime.wire.messages.sequences import Drawn

COORDINATOR = 0
"""The number of the coordinator's process."""

Tensor = Any
"""A nested tuple: (name, request, attempt) for an input of the model, else (name, each input of its stage)."""


@dataclass(eq=False)
class SimulatedNode:
    """The process of a node.

    Attributes:
        number: its number, by which other processes know it.
        slot: its stage and replica.
        state: its state machine.
        alive: False once it has ended.
        stopped: whether it does nothing, as after SIGSTOP.
        peers: the processes it knows.
        ledger: its progress with attempts. Other processes can read it even when this one is dead.
        events: events that are not handled yet.
        outputs: the outputs of the request that ran last.
        drawn: the tokens that were chosen in the step that ran last.
        slots: the texts of the sequences that it holds.
    """

    number: int
    slot: ReplicaKey
    state: NodeState = field(default_factory=NodeState)
    alive: bool = True
    stopped: bool = False
    peers: tuple[Peer, ...] = ()
    ledger: dict[AttemptKey, Step] = field(default_factory=dict)
    events: deque[n.NodeEvent] = field(default_factory=deque)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    drawn: tuple[Drawn, ...] = ()
    slots: SimulatedSlots = field(default_factory=SimulatedSlots)


class SimulatedNodes(SimulatedNetwork):
    """The nodes of a simulated pipeline.

    Args:
        plan: the plan that they execute.
        choices: makes random choices.
        delay_ns: as for :class:`~runtime.testing.network.SimulatedNetwork`.

    Attributes:
        plan: as given.
        choices: as given.
        nodes: the last process of each number.
    """

    def __init__(self, plan: Plan, choices: random.Random, delay_ns: int | None) -> None:
        super().__init__(delay_ns)
        self.plan = plan
        self.choices = choices
        self.nodes: dict[int, SimulatedNode] = {}

    @abstractmethod
    def choose(self, sender: int, stage: int) -> int | None:
        """The number of the replica of a stage that a process sends to; None when it knows none."""

    @abstractmethod
    def hear(self, sender: int, message: Any) -> None:
        """Handle a message of a node that has arrived at the coordinator."""

    @abstractmethod
    def node_ended(self, node: SimulatedNode) -> None:
        """Handle the end of a process."""

    # Methods that subclasses may replace

    def duration_ns(self, node: SimulatedNode) -> int:
        """How long the next run of a node takes, in simulated time."""
        return 0

    def node_connected(self, node: SimulatedNode, connect: n.Connect) -> None:
        """Called when a node has learned which processes exist."""

    def run_step(self, node: SimulatedNode, run: n.Run, placed: Placed) -> None:
        """Run a step: its outputs hold the texts of its rows, up to this step."""
        assert self.plan.decoder is not None
        rows = run.fragments[0].rows
        texts = node.slots.run(rows, placed)
        inputs = [run.inputs[name] for name in sorted(run.inputs)]
        node.outputs = {name: (name, texts, *inputs) for name in node.outputs}
        if node.slot[0] == StepGraph(self.plan).tail:
            node.drawn = draw(rows, placed, texts, run.inputs, self.plan.decoder.vocabulary)

    def node_ran(self, node: SimulatedNode, took_ns: int) -> None:
        """Called when a node has run a request."""

    def node_finished(self, node: SimulatedNode, fragments: Iterable[Fragment]) -> None:
        """Called when a node no longer needs fragments."""

    # Messages

    def send_fragment(self, to: int | None, fragment: Fragment, tensors: Mapping[str, Tensor]) -> None:
        """Send a fragment; nothing happens when there is no receiver."""
        if to is not None:
            self.send((fragment.sender, to, "data"), (fragment, tensors))

    def listens(self, number: int) -> bool:
        """Whether a process accepts messages now."""
        node = self.nodes.get(number)
        return number == COORDINATOR or (node is not None and node.alive and not node.stopped)

    def receive(self, link: SimulatedLink, message: Any) -> None:
        """Handle a message that has arrived; a dead process ignores it."""
        sender, to, kind = link
        if to == COORDINATOR:
            self.hear(sender, message)
        elif (node := self.nodes.get(to)) is not None and node.alive:
            if kind == "data":
                fragment, tensors = message
                message = n.Arrived(fragment, tensors, self.now_ns)
            self.give(node, message)

    # Nodes

    def give(self, node: SimulatedNode, event: n.NodeEvent) -> None:
        """Let a node handle an event; in simulated time at once, unless it is stopped."""
        node.events.append(event)
        if self.delay_ns is not None:
            self._work_off(node)

    def _work_off(self, node: SimulatedNode) -> None:
        while node.alive and not node.stopped and (node.events or node.state.ready):
            self._handle(node, node.events.popleft() if node.events else n.Turn(self.now_ns))

    def busy(self) -> list[int]:
        """The numbers of the nodes that have something to do."""
        return [o.number for o in self.nodes.values() if o.alive and not o.stopped and (o.events or o.state.ready)]

    def work(self, number: int) -> None:
        """Let a node take one step: handle an event, or begin a request."""
        node = self.nodes[number]
        turn = not node.events or (node.state.ready and self.choices.random() < 0.3)
        self._handle(node, n.Turn(self.now_ns) if turn else node.events.popleft())

    def _handle(self, node: SimulatedNode, event: n.NodeEvent) -> None:
        serves = node.state.state in (NodePhase.READY, NodePhase.LEAVING)
        if not serves and isinstance(event, n.Arrived | n.AttemptCancelled | n.Passed | n.Turn):
            return
        effects = deque(node.state.handle(event))
        while effects and node.alive:
            answer = self._perform_at(node, effects.popleft())
            if answer is not None:
                effects.extend(node.state.handle(answer))

    def _perform_at(self, node: SimulatedNode, effect: n.NodeEffect) -> n.NodeEvent | None:
        """Perform a node's effect; returns the event that answers it."""
        to_coordinator = (node.number, COORDINATOR, "control")
        match effect:
            case n.Load():
                return n.Loaded(self.plan)
            case n.Connect():
                node.peers = effect.peers
                self.node_connected(node, effect)
            case n.SayReady():
                self.send(to_coordinator, Ready(()))
            case n.SayLeaving():
                self.send(to_coordinator, Leaving())
            case n.Run():
                return self._run(node, effect)
            case n.Forward():
                self._forward(node, effect)
            case n.GiveBack(fragments):
                self.node_finished(node, fragments)
            case n.ClearSlots(slots):
                node.slots.clear(slots)
            case n.ReportFailure(message):
                self.send((node.number, COORDINATOR, "data"), message)
            case n.Exit():
                self.kill(node.number)
        return None

    def _run(self, node: SimulatedNode, run: n.Run) -> n.NodeEvent | None:
        node.ledger[run.key] = Step.RUNNING
        names = self.plan.stages[node.slot[0]].outputs
        inputs = [run.inputs[name] for name in sorted(run.inputs)]
        node.outputs = {name: (name, *inputs) for name in names}
        node.drawn = ()
        if run.placed is not None:
            self.run_step(node, run, run.placed)
        took_ns = self.duration_ns(node)
        if not node.alive:
            return None
        if not took_ns:
            node.ledger[run.key] = Step.DONE
            return n.Executed(self.now_ns, self.now_ns, self.now_ns, 0, 0, node.drawn)
        self.later(took_ns, self._ran, node, run.key, took_ns)
        return None

    def _ran(self, node: SimulatedNode, key: AttemptKey, took_ns: int) -> None:
        if node.alive:
            node.ledger[key] = Step.DONE
            self.node_ran(node, took_ns)
            self.give(node, n.Executed(self.now_ns - took_ns, self.now_ns, self.now_ns, 0, 0, node.drawn))

    def _forward(self, node: SimulatedNode, forward: n.Forward) -> None:
        first = forward.fragment
        for stage, names in forward.leaving:
            number: int | None = COORDINATOR if stage == CALLER else first.route[stage]
            if stage != CALLER and number == ANY:
                number = self.choose(node.number, stage)
            tensors = {name: node.outputs[name] for name in names}
            fragment = Fragment(
                first.request,
                first.attempt,
                first.view,
                first.cost,
                0,
                node.number,
                node.slot[0],
                first.route,
                first.wanted,
                heads(tensors),
                forward.history,
                first.rows,
                forward.drawn if stage == CALLER else (),
            )
            self.send_fragment(number, fragment, tensors)

    def kill(self, number: int) -> None:
        """Kill a process. Some of its last messages may be lost."""
        node = self.nodes.get(number)
        if node is None or not node.alive:
            return
        node.alive = False
        self.cut_off(number, lambda: self.choices.random() < 0.5)
        self.node_ended(node)

    def stop(self, number: int) -> None:
        """Stop a process until it is woken; messages to it wait."""
        self.nodes[number].stopped = True

    def wake(self, number: int) -> None:
        """Let a stopped process continue."""
        node = self.nodes[number]
        node.stopped = False
        if self.delay_ns is not None:
            self._work_off(node)


def heads(tensors: Iterable[str]) -> tuple[TensorHead, ...]:
    """The heads of tensors in a fragment."""
    return tuple([TensorHead(name, "float32", (), b"") for name in tensors])
