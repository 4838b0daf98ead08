"""Sequences without nodes: plans with a decoder block, a decoder that is a hash of its history, and a driver."""

from __future__ import annotations

import hashlib
from pathlib import Path

import build
import msgspec

from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder, State
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime.coordinator.events import Introduce, Joined, Met, Prepared, Reject, Tick
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_limits import sequence_limits
from runtime.coordinator.state import CoordinatorState, PipelinePhase
from runtime.timings import Timings
from runtime.wire.messages.control import PROTOCOL, Hello
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
    block = {"rows": "right", "chunk": "one-row", "rollback": True, "max_length": 1000, "cost_rows": 1, **options}
    decoder = Decoder(states=states, controls=(), scores="y", vocabulary=VOCABULARY, **block)
    return msgspec.structs.replace(plan, decoder=decoder)


def next_token(history: tuple[int, ...], vocabulary: int = VOCABULARY) -> int:
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
    """A coordinator whose pipeline is ready, and nodes that execute the steps that a test chooses."""

    def __init__(self, folder, replicas=(1, 1), *, attempts=3, stages=2, plan=None, **limits):
        self.plan = plan or decoder_plan(folder, stages=stages)
        self.limits = sequence_limits(self.plan, replicas=replicas, **{"cache_bytes": 1 << 30, **limits})
        self.machine = ready(self.plan, replicas, attempts, self.limits)
        self.now_ns = 0
        self.texts: dict[int, list[int]] = {}
        self.steps: dict[int, EnterStep] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, object] = {}

    def do(self, event):
        """Give the machine an event; return all its effects."""
        on_requests, on_nodes = self.machine.handle(event)
        effects = self.note([*on_requests, *on_nodes])
        if any(isinstance(effect, Introduce) and effect.meet for effect in on_nodes):
            effects += self.do(Met((), self.now_ns))
        return effects

    def note(self, effects):
        for effect in effects:
            match effect:
                case EnterStep():
                    self.steps[effect.step] = effect
                    for row in effect.rows:
                        text = self.texts.setdefault(row.sequence, [])
                        text[row.start :] = row.tokens
                case Emit(sequence, drawn):
                    assert sequence not in self.ends
                    assert drawn.position == len(self.tokens[sequence])
                    self.tokens[sequence].append(drawn.token)
                case Finish(sequence, outcome) | Reject(sequence, outcome):
                    assert sequence not in self.ends
                    self.ends[sequence] = outcome
        return effects

    def submit(self, prompt=(1, 2, 3), max_tokens=5, *, wait=True, deadline_ns=None, **sampling):
        number = self.machine.numbers.next()
        prompt = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
        self.tokens[number] = list(prompt)
        self.do(
            SequenceSubmitted(number, prompt, max_tokens, Sampling(**sampling), False, wait, deadline_ns, self.now_ns)
        )
        return number

    def answer(self, step):
        """The event with which a step comes back."""
        drawn = tuple(
            Drawn(row.sequence, row.epoch, row.start + len(row.tokens), next_token(self.texts[row.sequence]))
            for row in step.rows
            if row.draw
        )
        return StepReturned(step.step, drawn, (), self.now_ns)

    def run(self, count=None):
        """Let the oldest step in flight come back, so many times; without a number, until none is left."""
        while self.steps and count != 0:
            self.do(self.answer(self.steps.pop(min(self.steps))))
            count = None if count is None else count - 1

    def rows(self):
        """The sequences of the steps in flight."""
        return [[row.sequence for row in step.rows] for step in self.steps.values()]


def right(driver):
    """Whether all tokens are those that a decoder without nodes would choose."""
    return all(
        tokens[place] == next_token(tokens[:place])
        for number, tokens in driver.tokens.items()
        if number in driver.ends
        for place in range(3, len(tokens))
    )
