"""The coordinator and the nodes of a simulated pipeline; see :mod:`runtime.testing`."""
# ruff: noqa: ARG002 - effects have parameters that a simulation does not need

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import CALLER, Plan
from runtime.balance.board import PEERS
from runtime.balance.policies import UNIT_COST
from runtime.coordinator import events as c
from runtime.coordinator.interpreter import NodeEffects, RequestEffects, carry_out, control_event
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.state import CoordinatorState
from runtime.coordinator.step_table import STEP_ATTEMPT
from runtime.errors import PipelineError
from runtime.node import events as n
from runtime.testing.decoder import SimulatedSequence
from runtime.testing.network import SECOND, SimulatedLink
from runtime.testing.node import COORDINATOR, SimulatedNode, SimulatedNodes, Tensor, heads
from runtime.timings import Timings
from runtime.topology import ReplicaKey, StepGraph, sources
from runtime.wire.messages.control import PROTOCOL, Assign, Fate, Hello, Peer, Policy
from runtime.wire.messages.data import ANY, NOT_NEEDED, Failed, Fragment, Visit
from runtime.wire.messages.sequences import Sampling

NEVER_FAILS = Timings(backoff_s=0.5, circuit_failures=10**6, lost_s=10**9, backoff_most_s=5)
"""Timings with which no node is given up and no attempt is overdue."""


class SimulatedPipeline(SimulatedNodes, RequestEffects, NodeEffects):
    """A simulated coordinator and its nodes.

    Args:
        plan: the plan that they execute.
        replicas: the number of nodes of every stage.
        choices: makes random choices.
        timings: when to try again.
        attempts: a request is refused after this many nodes were lost while they executed it.
        delay_ns: the time that every message takes, in simulated time; None for a pipeline that is driven by hand.
        policy: the balancing policy that nodes are told.
        process_numbers: how many numbers there are for processes, the coordinator's own included.
        limits: the limits of sequences, for a plan with a decoder.

    Attributes:
        coordinator: the coordinator's state machine.
        exits: the numbers of dead processes that the coordinator has not noticed yet.
        answers: for each request, its outputs or its error; more than one answer is a bug.
        sequences: the sequences that were submitted.
        failures: the steps in flight that nodes refused; any is a bug.
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
        limits: SequenceLimits | None = None,
    ) -> None:
        super().__init__(plan, choices, delay_ns)
        self.policy: Policy = policy
        self.exits: list[int] = []
        self.answers: dict[int, list[Any]] = {}
        self.sequences: dict[int, SimulatedSequence] = {}
        self.failures: list[Failed] = []
        self.ready = False
        self._peers: tuple[Peer, ...] = ()  # the peers that the coordinator knows
        self._collected: dict[int, dict[str, Tensor]] = {}  # outputs received for the present attempts
        self._entrances = {
            stage.index: [name for name in stage.inputs if name in plan.inputs]
            for stage in plan.stages
            if CALLER in sources(plan, stage.index)
        }
        self._limits = limits
        steps = StepGraph(plan).sources if limits is not None else {}
        self._step_entrances = [stage for stage, senders in steps.items() if CALLER in senders]
        self.coordinator = CoordinatorState(
            plan,
            replicas,
            choose=lambda stage, _: self.choose(COORDINATOR, stage),
            timings=timings,
            attempts=attempts,
            process_numbers=process_numbers,
            limits=limits,
        )
        self.tell(c.Tick(0))

    def tell(self, event: c.CoordinatorEvent) -> None:
        """Pass an event to the coordinator, and perform its effects."""
        carry_out(self.coordinator, event, self, self)

    def submit(self, wanted: tuple[str, ...]) -> int:
        """Submit a request, and return its number."""
        number = self.coordinator.numbers.next()
        self.answers[number] = []
        self.tell(c.Submitted(number, wanted, UNIT_COST, None, self.now_ns))
        return number

    def generate(
        self, prompt: tuple[int, ...], max_tokens: int, *, end_tokens: tuple[int, ...] = (), wait: bool = True
    ) -> int:
        """Submit a sequence, and return its number."""
        number = self.coordinator.numbers.next()
        self.sequences[number] = SimulatedSequence(prompt, max_tokens, end_tokens)
        sampling = Sampling(end_tokens=end_tokens)
        scores = bool(number % 2)
        self.tell(
            SequenceSubmitted(number, prompt, max_tokens, sampling, scores, wait, None, self.now_ns),
        )
        return number

    def pass_time(self, seconds: float) -> None:
        """Send the coordinator a tick, and the nodes the number of the oldest request."""
        self.now_ns += int(seconds * SECOND)
        self.tell(c.Tick(self.now_ns, self.steps() if self.coordinator.work.is_overdue(self.now_ns) else {}))
        if self.coordinator.sequences is not None:
            for node in self.coordinator.roster:
                if node.identity:
                    self._tell_node(
                        node.identity, n.Passed(self.coordinator.work.oldest, frozenset(self.coordinator.work.kept))
                    )

    # Methods that subclasses may replace

    def choose(self, sender: int, stage: int) -> int | None:
        """The number of the replica of a stage that a process sends to; None when it knows none."""
        known = self._peers if sender == COORDINATOR else self.nodes[sender].peers
        replicas = [peer for peer in known if peer.stage == stage]
        numbers = [peer.number for peer in replicas if peer.takes] or [peer.number for peer in replicas]
        return self.choices.choice(numbers) if numbers else None

    def new_node(self, number: int, slot: ReplicaKey) -> SimulatedNode:
        """Make a new process of a node."""
        return SimulatedNode(number, slot)

    def steps(self) -> c.Steps:
        """The nodes' progress with the attempts in flight, as far as the coordinator can see it."""
        keys = self.coordinator.work.in_flight
        return {key: {o.number: o.ledger[key] for o in self.nodes.values() if key in o.ledger} for key in keys}

    def coordinator_met(self, peers: tuple[Peer, ...]) -> None:
        """Called when the coordinator has learned which processes exist, itself included."""

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
                heads(tensors),
                (),
            )
            self.send_fragment(number, fragment, tensors)

    def end_attempt(self, request: int, attempt: int, reason: str) -> None:
        """Drop the outputs received for an attempt."""
        self._collected[request] = {}

    def resolve(self, request: int, visits: tuple[Visit, ...]) -> None:
        """Record the outputs of a request."""
        self.answers[request].append(self._collected.pop(request))

    def reject(self, request: int, error: OnnxsplitError) -> None:
        """Record the error of a request or a sequence."""
        if request in self.sequences:
            self.sequences[request].ends.append(error)
        else:
            self.answers[request].append(error)

    def enter_step(self, step: EnterStep) -> None:
        """Send a step to the nodes that begin it."""
        for stage in self._step_entrances:
            assert self.plan.decoder is not None
            fragment = Fragment(
                step.step,
                STEP_ATTEMPT,
                step.view,
                step.cost,
                0,
                COORDINATOR,
                CALLER,
                step.route,
                (self.plan.decoder.scores,) if step.scores else (),
                (),
                (),
                step.rows,
            )
            self.send_fragment(step.route[stage], fragment, {})

    def emit(self, emit: Emit) -> None:
        """Record a token of a sequence."""
        self.sequences[emit.sequence].drawn.append(emit.drawn)

    def finish(self, finish: Finish) -> None:
        """Record the end of a sequence."""
        self.sequences[finish.sequence].ends.append(finish.reason)

    # Effects on nodes

    def start_node(self, slot: ReplicaKey, number: int) -> None:
        """Start a process, which reports to the coordinator."""
        self.nodes[number] = self.new_node(number, slot)
        hello = Hello(PROTOCOL, number, number, "host", str(number), *slot, "", None, "")
        self.send((number, COORDINATOR, "control"), hello)

    def kill_node(self, number: int) -> None:
        """End a process."""
        self.kill(number)

    def give_stage(self, identity: bytes, slot: ReplicaKey) -> None:
        """Tell a node which stage it executes."""
        slots, length = (self._limits.slots, self._limits.length) if self._limits is not None else (0, 0)
        assign = Assign("id", "", "", *slot, "cpu", 0, False, False, 1, 1, self.policy, slots, length)
        self._tell_node(identity, n.Assigned(assign))

    def introduce(self, identities: tuple[bytes, ...], *, meet: bool) -> c.Met | None:
        """Tell nodes which processes exist; with ``meet``, the coordinator learns it too."""
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
        """Tell nodes that an attempt was given up."""
        for identity in identities:
            self._tell_node(identity, n.AttemptCancelled(request, attempt))

    def announce(self, error: PipelineError | None) -> None:
        """Record that all nodes are ready."""
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

    def hear(self, sender: int, message: Any) -> None:
        """Handle a message of a node at the coordinator."""
        if isinstance(message, Failed):
            in_flight = (message.request, message.attempt) in self.coordinator.work.in_flight
            if in_flight and "no longer here" not in message.reason:  # the donor of a sequence was given up
                self.failures.append(message)
            self.tell(c.Reported(message))
            return
        if isinstance(message, tuple):
            fragment, tensors = message
            if fragment.rows:
                self.tell(StepReturned(fragment.request, fragment.drawn, fragment.history, self.now_ns))
            elif self.coordinator.requests.attempt(fragment.request) == fragment.attempt:
                self._collected[fragment.request].update(tensors)
                names = tuple(tensors)
                self.tell(c.Returned(fragment.request, fragment.attempt, names, fragment.history))
            return
        event = control_event(str(sender).encode(), message, self.now_ns)
        assert event is not None, message
        self.tell(event)

    # Faults

    def node_ended(self, node: SimulatedNode) -> None:
        """Handle the end of a process; in simulated time, the coordinator notices it after the usual delay."""
        self.exits.append(node.number)
        if self.delay_ns is not None:
            self.later(self.delay_ns, self.notice, node.number)

    def notice(self, number: int) -> None:
        """Let the coordinator declare a process dead, whether it is dead or not."""
        self.exits = [other for other in self.exits if other != number]
        self.tell(c.Lost(number, "is gone", self.steps(), self.now_ns))

    def notice_links(self) -> None:
        """Tell the coordinator which links are parted, as it would find out after some time."""
        known = self.coordinator.roster.linked
        self.tell(c.LinksSeen(frozenset(link for link in self.parted if known >= set(link)), self.now_ns))

    def lose(self, link: SimulatedLink) -> None:
        """Drop the first message of a link. From now on attempts can become overdue, as none should without losses."""
        self.links[link].popleft()
        requests, sequences = self.coordinator.requests, self.coordinator.sequences
        requests.timings = replace(requests.timings, lost_s=100)
        if sequences is not None:
            sequences.timings = requests.timings

    # The end

    def settle(self) -> None:
        """Wake all processes, mend all links, and run until every request is answered and every node is ready.

        Raises:
            AssertionError: that state is never reached.
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
                if self.ready and not self.unanswered and not self.coordinator.roster.missing():
                    return
                self.pass_time(1)
        raise AssertionError(f"no end: requests or sequences {self.unanswered} are not answered")

    @property
    def unanswered(self) -> list[int]:
        """The requests and the sequences that have not ended."""
        requests = [number for number, answers in self.answers.items() if not answers]
        return requests + [number for number, sequence in self.sequences.items() if not sequence.ends]

    def expected(self, name: str, request: int, attempt: int) -> Tensor:
        """The correct value of a tensor."""
        if name in self.plan.inputs:
            return (name, request, attempt)
        stage = self.plan.stages[self.plan.producers()[name]]
        return (name, *(self.expected(other, request, attempt) for other in sorted(stage.inputs)))

    def check(self) -> None:
        """Check the promise: no request has two answers, and all tensors of an answer are right and of one attempt.

        Of each sequence, every token has come once and in order, and is right.

        Raises:
            AssertionError: the promise is broken, or a request was refused.
        """
        assert not self.failures, self.failures
        for sequence in self.sequences.values():
            assert self.plan.decoder is not None
            sequence.check(self.plan.decoder.vocabulary)
        for request, answers in self.answers.items():
            assert len(answers) <= 1, f"request {request} was answered {len(answers)} times"
            for answer in answers:
                assert isinstance(answer, dict), answer
                attempt = _attempt_of(next(iter(answer.values())))
                assert answer == {name: self.expected(name, request, attempt) for name in answer}


def _attempt_of(tensor: Tensor) -> int:
    """The attempt of a tensor's first input."""
    while isinstance(tensor[1], tuple):
        tensor = tensor[1]
    attempt: int = tensor[2]
    return attempt
