"""Sequences without nodes: plans with a decoder block, a decoder that is a hash of its history, and a driver."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import build
import msgspec

from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder, State
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.coordinator.events import (
    Forget,
    Introduce,
    Joined,
    KillNode,
    Lost,
    Met,
    Prepared,
    Reject,
    SendAway,
    StartNode,
    Tick,
)
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_limits import sequence_limits
from runtime.coordinator.state import CoordinatorState
from runtime.timings import Timings
from runtime.wire.messages.control import PROTOCOL, Hello
from runtime.wire.messages.data import Step
from runtime.wire.messages.sequences import Drawn, Sampling

VOCABULARY = 50_000
TIMINGS = Timings(backoff_s=1, settled_s=5, circuit_failures=3, circuit_s=30, lost_s=10)
_PLANS: dict[tuple[str, int], Plan] = {}


def _partitioned(shape: str, stages: int, folder: Path) -> Plan:
    if (shape, stages) not in _PLANS:
        model = build.save(build.diamond() if shape == "diamond" else build.chain(), folder)
        partition(model, stages=stages, out=folder / "m.plan", costs="analytic")
        _PLANS[shape, stages] = load_plan(folder / "m.plan")
    return _PLANS[shape, stages]


def decoder_plan(folder: Path, *, shape: str = "chain", stages: int = 2, token_bytes: int = 10, **options) -> Plan:
    """Return a plan with one state in each stage. ``options`` are fields of the decoder block."""
    plan = _partitioned(shape, stages, folder)
    states = tuple(
        State(
            past=f"past.{stage}",
            present=f"present.{stage}",
            kind="in-place",
            batch_axis=0,
            axis=1,
            shape=(1, 0),
            stage=stage,
            token_bytes=token_bytes,
            fixed_bytes=0,
        )
        for stage in range(stages)
    )
    sizes = {"vocabulary": VOCABULARY, "max_length": 1000, "cost_rows": 1}
    block = {"rows": "right", "chunk": "one-row", "rollback": True, **sizes, **options}
    decoder = Decoder(states=states, controls=(), scores="y", **block)
    return msgspec.structs.replace(plan, decoder=decoder)


def next_token(history: Sequence[int], vocabulary: int = VOCABULARY) -> int:
    """Return the token that follows a history: a hash of all of it."""
    digest = hashlib.blake2b(repr(tuple(history)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocabulary


def ready(plan, replicas, attempts, limits) -> CoordinatorState:
    """Return a machine whose nodes are ready, numbered from 1 by stage and replica."""
    machine = CoordinatorState(
        plan, replicas, choose=lambda *_: None, timings=TIMINGS, attempts=attempts, limits=limits
    )
    machine.handle(Tick(0))
    for slot, node in machine.roster.nodes.items():
        name = f"n{node.number}"
        machine.handle(Joined(name.encode(), Hello(PROTOCOL, 0, 1, "host", name, *slot, "", None, ""), 0))
    for number in range(1, sum(replicas) + 1):
        machine.handle(Prepared(f"n{number}".encode(), (), 0))
    assert machine.state is PipelinePhase.READY
    return machine


class Driver:
    """A coordinator whose pipeline is ready, and nodes that execute the steps that a test chooses.

    Attributes:
        machine: the coordinator's state machine.
        steps: the steps that were sent and have not come back, by number.
        tokens: the prompt of every sequence, and the tokens that its caller has got.
        ends: how each sequence has ended: a reason, or an error.
        forgotten: the sequences and epochs that nodes were told to forget.
        starting: the processes that were started and have not reported.
    """

    def __init__(self, folder, replicas=(1, 1), *, attempts=3, plan=None, decoder=None, **limits):
        self.plan = plan or decoder_plan(folder, stages=len(replicas), **(decoder or {}))
        self.limits = sequence_limits(self.plan, replicas=replicas, **{"cache_bytes": 1 << 30, **limits})
        self.machine = ready(self.plan, replicas, attempts, self.limits)
        self.now_ns = 0
        self.steps: dict[int, EnterStep] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.ends: dict[int, object] = {}
        self.forgotten: set[tuple[int, int]] = set()
        self.epochs: dict[int, int] = {}
        self.starting: list[StartNode] = []
        self.left: dict[int, set[tuple[int, int]]] = {}  # by step: slots from which rows were moved, and the rows
        self.states: dict[int, dict[int, tuple[int, int, int]]] = {}  # by node and sequence: epoch, slot and length

    def do(self, event):
        """Give the machine an event; return all its effects."""
        on_requests, on_nodes = self.machine.handle(event)
        effects = [*on_requests, *on_nodes]
        for effect in [*on_nodes, *on_requests]:
            self.note(effect)
        if any(isinstance(effect, Introduce) and effect.meet for effect in on_nodes):
            effects += self.do(Met((), self.now_ns))
        for number in [int(effect.identity[1:]) for effect in on_nodes if isinstance(effect, SendAway)]:
            if self.machine.roster.by_number(number) is not None:
                effects += self.lose(number, reason="has left")
        return effects

    def note(self, effect):
        """Record an effect, and check what has to hold of it."""
        match effect:
            case EnterStep():
                for row in effect.rows:
                    self.epochs[row.sequence] = row.epoch
                self.check_slots(effect)
                self.steps[effect.step] = effect
            case Emit(sequence, drawn):
                assert sequence not in self.ends
                assert drawn.position == len(self.tokens[sequence])
                self.tokens[sequence].append(drawn.token)
            case Finish(sequence, outcome) | Reject(sequence, outcome):
                assert sequence not in self.ends, f"sequence {sequence} has ended twice"
                self.ends[sequence] = outcome
            case Forget(sequence, epoch):
                self.forgotten.add((sequence, epoch))
            case StartNode():
                self.starting.append(effect)
            case KillNode(number):
                self.starting = [start for start in self.starting if start.number != number]

    def is_live(self, row):
        """Whether somebody waits for a row."""
        return row.sequence not in self.ends and (row.sequence, row.epoch) not in self.forgotten

    def check_slots(self, step):
        """Check that nodes can execute a step after all earlier ones, and that its slots are free of others."""
        slots = [row.slot for row in step.rows]
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        assert slots[-1] < self.limits.slots
        assert len({len(row.tokens) for row in step.rows}) == 1
        nodes = {number for number in step.route if number > 0}
        left = self.left[step.step] = set()
        for row in step.rows:
            assert row.tokens == tuple(self.tokens[row.sequence][row.start : row.start + len(row.tokens)])
            assert (row.opening is not None) == (row.start == 0)
            for other in self.steps.values():
                if nodes.intersection(other.route) and any(map(self.is_live, other.rows)):
                    taken = {one.slot for one in other.rows if one.sequence != row.sequence}
                    taken |= {slot for slot, sequence in self.left[other.step] if sequence != row.sequence}
                    assert row.slot not in taken, f"a step in flight holds slot {row.slot}"
        for number in nodes:
            held = self.states.setdefault(number, {})
            for sequence in [
                one for one, (epoch, _, _) in held.items() if one in self.ends or (one, epoch) in self.forgotten
            ]:
                del held[sequence]
            for row in step.rows:
                if row.start:
                    epoch, slot, length = held[row.sequence]
                    assert (epoch, length) == (row.epoch, row.start)
                    if slot != row.slot:
                        left.add((slot, row.sequence))
                held[row.sequence] = row.epoch, row.slot, row.start + len(row.tokens)
            taken = [slot for _, slot, _ in held.values()]
            assert len(taken) == len(set(taken)), "two sequences share a slot"

    def submit(self, prompt=3, max_tokens=5, *, wait=True, deadline_ns=None, scores=False, **sampling):
        """Submit a sequence with a prompt of so many tokens; return its number."""
        number = self.machine.numbers.next()
        self.tokens[number] = [100 * number + place for place in range(prompt)]
        self.prompts[number] = prompt
        self.do(
            SequenceSubmitted(
                number,
                tuple(self.tokens[number]),
                max_tokens,
                Sampling(**sampling),
                scores,
                wait,
                deadline_ns,
                self.now_ns,
            )
        )
        return number

    def answer(self, step):
        """The event with which a step comes back."""
        drawn = tuple(
            Drawn(row.sequence, row.epoch, end, next_token(self.tokens[row.sequence][:end]))
            for row in step.rows
            if row.draw and (end := row.start + len(row.tokens))
        )
        return StepReturned(step.step, drawn, (), self.now_ns)

    def come(self, number):
        """Let a step come back; return the effects."""
        return self.do(self.answer(self.steps.pop(number)))

    def run(self, count=None):
        """Let the oldest step in flight come back, so many times; without a number, until none is left."""
        while self.steps and count != 0:
            self.come(min(self.steps))
            count = None if count is None else count - 1

    def rows(self):
        """The sequences of the steps in flight, oldest step first."""
        return [[row.sequence for row in step.rows] for _, step in sorted(self.steps.items())]

    def step_of(self, sequence):
        """The last step in flight with a sequence."""
        return max(
            (s for s in self.steps.values() if any(r.sequence == sequence for r in s.rows)), key=lambda s: s.step
        )

    def lose(self, number, *, running=(), reason="was killed"):
        """A node is lost while it executes these steps. What is on its way through it never comes back."""
        steps = {(step, 1): {number: Step.RUNNING} for step in running}
        self.steps = {step: sent for step, sent in self.steps.items() if number not in sent.route}
        return self.do(Lost(number, reason, steps, self.now_ns))

    def arrive(self):
        """Let all processes that were started report and load; return the effects."""
        effects = []
        while self.starting:
            start = self.starting.pop(0)
            name = f"n{start.number}"
            hello = Hello(PROTOCOL, start.number, 1, "host", name, *start.slot, "", None, "")
            self.do(Joined(name.encode(), hello, self.now_ns))
            effects += self.do(Prepared(name.encode(), (), self.now_ns))
        return effects

    def is_right(self):
        """Whether all tokens are those that follow the prompts."""
        return all(
            tokens[place] == next_token(tokens[:place])
            for number, tokens in self.tokens.items()
            for place in range(self.prompts[number], len(tokens))
        )

    def check_end(self):
        """Check that every sequence has ended, and that nothing is left of any."""
        assert self.ends.keys() == self.tokens.keys()
        assert self.is_right()
        sequences = self.machine.sequences
        assert not len(sequences)
        assert not sequences.waiting
        assert not sequences.in_flight
        assert not any(sequences.uses(node.number) for node in self.machine.roster)
        assert not any(sequences.scheduler.chains.used_bytes(node.number) for node in self.machine.roster)
