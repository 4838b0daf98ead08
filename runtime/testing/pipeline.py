"""The coordinator and the nodes of a simulated pipeline; see :mod:`runtime.testing`."""
# ruff: noqa: ARG002 - effects have parameters that a simulation does not need

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from onnxsplit.plan import CALLER, Plan
from runtime.balance.board import PEERS
from runtime.balance.policies import UNIT_COST
from runtime.coordinator import events as c
from runtime.coordinator.interpreter import NodeEffects, RequestEffects, carry_out, control_event
from runtime.coordinator.state import CoordinatorState, PipelinePhase
from runtime.errors import PipelineError
from runtime.node import events as n
from runtime.node.state import NodePhase
from runtime.testing.network import SECOND, Link, SimulatedNetwork
from runtime.testing.node import COORDINATOR, SimulatedNode, Tensor
from runtime.timings import Timings
from runtime.topology import ReplicaKey, sources
from runtime.wire.messages.control import PROTOCOL, Assign, Fate, Hello, Leaving, Peer, Policy, Ready
from runtime.wire.messages.data import ANY, NOT_NEEDED, AttemptKey, Fragment, Step, TensorHead, Visit

NEVER_FAILS = Timings(backoff_s=0.5, circuit_failures=10**6, lost_s=10**9, backoff_most_s=5)
"""Timings by which no node is given up and no attempt is overdue."""


class SimulatedPipeline(SimulatedNetwork, RequestEffects, NodeEffects):
    """One coordinator and its nodes.

    Args:
        plan: what they execute.
        replicas: the number of nodes of every stage.
        choices: makes what is left to chance.
        timings: when to try again.
        attempts: a request that so many nodes died of is refused.
        delay_ns: the time that every message takes, in simulated time; None for a pipeline that is driven by hand.
        policy: what nodes are told about how to choose among replicas.
        process_numbers: how many numbers there are for processes, the coordinator's own included.

    Attributes:
        coordinator: the coordinator's state machine.
        nodes: the last process of each number.
        exits: the numbers of dead processes that the coordinator has not noticed yet.
        answers: for each request, its outputs or its error; more than one answer is a bug.
        ready: whether all nodes have been ready.
    """

    def __init__(
        self,
        plan: Plan,
        replicas: tuple[int, ...],
        choices: random.Random,
        *,
        timings: Timings = NEVER_FAILS,
        attempts: int = 10**6,
        delay_ns: int | None = None,
        policy: Policy = "completion",
        process_numbers: int = PEERS,
    ) -> None:
        super().__init__(delay_ns)
        self.plan = plan
        self.choices = choices
        self.policy: Policy = policy
        self.nodes: dict[int, SimulatedNode] = {}
        self.exits: list[int] = []
        self.answers: dict[int, list[Any]] = {}
        self.ready = False
        self._peers: tuple[Peer, ...] = ()  # as the coordinator knows them
        self._collected: dict[int, dict[str, Tensor]] = {}  # what has come back of the present attempts
        self._entrances = {
            stage.index: [name for name in stage.inputs if name in plan.inputs]
            for stage in plan.stages
            if CALLER in sources(plan, stage.index)
        }
        self.coordinator = CoordinatorState(
            plan,
            replicas,
            choose=lambda stage, _: self.choose(COORDINATOR, stage),
            timings=timings,
            attempts=attempts,
            process_numbers=process_numbers,
        )
        self.tell(c.Tick(0))

    def tell(self, event: c.CoordinatorEvent) -> None:
        """Hand the coordinator an event, and perform what it decides."""
        carry_out(self.coordinator, event, self, self)

    def submit(self, wanted: tuple[str, ...]) -> int:
        """Send a request in, and return its number."""
        number = len(self.answers)
        self.answers[number] = []
        self.tell(c.Submitted(number, wanted, UNIT_COST, None, self.now_ns))
        return number

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the coordinator."""
        self.now_ns += int(seconds * SECOND)
        self.tell(c.Tick(self.now_ns))

    # What subclasses may change

    def choose(self, sender: int, stage: int) -> int | None:
        """The number of the replica of a stage that a process sends to; None when it knows none."""
        known = self._peers if sender == COORDINATOR else self.nodes[sender].peers
        replicas = [peer for peer in known if peer.stage == stage]
        numbers = [peer.number for peer in replicas if peer.takes] or [peer.number for peer in replicas]
        return self.choices.choice(numbers) if numbers else None

    def new_node(self, number: int, slot: ReplicaKey) -> SimulatedNode:
        """A process that begins."""
        return SimulatedNode(number, slot)

    def duration_ns(self, node: SimulatedNode) -> int:
        """How long the next run of a node takes, in simulated time."""
        return 0

    def steps(self) -> c.Steps:
        """What the coordinator can see of how far nodes are with the attempts in flight."""
        keys = self.coordinator.requests.in_flight
        return {key: {o.number: o.ledger[key] for o in self.nodes.values() if key in o.ledger} for key in keys}

    def coordinator_met(self, peers: tuple[Peer, ...]) -> None:
        """The coordinator has learned which processes there are, itself included."""

    def node_connected(self, node: SimulatedNode, connect: n.Connect) -> None:
        """A node has learned which processes there are."""

    def node_ran(self, node: SimulatedNode, took_ns: int) -> None:
        """A node has run a request."""

    def node_finished(self, node: SimulatedNode, fragments: Iterable[Fragment]) -> None:
        """A node needs fragments no more."""

    # Effects on requests

    def enter(self, enter: c.Enter) -> None:
        """Send a request's inputs to the nodes of its route."""
        self._collected[enter.request] = {}
        for stage, names in self._entrances.items():
            number: int | None = enter.route[stage]
            if number == NOT_NEEDED:
                continue
            if number == ANY:
                number = self.choose(COORDINATOR, stage)
            tensors = {name: (name, enter.request, enter.attempt) for name in names}
            fragment = Fragment(
                enter.request,
                enter.attempt,
                enter.view,
                enter.cost,
                0,
                COORDINATOR,
                CALLER,
                enter.route,
                enter.wanted,
                _heads(tensors),
                (),
            )
            self.send_fragment(number, fragment, tensors)

    def end_attempt(self, request: int, attempt: int, reason: str) -> None:
        """Drop what came back of an attempt."""
        self._collected[request] = {}

    def resolve(self, request: int, visits: tuple[Visit, ...]) -> None:
        """Note the outputs of a request."""
        self.answers[request].append(self._collected.pop(request))

    def reject(self, request: int, error: PipelineError) -> None:
        """Note the error of a request."""
        self.answers[request].append(error)

    # Effects on nodes

    def start_node(self, slot: ReplicaKey, number: int) -> None:
        """Begin a process, which reports."""
        self.nodes[number] = self.new_node(number, slot)
        hello = Hello(PROTOCOL, number, number, "host", str(number), *slot, "", None, "")
        self.send((number, COORDINATOR, "control"), hello)

    def kill_node(self, number: int) -> None:
        """End a process."""
        self.kill(number)

    def give_stage(self, identity: bytes, slot: ReplicaKey) -> None:
        """Tell a node which stage it executes."""
        assign = Assign("id", "", "", *slot, "cpu", 0, False, False, 1, 1, self.policy)
        self._tell_node(identity, n.Assigned(assign))

    def introduce(self, identities: tuple[bytes, ...], *, meet: bool) -> c.Met | None:
        """Tell nodes which processes there are; with ``meet``, learn it too."""
        roster = self.coordinator.roster
        starting = self.coordinator.state is PipelinePhase.STARTING
        caller = Peer(COORDINATOR, CALLER, 0, False, "", "", None, "")
        for identity, wire in roster.introduce(identities, caller, everyone=starting):
            self._tell_node(identity, n.Wired(wire))
        if not meet:
            return None
        self._peers = roster.peers(None, everyone=starting)
        self.coordinator_met((caller, *self._peers))
        return c.Met((), self.now_ns)

    def send_away(self, identity: bytes, reason: str, fate: Fate, *, again: bool) -> None:
        """Tell a node to stop."""
        self._tell_node(identity, n.StopAsked(reason))

    def forget(self, request: int, attempt: int, identities: tuple[bytes, ...]) -> None:
        """Tell nodes that nobody waits for an attempt any more."""
        for identity in identities:
            self._tell_node(identity, n.AttemptCancelled(request, attempt))

    def announce(self, error: PipelineError | None) -> None:
        """Note that all nodes are ready."""
        assert error is None, error
        self.ready = True

    def share_memory(self, identity: bytes | None, readers: tuple[int, ...]) -> None:
        """Nothing: there is no memory to share."""

    def link_changed(self, story: str, *, is_dead: bool) -> None:
        """Nothing: there is no log."""

    def drained(self) -> None:
        """Nothing: see :attr:`answers`."""

    def _tell_node(self, identity: bytes, event: n.NodeEvent) -> None:
        self.send((COORDINATOR, int(identity), "control"), event)

    # Messages

    def send_fragment(self, to: int | None, fragment: Fragment, tensors: Mapping[str, Tensor]) -> None:
        """Put a fragment on its way; nothing happens where there is no receiver."""
        if to is not None:
            self.send((fragment.sender, to, "data"), (fragment, tensors))

    def listens(self, number: int) -> bool:
        """Whether a process takes messages now."""
        node = self.nodes.get(number)
        return number == COORDINATOR or (node is not None and node.alive and not node.stopped)

    def receive(self, link: Link, message: Any) -> None:
        """A message arrives; at a process that is dead, nothing happens."""
        sender, to, kind = link
        if to == COORDINATOR:
            self._hear(sender, message)
        elif (node := self.nodes.get(to)) is not None and node.alive:
            if kind == "data":
                fragment, tensors = message
                message = n.Arrived(fragment, tensors, self.now_ns)
            self.give(node, message)

    def _hear(self, sender: int, message: Any) -> None:
        """The coordinator hears a node."""
        if isinstance(message, tuple):
            fragment, tensors = message
            if self.coordinator.requests.attempt(fragment.request) == fragment.attempt:
                self._collected[fragment.request].update(tensors)
                names = tuple(tensors)
                self.tell(c.Returned(fragment.request, fragment.attempt, names, fragment.history))
            return
        event = control_event(str(sender).encode(), message, self.now_ns)
        assert event is not None, message
        self.tell(event)

    # Nodes

    def give(self, node: SimulatedNode, event: n.NodeEvent) -> None:
        """Have a node handle an event; in simulated time at once, unless it is stopped."""
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
        """Have a node do one thing: handle an event, or begin a request."""
        node = self.nodes[number]
        turn = not node.events or (node.state.ready and self.choices.random() < 0.3)
        self._handle(node, n.Turn(self.now_ns) if turn else node.events.popleft())

    def _handle(self, node: SimulatedNode, event: n.NodeEvent) -> None:
        serves = node.state.state in (NodePhase.READY, NodePhase.LEAVING)
        if not serves and isinstance(event, n.Arrived | n.AttemptCancelled | n.Turn):
            return
        effects = deque(node.state.handle(event))
        while effects and node.alive:
            answer = self._perform_at(node, effects.popleft())
            if answer is not None:
                effects.extend(node.state.handle(answer))

    def _perform_at(self, node: SimulatedNode, effect: n.NodeEffect) -> n.NodeEvent | None:
        """Perform what a node decides; returns the event that answers it."""
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
            case n.Exit():
                self.kill(node.number)
        return None

    def _run(self, node: SimulatedNode, run: n.Run) -> n.NodeEvent | None:
        node.ledger[run.key] = Step.RUNNING
        names = self.plan.stages[node.slot[0]].outputs
        inputs = [run.inputs[name] for name in sorted(run.inputs)]
        node.outputs = {name: (name, *inputs) for name in names}
        took_ns = self.duration_ns(node)
        if not took_ns:
            node.ledger[run.key] = Step.DONE
            return n.Executed(self.now_ns, self.now_ns, self.now_ns, 0, 0)
        self.later(took_ns, self._ran, node, run.key, took_ns)
        return None

    def _ran(self, node: SimulatedNode, key: AttemptKey, took_ns: int) -> None:
        if node.alive:
            node.ledger[key] = Step.DONE
            self.node_ran(node, took_ns)
            self.give(node, n.Executed(self.now_ns - took_ns, self.now_ns, self.now_ns, 0, 0))

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
                _heads(tensors),
                forward.history,
            )
            self.send_fragment(number, fragment, tensors)

    # Faults

    def kill(self, number: int) -> None:
        """End a process. Some of what it sent last may never have left it."""
        node = self.nodes.get(number)
        if node is None or not node.alive:
            return
        node.alive = False
        self.exits.append(number)
        self.cut_off(number, lambda: self.choices.random() < 0.5)
        if self.delay_ns is not None:
            self.later(self.delay_ns, self.notice, number)

    def notice(self, number: int) -> None:
        """The coordinator takes a process for dead, rightly or not."""
        self.exits = [other for other in self.exits if other != number]
        self.tell(c.Lost(number, "is gone", self.steps(), self.now_ns))

    def stop(self, number: int) -> None:
        """Have a process do nothing until it is woken; messages to it wait."""
        self.nodes[number].stopped = True

    def wake(self, number: int) -> None:
        """Let a stopped process go on."""
        node = self.nodes[number]
        node.stopped = False
        if self.delay_ns is not None:
            self._work_off(node)

    def notice_links(self) -> None:
        """The coordinator learns which links are parted, as it does of dead links after a while."""
        known = self.coordinator.roster.linked
        self.tell(c.LinksSeen(frozenset(link for link in self.parted if known >= set(link)), self.now_ns))

    def lose(self, link: Link) -> None:
        """Have a link lose a message. Only then may time mend what events should have: attempts become overdue."""
        self.links[link].popleft()
        requests = self.coordinator.requests
        requests.timings = replace(requests.timings, lost_s=100)

    # The end

    def settle(self) -> None:
        """Wake all processes, mend all links, and go on until every request is answered and every node is ready.

        Raises:
            AssertionError: that does not happen.
        """
        for number in self.nodes:
            self.wake(number)
        for link in list(self.parted):
            self.mend(*link)
        self.notice_links()
        for _ in range(100_000):
            while self.exits:
                self.notice(self.exits[-1])
            links, busy = self.waiting(), self.busy()
            if links and (not busy or self.choices.random() < 0.5):
                self.deliver(self.choices.choice(links))
            elif busy:
                self.work(self.choices.choice(busy))
            elif not self.step():
                if self.ready and all(self.answers.values()) and not self.coordinator.roster.missing():
                    return
                self.pass_time(1)
        unanswered = [request for request, answers in self.answers.items() if not answers]
        raise AssertionError(f"no end: requests {unanswered} are not answered")

    def expected(self, name: str, request: int, attempt: int) -> Tensor:
        """A tensor as it is when every stage made it of what it should."""
        if name in self.plan.inputs:
            return (name, request, attempt)
        stage = self.plan.stages[self.plan.producers()[name]]
        return (name, *(self.expected(other, request, attempt) for other in sorted(stage.inputs)))

    def check(self) -> None:
        """Check the promise: no request has two answers, and all tensors of an answer are right and of one attempt.

        Raises:
            AssertionError: the promise is broken, or a request was refused.
        """
        for request, answers in self.answers.items():
            assert len(answers) <= 1, f"request {request} was answered {len(answers)} times"
            for answer in answers:
                assert isinstance(answer, dict), answer
                attempt = _attempt_of(next(iter(answer.values())))
                assert answer == {name: self.expected(name, request, attempt) for name in answer}


def _heads(tensors: Iterable[str]) -> tuple[TensorHead, ...]:
    return tuple([TensorHead(name, "float32", (), b"") for name in tensors])


def _attempt_of(tensor: Tensor) -> int:
    """The attempt that the first input of a tensor was of."""
    while isinstance(tensor[1], tuple):
        tensor = tensor[1]
    attempt: int = tensor[2]
    return attempt
