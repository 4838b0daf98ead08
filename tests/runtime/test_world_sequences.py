"""In every order of messages and faults, every token of a sequence comes once and is right, and nothing is left of it.

The state machines of the coordinator and of the nodes are the real ones; the decoder is a hash of the text that the
slots of all nodes hold.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from fault_rules import FaultRules
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from sequence_driver import decoder_plan

from onnxsplit.errors import InputError
from runtime.coordinator import events as c
from runtime.coordinator.node_record import Phase
from runtime.coordinator.sequence_limits import sequence_limits
from runtime.errors import Busy, Cancelled, DeadlineExceeded, NodeFailed
from runtime.testing.pipeline import NEVER_FAILS, SimulatedPipeline

_FOLDER = Path(tempfile.mkdtemp())
_SMALL = 20  # tokens of the vocabulary, so that end tokens are drawn


def new_pipeline(replicas, seed=0, *, decoder=None, limits=None, kind=SimulatedPipeline, **options):
    """Return a pipeline with a decoder whose nodes are ready: a chain of two stages, or a diamond of four."""
    shape = "diamond" if len(replicas) == 4 else "chain"
    block = {"vocabulary": _SMALL, "max_length": 60, **(decoder or {})}
    plan = decoder_plan(_FOLDER, shape=shape, stages=len(replicas), **block)
    made = sequence_limits(plan, replicas=replicas, **{"cache_bytes": 1 << 20, "prefill_chunk": 4, **(limits or {})})
    pipeline = kind(plan, replicas, random.Random(seed), limits=made, **options)
    pipeline.settle()
    return pipeline


def settle(pipeline):
    """Let everything end, and check that it is right and that no slot is used anywhere."""
    pipeline.settle()
    pipeline.check()
    pipeline.pass_time(1)  # tells nodes that all has ended
    pipeline.settle()
    sequences = pipeline.coordinator.sequences
    assert not len(sequences)
    assert not sequences.in_flight
    kept = {node.number: [] for node in pipeline.nodes.values()}
    for chain in sequences._scheduler.chains:
        assert not chain.dropped
        for number in chain.nodes:
            kept[number] += chain.prefixes.kept.values()
    for node in pipeline.nodes.values():
        assert not sequences.scheduler.chains.used_bytes(node.number)
        if node.alive:
            ended = kept[node.number]
            assert node.state.sequences == len(ended)
            assert node.slots.texts.keys() == {one.slot for one in ended}, f"node {node.number} keeps states of nobody"
            assert all(node.slots.texts[one.slot][: one.sent] == one.history[: one.sent] for one in ended)
    assert not pipeline.coordinator.roster.departing
    assert {record.phase for record in pipeline.coordinator.roster.nodes.values()} == {Phase.READY}


class Faults(FaultRules):
    """Sequences, messages in any order, and faults."""

    @initialize(
        replicas=st.one_of(st.tuples(*[st.integers(1, 2)] * 2), st.tuples(*[st.integers(1, 2)] * 4)),
        rows=st.sampled_from(["right", "equal", "one"]),
        chunk=st.sampled_from(["one-row", "none"]),
        rollback=st.booleans(),
        max_rows=st.integers(1, 6),
        cache_bytes=st.sampled_from([600, 1200, 1 << 20]),
        reuse=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def begin(self, replicas, rows, chunk, rollback, max_rows, cache_bytes, reuse, seed):
        decoder = {"rows": rows, "chunk": chunk, "rollback": rollback}
        limits = {"max_rows": max_rows, "cache_bytes": cache_bytes, "prefix_reuse": reuse}
        self.pipeline = new_pipeline(replicas, seed, decoder=decoder, limits=limits)
        self.given_up = set()

    @rule(prompt=st.integers(1, 12), max_tokens=st.integers(1, 12), ends=st.integers(0, 2), wait=st.booleans())
    def generate(self, prompt, max_tokens, ends, wait):
        tokens = tuple(self.pipeline.choices.randrange(_SMALL) for _ in range(prompt))
        self.pipeline.generate(tokens, max_tokens, end_tokens=tuple(range(ends)), wait=wait)

    @rule(data=st.data(), more=st.integers(0, 9), max_tokens=st.integers(1, 12))
    def generate_alike(self, data, more, max_tokens):
        if self.pipeline.sequences:
            other = self.pipeline.sequences[data.draw(st.sampled_from(sorted(self.pipeline.sequences)))]
            text = (*other.prompt, *(drawn.token for drawn in other.drawn))
            shared = text[: data.draw(st.integers(1, len(text)))][:36]
            added = tuple(self.pipeline.choices.randrange(_SMALL) for _ in range(more))
            self.pipeline.generate((*shared, *added), max_tokens)

    @rule(data=st.data(), count=st.integers(1, 30))
    def go_on(self, data, count):
        self.proceed(data, count)

    @rule(count=st.integers(50, 200))
    def go_on_at_random(self, count):
        for _ in range(count):
            keys, busy = self.pipeline.waiting(), self.pipeline.busy()
            if not keys and not busy:
                return
            if keys and (not busy or self.pipeline.choices.random() < 0.5):
                self.pipeline.deliver(self.pipeline.choices.choice(keys))
            else:
                self.pipeline.work(self.pipeline.choices.choice(busy))

    @rule(data=st.data())
    def overtake(self, data):
        keys = [key for key in self.pipeline.waiting() if key[2] == "data"]
        if keys:
            self.pipeline.links[data.draw(st.sampled_from(keys))].rotate(1)

    @rule(data=st.data(), replicas=st.integers(1, 3), tentative=st.booleans())
    def scale(self, data, replicas, tentative):
        stage = data.draw(st.integers(0, len(self.pipeline.plan.stages) - 1))
        self.pipeline.tell(c.Scaled(stage, replicas, self.pipeline.now_ns, tentative))

    @rule(data=st.data(), expires=st.booleans())
    def give_up(self, data, expires):
        open_ = [number for number, sequence in self.pipeline.sequences.items() if not sequence.ends]
        if open_:
            number = data.draw(st.sampled_from(open_))
            self.pipeline.tell(c.Expired(number, {}) if expires else c.GivenUp(number))
            assert self.pipeline.sequences[number].ends

    @precondition(lambda self: hasattr(self, "pipeline"))
    @invariant()
    def all_is_right(self):
        self.pipeline.check()

    def teardown(self):
        if hasattr(self, "pipeline"):
            settle(self.pipeline)
            for sequence in self.pipeline.sequences.values():
                assert isinstance(sequence.ends[0], str | Busy | Cancelled | DeadlineExceeded), sequence.ends


class MoreFaults(Faults):
    """The same with longer runs."""


Faults.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
MoreFaults.TestCase.settings = settings(max_examples=1_000, stateful_step_count=100)
TestFaults = Faults.TestCase
TestMoreFaults = pytest.mark.exhaustive(MoreFaults.TestCase)


@pytest.mark.parametrize("replicas", [(1, 1), (2, 3), (1, 1, 1, 1), (1, 2, 2, 1)])
@pytest.mark.parametrize("rows", ["right", "equal", "one"])
def test_without_harm_nothing_is_replayed(replicas, rows):
    pipeline = new_pipeline(replicas, decoder={"rows": rows})
    for number in range(40):
        pipeline.generate(tuple(range(number % 7 + 1)), 1 + number % 20)
        pipeline.submit(("y",))
    settle(pipeline)
    assert pipeline.coordinator.sequences.replays == 0
    assert pipeline.coordinator.requests.retries == 0
    assert all(sequence.ends == ["length"] for sequence in pipeline.sequences.values())


def test_two_prompts_have_two_texts():
    pipeline = new_pipeline((1, 1), decoder={"vocabulary": 10_000})
    one, other = pipeline.generate((1, 2, 3), 8), pipeline.generate((1, 2, 4), 8)
    settle(pipeline)
    assert [token.token for token in pipeline.sequences[one].drawn] != [
        token.token for token in pipeline.sequences[other].drawn
    ]


def test_a_thousand_sequences_survive_a_node_killed_again_and_again():
    pipeline = new_pipeline((2, 2), seed=3, limits={"max_rows": 8})
    choices = random.Random(4)
    for _ in range(1000):
        pipeline.generate(
            tuple(choices.randrange(_SMALL) for _ in range(choices.randrange(1, 9))), choices.randrange(1, 20)
        )
    while pipeline.unanswered:
        for _ in range(2000):
            keys, busy = pipeline.waiting(), pipeline.busy()
            if keys and (not busy or choices.random() < 0.5):
                pipeline.deliver(choices.choice(keys))
            elif busy:
                pipeline.work(choices.choice(busy))
        pipeline.kill(choices.choice([node.number for node in pipeline.nodes.values() if node.alive]))
        for number in tuple(pipeline.exits):
            pipeline.notice(number)
        pipeline.pass_time(1)
    assert pipeline.coordinator.sequences.replays > 100
    settle(pipeline)
    assert all(sequence.ends == ["length"] for sequence in pipeline.sequences.values())


def alike(pipeline, choices):
    """The beginning of the text of a sequence so far."""
    if not pipeline.sequences or choices.random() < 0.3:
        return ()
    other = pipeline.sequences[choices.choice(sorted(pipeline.sequences)[-10:])]
    text = (*other.prompt, *(drawn.token for drawn in other.drawn))
    return text[: choices.randrange(len(text) + 1)][:30]


def drive(pipeline, choices, actions, *, lively):
    """Take random actions: mostly messages and work, else what begins, ends and harms sequences."""
    kinds = {"work": 1.0, "generate": 0.06, "give up": 0.03, "overtake": 0.02, "harm": lively, "wait": lively}
    for _ in range(actions):
        keys, busy = pipeline.waiting(), pipeline.busy()
        open_ = pipeline.unanswered
        match choices.choices(list(kinds), list(kinds.values()))[0]:
            case "generate" if len(open_) < 20:
                prompt = tuple(choices.randrange(_SMALL) for _ in range(choices.randrange(1, 9)))
                pipeline.generate(alike(pipeline, choices) + prompt, choices.randrange(1, 12))
            case "give up" if open_:
                pipeline.tell(c.GivenUp(choices.choice(open_)))
            case "overtake" if data := [key for key in keys if key[2] == "data"]:
                pipeline.links[choices.choice(data)].rotate(1)
            case "harm" if alive := [node.number for node in pipeline.nodes.values() if node.alive]:
                choices.choice([pipeline.kill, pipeline.notice, pipeline.stop, pipeline.wake])(choices.choice(alive))
            case "wait":
                pipeline.pass_time(choices.randrange(1, 200))
                for number in tuple(pipeline.exits):
                    pipeline.notice(number)
            case _ if keys and (not busy or choices.random() < 0.5):
                pipeline.deliver(choices.choice(keys))
            case _ if busy:
                pipeline.work(choices.choice(busy))


@pytest.mark.parametrize("lively", [0.0, 0.005])
@pytest.mark.parametrize("seed", range(8))
def test_texts_stay_right_while_many_sequences_come_and_are_given_up(seed, lively):
    choices = random.Random(seed)
    replicas = choices.choice([(1, 1), (1, 2), (2, 2), (1, 1, 1, 1)])
    rows = choices.choice(["right", "right", "equal", "one"])
    limits = {"max_rows": choices.choice([3, 4, 6]), "decode_groups": choices.choice([None, 1, 2])}
    pipeline = new_pipeline(replicas, seed, decoder={"rows": rows}, limits=limits)
    drive(pipeline, choices, 4000, lively=lively)
    settle(pipeline)
    assert pipeline.coordinator.sequences.reused_tokens > 0
    if not lively:
        assert pipeline.coordinator.sequences.replays == 0


class Timed(SimulatedPipeline):
    """A pipeline in simulated time whose nodes need a millisecond for each run, and for each ten tokens."""

    ran_ns: int = 0
    tokens: int = 0

    def run_step(self, node, run, placed):
        super().run_step(node, run, placed)
        self.tokens = sum(len(row.tokens) for row in run.fragments[0].rows)

    def duration_ns(self, node):
        return max(1_000_000, self.tokens * 100_000)

    def node_ran(self, node, took_ns):
        self.ran_ns += took_ns


@pytest.mark.parametrize(("groups", "share"), [(3, 0.97), (1, 0.46)])
def test_one_group_more_than_stages_keeps_all_nodes_busy(groups, share):
    pipeline = new_pipeline((1, 1), kind=Timed, delay_ns=50_000, limits={"decode_groups": groups})
    for number in range(9):
        pipeline.generate((number,), 50)
    while pipeline.coordinator.sequences.tokens < 90:
        assert pipeline.step()
    began_ns, pipeline.ran_ns = pipeline.now_ns, 0
    while pipeline.coordinator.sequences.tokens < 390:
        assert pipeline.step()
    busy = pipeline.ran_ns / (2 * (pipeline.now_ns - began_ns))
    assert share <= busy <= share + 0.03
    settle(pipeline)


def test_tokens_of_others_wait_for_few_parts_of_a_long_prompt():
    limits = {"prefill_chunk": 100}
    pipeline = new_pipeline((1, 1), kind=Timed, delay_ns=50_000, decoder={"max_length": 2000}, limits=limits)
    others = [pipeline.generate((number,), 200) for number in range(6)]
    while pipeline.coordinator.sequences.tokens < 100:
        assert pipeline.step()
    long = pipeline.generate(tuple(number % _SMALL for number in range(1000)), 5)
    gaps, last_ns = [], {number: (pipeline.now_ns, len(pipeline.sequences[number].drawn)) for number in others}
    while not pipeline.sequences[long].drawn:
        assert pipeline.step()
        for number in others:
            count = len(pipeline.sequences[number].drawn)
            if count > last_ns[number][1]:
                gaps.append(pipeline.now_ns - last_ns[number][0])
                last_ns[number] = pipeline.now_ns, count
    assert len(gaps) > 50
    assert max(gaps) <= 3 * 10_000_000, "of ten milliseconds each"
    settle(pipeline)


class Killers(SimulatedPipeline):
    """A pipeline with sequences that kill each node of stage 1 that executes them."""

    killers: frozenset[int] = frozenset()

    def run_step(self, node, run, placed):
        super().run_step(node, run, placed)
        if node.slot[0] == 1 and self.killers.intersection(row.sequence for row in run.fragments[0].rows):
            self.kill(node.number)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("replicas", [(1, 1), (1, 2)])
def test_a_sequence_that_kills_nodes_is_refused_and_its_neighbours_are_not(seed, replicas):
    pipeline = new_pipeline(replicas, seed, kind=Killers, attempts=3, timings=NEVER_FAILS)
    numbers = [pipeline.generate((number, 2, 3), 12) for number in range(6)]
    for _ in range(150):
        if busy := pipeline.busy():
            pipeline.work(busy[0])
        elif keys := pipeline.waiting():
            pipeline.deliver(keys[0])
    open_ = [number for number in numbers if not pipeline.sequences[number].ends]
    pipeline.killers = frozenset(open_[:1])
    settle(pipeline)
    for number in numbers:
        (end,) = pipeline.sequences[number].ends
        if number in pipeline.killers:
            assert isinstance(end, NodeFailed)
            assert "after it ran on 3 nodes" in str(end)
        else:
            assert end == "length"


def test_a_sequence_that_never_fits_is_refused():
    pipeline = new_pipeline((1, 1))
    number = pipeline.generate(tuple(range(50)), 11)
    assert isinstance(pipeline.sequences[number].ends[0], InputError)
    settle(pipeline)
