"""A pipeline in memory: the real state machines of a coordinator and its nodes, and everything else made up.

Tensors are nested tuples that tell how they came about, down to the request and the attempt. Messages wait in a queue
for each link until somebody delivers them, in any order among links; processes die, stop and wake; ledgers outlive
them. Time passes when told.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from onnxsplit.plan import CALLER, Plan
from runtime.coordinator import events as c
from runtime.coordinator.roster import KillNode, StartNode
from runtime.coordinator.state import CoordinatorState, PipelinePhase
from runtime.node import events as n
from runtime.node.state import NodePhase, NodeState
from runtime.timings import Timings
from runtime.topology import sources
from runtime.wire.messages.control import PROTOCOL, Assign, Hello, Peer, Wire
from runtime.wire.messages.data import ANY, NOT_NEEDED, Fragment, Step, TensorHead

SECOND = 1_000_000_000
COORDINATOR = 0


@dataclass
class Process:
    """One node's process."""

    number: int
    slot: tuple[int, int]
    state: NodeState = field(default_factory=NodeState)
    alive: bool = True
    stopped: bool = False
    peers: tuple[Peer, ...] = ()
    ledger: dict[tuple[int, int], Step] = field(default_factory=dict)
    events: deque[Any] = field(default_factory=deque)


class World:
    """See above. ``choices`` makes what is left to chance."""

    def __init__(self, plan: Plan, replicas: tuple[int, ...], choices: random.Random) -> None:
        self.plan, self.choices, self.now = plan, choices, 0
        self.timings = Timings(backoff_s=0.5, circuit_failures=10**6, lost_s=10**9, backoff_most_s=5)
        self.coordinator = CoordinatorState(plan, replicas, choose=self.choose, timings=self.timings, attempts=10**6)
        self.processes: dict[int, Process] = {}
        self.dead: list[Process] = []
        self.links: dict[tuple[int, int, str], deque[Any]] = {}
        self.peers: tuple[Peer, ...] = ()  # as the coordinator knows them
        self.exits: list[int] = []
        self.answers: dict[int, list[Any]] = {}
        self.collected: dict[int, dict[str, Any]] = {}
        self.ready = False
        self.tell(c.Tick(self.now))

    # The coordinator's shell

    def choose(self, stage: int, _cost: int) -> int | None:
        numbers = [peer.number for peer in self.peers if peer.stage == stage and peer.takes]
        return self.choices.choice(numbers) if numbers else None

    def tell(self, event: Any) -> None:
        """Hand the coordinator an event, and do what it wants done."""
        effects = deque(self.coordinator.handle(event))
        while effects:
            effect = effects.popleft()
            match effect:
                case StartNode(slot, number):
                    old = self.processes.pop(number, None)
                    if old is not None:
                        self.dead.append(old)
                    self.processes[number] = Process(number, slot)
                    hello = Hello(PROTOCOL, number, number, "host", str(number), *slot, "", None, "")
                    self.send(number, COORDINATOR, "control", ("hello", hello))
                case KillNode(number):
                    self.kill(number)
                case c.GiveStage(identity, (stage, replica)):
                    assign = Assign("id", "", "", stage, replica, "cpu", 0, False, False, 1, 1, "task")
                    self.send(COORDINATOR, int(identity), "control", n.Assigned(assign))
                case c.Introduce(identities, meet):
                    effects.extend(self.introduce(identities, meet))
                case c.SendAway(identity):
                    self.send(COORDINATOR, int(identity), "control", n.StopAsked("told to"))
                case c.Forget(request, attempt, identities):
                    for identity in identities:
                        self.send(COORDINATOR, int(identity), "control", n.AttemptCancelled(request, attempt))
                case c.Announce(error):
                    assert error is None
                    self.ready = True
                case c.Enter():
                    self.enter(effect)
                case c.Again(request):
                    self.collected[request] = {}
                case c.Resolve(request, _):
                    self.answers[request].append(self.collected[request])
                case c.Reject(request, error):
                    self.answers[request].append(error)

    def introduce(self, identities: tuple[bytes, ...], meet: bool) -> list[Any]:
        roster = self.coordinator.roster
        starting = self.coordinator.state is PipelinePhase.STARTING
        caller = Peer(0, CALLER, 0, False, "", "", None, "")
        for identity in identities:
            record = roster.by_identity(identity)
            record.introduced = True
            wire = Wire(roster.view, record.number, (caller, *roster.peers(record, everyone=starting)))
            self.send(COORDINATOR, record.number, "control", n.Wired(wire))
        if not meet:
            return []
        self.peers = roster.peers(None, everyone=starting)
        return list(self.coordinator.handle(c.Met((), self.now)))

    def enter(self, enter: c.Enter) -> None:
        self.collected[enter.request] = {}
        for stage in self.plan.stages:
            if CALLER not in sources(self.plan, stage.index) or enter.route[stage.index] == NOT_NEEDED:
                continue
            names = [name for name in stage.inputs if name in self.plan.inputs]
            number = enter.route[stage.index]
            number = self.choose(stage.index, 1) if number == ANY else number
            tensors = {name: (name, enter.request, enter.attempt) for name in names}
            self.send_fragment(COORDINATOR, number, enter, CALLER, tensors)

    def send_fragment(self, sender: int, number: int | None, of: Any, source: int, tensors: dict[str, Any]) -> None:
        heads = tuple(TensorHead(name, "float32", (), b"") for name in tensors)
        fragment = Fragment(
            of.request, of.attempt, of.view, 1, 0, sender, source, of.route, of.wanted, heads, ()
        )  # fmt: skip
        if number is not None:
            self.send(sender, number, "data", (fragment, tensors))

    # Links

    def send(self, sender: int, to: int, link: str, message: Any) -> None:
        self.links.setdefault((sender, to, link), deque()).append(message)

    def waiting(self) -> list[tuple[int, int, str]]:
        """Links with something to deliver to somebody who listens."""
        found = []
        for key, queue in self.links.items():
            to = self.processes.get(key[1])
            listens = key[1] == COORDINATOR or (to is not None and to.alive and not to.stopped)
            if queue and listens:
                found.append(key)
        return found

    def deliver(self, key: tuple[int, int, str]) -> None:
        """Deliver the first message of a link."""
        sender, to, link = key
        message = self.links[key].popleft()
        if to == COORDINATOR:
            self.hear(sender, message)
        elif link == "control":
            self.processes[to].events.append(message)
        else:
            fragment, tensors = message
            self.processes[to].events.append(n.Arrived(fragment, tensors, self.now))

    def hear(self, sender: int, message: Any) -> None:
        identity = str(sender).encode()
        if isinstance(message[0], Fragment):
            fragment, tensors = message
            if self.coordinator.attempt(fragment.request) == fragment.attempt:
                self.collected[fragment.request].update(tensors)
                self.tell(c.Returned(fragment.request, fragment.attempt, tuple(tensors), ()))
        elif message[0] == "hello":
            self.tell(c.Joined(identity, message[1], self.now))
        elif message[0] == "ready":
            self.tell(c.Prepared(identity, (), self.now))
        elif message[0] == "leaving":
            self.tell(c.LeaveWanted(identity, self.now))

    # Nodes

    def busy(self) -> list[int]:
        """Nodes that have something to do."""
        return [p.number for p in self.processes.values() if p.alive and not p.stopped and (p.events or p.state.ready)]

    def work(self, number: int) -> None:
        """One turn of a node's loop."""
        process = self.processes[number]
        turn = not process.events or (process.state.ready and self.choices.random() < 0.3)
        event = n.Turn(self.now) if turn else process.events.popleft()
        if process.state.state not in (NodePhase.READY, NodePhase.LEAVING) and isinstance(
            event, n.Arrived | n.AttemptCancelled | n.Turn
        ):
            return
        effects = deque(process.state.handle(event))
        while effects:
            effect = effects.popleft()
            answer = None
            match effect:
                case n.Load():
                    answer = n.Loaded(self.plan)
                case n.Connect():
                    process.peers = effect.peers
                case n.SayReady():
                    self.send(number, COORDINATOR, "control", ("ready",))
                case n.SayLeaving():
                    self.send(number, COORDINATOR, "control", ("leaving",))
                case n.Run(key, _, inputs, _, _):
                    process.ledger[key] = Step.RUNNING
                    outputs = self.plan.stages[process.slot[0]].outputs
                    self.ran = {name: (name, *(inputs[i] for i in sorted(inputs))) for name in outputs}
                    process.ledger[key] = Step.DONE
                    answer = n.Executed(self.now, self.now, self.now, 0, 0)
                case n.Forward():
                    self.forward(process, effect)
                case n.Exit():
                    self.kill(number)
                    return
            if answer is not None:
                effects.extend(process.state.handle(answer))

    def forward(self, process: Process, effect: n.Forward) -> None:
        for stage, names in effect.leaving:
            tensors = {name: self.ran[name] for name in names}
            if stage == CALLER:
                number: int | None = COORDINATOR
            elif effect.fragment.route[stage] == ANY:
                stays = [peer for peer in process.peers if peer.stage == stage]
                there = [peer.number for peer in stays if peer.takes] or [peer.number for peer in stays]
                number = self.choices.choice(there) if there else None
            else:
                number = effect.fragment.route[stage]
            self.send_fragment(process.number, number, effect.fragment, process.slot[0], tensors)

    # Harm

    def lose(self, key: tuple[int, int, str]) -> None:
        """A link loses a message. Only then may time heal what events should have."""
        self.links[key].popleft()
        self.coordinator._timings = replace(self.timings, lost_s=100)

    def kill(self, number: int) -> None:
        """End a process; some of what it sent last may never have left it."""
        process = self.processes.get(number)
        if process is None or not process.alive:
            return
        process.alive = False
        self.exits.append(number)
        for (sender, to, _), queue in self.links.items():
            if to == number:
                queue.clear()
            elif sender == number and queue and self.choices.random() < 0.5:
                queue.pop()

    def notice(self, number: int) -> None:
        """The coordinator takes a process for dead, rightly or not."""
        keys = self.coordinator.in_flight
        steps = {key: {p.number: p.ledger[key] for p in self.processes.values() if key in p.ledger} for key in keys}
        self.tell(c.Lost(number, "is gone", steps, self.now))

    def submit(self, wanted: tuple[str, ...]) -> int:
        """A request."""
        number = len(self.answers)
        self.answers[number] = []
        self.tell(c.Submitted(number, wanted, 1, None, self.now))
        return number

    def settle(self) -> None:
        """Harm nobody any more, and let everything come to an end."""
        for process in self.processes.values():
            process.stopped = False
        for _ in range(100_000):
            while self.exits:
                self.notice(self.exits.pop())
            keys, busy = self.waiting(), self.busy()
            if keys and (not busy or self.choices.random() < 0.5):
                self.deliver(self.choices.choice(keys))
            elif busy:
                self.work(self.choices.choice(busy))
            elif self.ready and all(self.answers.values()) and not self.coordinator.roster.missing():
                return
            else:
                self.now += SECOND
                self.tell(c.Tick(self.now))
        raise AssertionError(f"no end: {[r for r, a in self.answers.items() if not a]} are not answered")

    # What is right

    def right(self, name: str, request: int, attempt: int) -> Any:
        """What a tensor is, when every stage made it of what it should."""
        if name in self.plan.inputs:
            return (name, request, attempt)
        stage = self.plan.stages[self.plan.producers()[name]]
        return (name, *(self.right(i, request, attempt) for i in sorted(stage.inputs)))

    def check(self) -> None:
        """At most one answer each, and all of it of one attempt."""
        for request, answers in self.answers.items():
            assert len(answers) <= 1, f"request {request} was answered {len(answers)} times"
            for answer in answers:
                assert isinstance(answer, dict), answer
                attempt = first_attempt(next(iter(answer.values())))
                assert answer == {name: self.right(name, request, attempt) for name in answer}


def first_attempt(value: Any) -> int:
    """The attempt that a tensor's first input was of."""
    while isinstance(value[1], tuple):
        value = value[1]
    return value[2]
