"""Steps of sequences at nodes: any split into steps and chunks and any rows give what the whole model gives."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from decoder_plans import cut, describe
from decoder_runs import FAMILIES, Reference
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import CALLER, Plan
from onnxsplit.session import Session, open_session
from runtime.node.events import (
    Arrived,
    Assigned,
    AttemptCancelled,
    ClearSlots,
    Executed,
    ExecutionFailed,
    Forward,
    GiveBack,
    Loaded,
    Passed,
    ReportFailure,
    Run,
    Turn,
    Wired,
)
from runtime.node.guides import StageGuides
from runtime.node.sequence_runner import SequenceRunner
from runtime.node.state import NodeState
from runtime.topology import StepGraph
from runtime.wire.messages.control import Assign, Peer, Wire
from runtime.wire.messages.data import Failed, Fragment, TensorHead
from runtime.wire.messages.sequences import Opening, Reuse, Sampling, StepRow

SLOTS, LENGTH = 5, 40

CASES = {
    "in place": {"family": "gqa", "kind": "in-place", "rows": "right", "chunk": "one-row"},
    "in place by standard ops": {"family": "tensor scatter", "kind": "in-place", "rows": "right", "chunk": "rows"},
    "append, left": {"family": "plain", "kind": "append", "rows": "left", "chunk": "rows"},
    "append, holes": {"family": "plain", "kind": "append", "rows": "holes", "chunk": "rows"},
    "append, equal": {"family": "gpt2", "kind": "append", "rows": "equal", "chunk": "one-row"},
    "append, one": {"family": "plain, no positions", "kind": "append", "rows": "one", "chunk": "none"},
    "recurrent": {"family": "lstm by layer", "kind": "recurrent", "rows": "right", "chunk": "rows"},
    "recurrent, one stage": {"family": "gru", "kind": "recurrent", "rows": "right", "chunk": "rows", "stages": 1},
    "window": {"family": "window", "kind": "window", "rows": "equal", "chunk": "rows", "capacity": 8},
    "mixed": {"family": "mixed", "kind": "append", "rows": "left", "chunk": "rows"},
}


@dataclass
class Case:
    """A cut decoder, its sessions, and the whole model."""

    plan: Plan
    sessions: list[Session]
    reference: Reference

    def __post_init__(self) -> None:
        self._first = self.reference.states

    def scores(self, tokens: list[int]) -> np.ndarray:
        """The whole model's scores behind a text, in one run."""
        self.reference.states, self.reference.length = self._first, 0
        return self.reference.step([tokens])[0, -1]


@pytest.fixture(scope="module", autouse=True)
def small_pools():
    """Pools with holes that grow and shrink all the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.node.caches.holes.SMALLEST", 4)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @cache
    def make(name: str) -> Case:
        options = dict(CASES[name])
        family, stages = options.pop("family"), options.pop("stages", 2)
        model = FAMILIES[family].make(seed=3)
        folder: Path = tmp_path_factory.mktemp("plans") / "p"
        plan = cut(model, describe(family, model, length=LENGTH, **options), folder, stages=stages)
        sessions = [open_session(folder / stage.file, threads=1) for stage in plan.stages]
        return Case(plan, sessions, Reference(FAMILIES[family], model))

    return make


@dataclass
class Node:
    """The state machine of a node, and what runs its steps."""

    state: NodeState
    runner: SequenceRunner
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


class World:
    """The nodes of one chain, and messages to them that arrive in any order."""

    def __init__(self, case: Case) -> None:
        self.plan = case.plan
        self.graph = StepGraph(case.plan)
        self.messages: list[tuple[int, object]] = []
        self.results: dict[int, tuple[Fragment, np.ndarray]] = {}
        self.failed: list[Failed] = []
        self.sent: Counter[tuple[int, int, int]] = Counter()  # fragments that are not given back
        self.cancelled: set[tuple[int, int]] = set()  # sequences and epochs
        self.nodes = [self.make(stage.index, case.sessions[stage.index]) for stage in case.plan.stages]

    def make(self, stage: int, session: Session) -> Node:
        state = NodeState()
        state.handle(Assigned(Assign("", "", "", stage, 0, "cpu", 0, False, False, 1, 1, "completion", SLOTS, LENGTH)))
        state.handle(Loaded(self.plan))
        peers = [Peer(0, CALLER, 0, False, "", "", None, "")]
        peers += [Peer(one.index + 1, one.index, 0, True, "", "", None, "") for one in self.plan.stages]
        state.handle(Wired(Wire(1, stage + 1, tuple(peers))))
        return Node(state, SequenceRunner(self.plan, stage, session, SLOTS, LENGTH, StageGuides(None)))

    def step(self, number: int, rows: tuple[StepRow, ...], scores: bool = True) -> None:
        """Send a step to the stages that begin it."""
        route = tuple(stage.index + 1 for stage in self.plan.stages)
        wanted = (self.plan.decoder.scores,) if scores else ()
        for stage, sources in self.graph.sources.items():
            if CALLER in sources:
                fragment = Fragment(number, 1, 1, 1000, 0, 0, CALLER, route, wanted, (), (), rows)
                self.post(stage, Arrived(fragment, {}, 0))

    def post(self, stage: int, event: object) -> None:
        if isinstance(event, Arrived):
            self.sent[stage, event.fragment.request, event.fragment.source] += 1
        self.messages.append((stage, event))

    def tell_all(self, event: object) -> None:
        if isinstance(event, AttemptCancelled):
            self.cancelled.add((event.request, event.attempt))
        for node in self.nodes:
            self.post(self.nodes.index(node), event)

    def deliver(self, at: int) -> None:
        """Deliver one message, and let its node do all that it can."""
        stage, event = self.messages.pop(at)
        self.handle(stage, event)
        while self.nodes[stage].state.ready:
            self.handle(stage, Turn(0))

    def handle(self, stage: int, event: object) -> None:
        node = self.nodes[stage]
        effects = deque(node.state.handle(event))
        while effects:
            answer = self.perform(stage, node, effects.popleft())
            if answer is not None:
                effects.extend(node.state.handle(answer))

    def perform(self, stage: int, node: Node, effect: object) -> object:
        match effect:
            case Run():
                names = tuple(dict.fromkeys(name for _, names in effect.leaving for name in names))
                rows = effect.fragments[0].rows
                into = {n: np.empty(shape, dtype) for n, (dtype, shape) in node.runner.shapes(rows, names).items()}
                try:
                    made, drawn = node.runner.run(rows, effect.placed, effect.inputs, into, names)
                except OnnxsplitError as error:
                    return ExecutionFailed(str(error))
                node.outputs = {name: array.copy() for name, array in made.items()}
                return Executed(0, 0, 0, 0, 0, drawn)
            case Forward():
                self.forward(stage, node, effect)
            case GiveBack(fragments):
                for fragment in fragments:
                    self.sent[stage, fragment.request, fragment.source] -= 1
            case ClearSlots(slots):
                node.runner.clear(slots)
            case ReportFailure(message):
                self.failed.append(message)
        return None

    def forward(self, stage: int, node: Node, effect: Forward) -> None:
        first = effect.fragment
        drawn = tuple(one for one in effect.drawn if (one.sequence, one.epoch) not in self.cancelled)  # as sequences do
        for target, names in effect.leaving:
            tensors = {name: node.outputs[name] for name in names}
            heads = tuple(TensorHead(name, "float32", array.shape, None) for name, array in tensors.items())
            fragment = Fragment(
                first.request, 1, 1, 1000, 0, stage + 1, stage, first.route, first.wanted, heads, effect.history,
                first.rows, drawn if target == CALLER else (),
            )  # fmt: skip
            if target == CALLER:
                assert first.request not in self.results
                self.results[first.request] = fragment, tensors.get(self.plan.decoder.scores)
            else:
                self.post(target, Arrived(fragment, tensors, 0))

    def in_flight(self) -> set[int]:
        """The steps of which some node has fragments, or will get them."""
        return {step for (_, step, _), count in self.sent.items() if count}


def row(sequence: int, slot: int, start: int, tokens, *, epoch: int = 1, draw: bool = True, prompt: int = 1) -> StepRow:
    opening = Opening(prompt, Sampling()) if start == 0 else None
    return StepRow(sequence, epoch, slot, start, tuple(tokens), draw, opening)


@dataclass
class Story:
    """A sequence as the coordinator knows it."""

    number: int
    slot: int
    tokens: list[int]
    epoch: int = 1


class Coordinator:
    """Sends steps as the coordinator does, but with tokens of its own choice, so that it need not wait for answers."""

    def __init__(self, case: Case, data: st.DataObject) -> None:
        self.case, self.data = case, data
        self.world = World(case)
        self.number = 0
        self.stories: list[Story] = []
        self.held: dict[int, set[int]] = {}  # the slots that a step in flight holds
        self.expected: dict[tuple[int, int, int], list[int]] = {}  # text behind which each token is drawn
        self.sent: dict[int, tuple[StepRow, ...]] = {}

    def next(self) -> int:
        self.number += 1
        return self.number

    def pick(self, options):
        return self.data.draw(st.sampled_from(list(options)))

    def some_tokens(self, most: int) -> list[int]:
        return self.data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=most))

    def free(self) -> list[int]:
        flying = self.world.in_flight()
        self.held = {step: slots for step, slots in self.held.items() if step in flying}
        taken = {story.slot for story in self.stories}.union(*self.held.values())
        return sorted(set(range(SLOTS)) - taken)

    def send(self, rows: list[StepRow], also: set[int] = frozenset()) -> None:
        step = self.next()
        self.held[step] = {one.slot for one in rows} | also
        self.sent[step] = tuple(rows)
        self.world.step(step, tuple(rows))

    def chunks(self, story: Story) -> None:
        """Send the whole text of a sequence in chunks."""
        start = 0
        while start < len(story.tokens):
            most = len(story.tokens) - start
            size = most if self.case.plan.decoder.chunk == "none" else self.data.draw(st.integers(1, most))
            part = story.tokens[start : start + size]
            self.send([self.row_of(story, start, part, draw=start + size == len(story.tokens))])
            start += size

    def row_of(self, story: Story, start: int, tokens: list[int], *, draw: bool = True) -> StepRow:
        if draw:
            self.expected[story.number, story.epoch, start + len(tokens)] = story.tokens[: start + len(tokens)]
        return row(story.number, story.slot, start, tokens, epoch=story.epoch, draw=draw)

    def open(self) -> None:
        if free := self.free():
            story = Story(self.next(), free[0], self.some_tokens(6))
            self.stories.append(story)
            self.chunks(story)

    def decode(self) -> None:
        if not self.stories:
            return
        decoder = self.case.plan.decoder
        by_slot = {story.slot: story for story in self.stories}
        together = [self.pick(self.stories)]
        while decoder.rows != "one" and (other := by_slot.get(together[-1].slot + 1)) is not None:
            if decoder.rows == "equal" and len(other.tokens) != len(together[0].tokens):
                break
            together.append(other)
        most = 3 if decoder.chunk == "rows" or (decoder.chunk == "one-row" and len(together) == 1) else 1
        new = self.data.draw(st.integers(1, most))
        if max(len(story.tokens) for story in together) + new > LENGTH:
            return
        rows = []
        for story in together:
            start = len(story.tokens)
            story.tokens = story.tokens + [self.data.draw(st.integers(0, 99)) for _ in range(new)]
            rows.append(self.row_of(story, start, story.tokens[start:]))
        self.send(rows)

    def move(self) -> None:
        free = self.free()
        if self.stories and free:
            story = self.pick(self.stories)
            if len(story.tokens) < LENGTH:
                source, story.slot = story.slot, self.pick(free)
                story.tokens = [*story.tokens, self.data.draw(st.integers(0, 99))]
                start = len(story.tokens) - 1
                self.send([self.row_of(story, start, story.tokens[start:])], {source})

    def replay(self) -> None:
        free = self.free()
        if self.stories and free:
            story = self.pick(self.stories)
            self.world.tell_all(AttemptCancelled(story.number, story.epoch))
            story.slot, story.epoch = free[0], story.epoch + 1
            self.chunks(story)

    def end(self) -> None:
        if self.stories:
            story = self.stories.pop(self.stories.index(self.pick(self.stories)))
            self.world.tell_all(AttemptCancelled(story.number, story.epoch))

    def pass_(self) -> None:
        self.world.tell_all(Passed(min([story.number for story in self.stories], default=self.number + 1)))

    def arrive(self) -> None:
        for _ in range(3):
            if self.world.messages:
                self.world.deliver(self.data.draw(st.integers(0, len(self.world.messages) - 1)))

    def finish(self) -> None:
        """Deliver everything; compare all tokens and scores with the whole model; end all sequences."""
        world = self.world
        while world.messages:
            world.deliver(0)
        assert not world.failed
        drawn = {}
        for step, (fragment, scores) in world.results.items():
            assert fragment.rows == self.sent[step]
            places = {one.sequence: place for place, one in enumerate(fragment.rows)}
            for token in fragment.drawn:
                key = token.sequence, token.epoch, token.position
                assert key not in drawn
                drawn[key] = token.token, scores[places[token.sequence]].reshape(-1)
        for key, (token, scores) in drawn.items():
            whole = self.case.scores(self.expected[key])
            assert np.abs(scores - whole).max() <= 1e-5 * np.abs(whole).max()
            assert token == scores.argmax()
        live = {(story.number, story.epoch) for story in self.stories}
        assert {key for key in self.expected if key[:2] in live} <= drawn.keys()
        self.stories = []
        self.pass_()
        while world.messages:
            world.deliver(0)
        assert not world.in_flight()
        assert all(node.state.sequences == node.state.state_bytes == 0 for node in world.nodes)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_steps_in_any_order_give_what_the_whole_model_gives(case, name, data):
    coordinator = Coordinator(case(name), data)
    actions = [
        coordinator.open, coordinator.decode, coordinator.decode, coordinator.decode, coordinator.move,
        coordinator.replay, coordinator.end, coordinator.pass_, coordinator.arrive, coordinator.arrive,
    ]  # fmt: skip
    for action in data.draw(st.lists(st.sampled_from(range(len(actions))), min_size=10, max_size=40)):
        actions[action]()
    coordinator.finish()


# What a node refuses


@pytest.fixture
def world(case):
    return World(case("in place"))


def good(**changes) -> tuple[StepRow, ...]:
    fields = {"sequence": 5, "epoch": 1, "slot": 0, "start": 0, "tokens": (1, 2), "draw": True} | changes
    fields.setdefault("opening", Opening(1, Sampling()) if fields["start"] == 0 else None)
    return (StepRow(**fields),)


def reusing(tokens: int, length: int, *, sequence: int = 4, token: int = 1) -> Opening:
    return Opening(1, Sampling(), (token,) * tokens, Reuse(sequence, 1, length))


BAD = {
    "start beyond the length": (good(start=LENGTH), "positions 40 to 42; at most 40"),
    "tokens beyond the length": (good(start=LENGTH - 1), "positions 39 to 41; at most 40"),
    "a token beyond the vocabulary": (good(tokens=(7, 100)), "token 100; tokens are below 100"),
    "a slot beyond the slots": (good(slot=SLOTS), "there are 5 slots"),
    "more rows than slots": (good() + sum((good(sequence=n, slot=n) for n in range(6, 12)), ()), "7 rows for 5 slots"),
    "no opening": (good(opening=None), "begins without an opening"),
    "rows with gaps": (good(tokens=(1,)) + good(sequence=6, slot=2, tokens=(1,)), "belongs into slot 1"),
    "unequal rows": (good(tokens=(1,)) + good(sequence=6, slot=1), "has 2 new tokens, the first row has 1"),
    "one sequence twice": (good(tokens=(1,)) + good(slot=1, tokens=(1,)), "the same sequence twice"),
    "chunks that the model does not take": (good() + good(sequence=6, slot=1), "2 rows with 2 new tokens each"),
    "a bias for no token": (good(opening=Opening(1, Sampling(bias=((100, 1.0),)))), "token 100 among the biases"),
    "reuse that begins elsewhere": (good(start=4, opening=reusing(4, 3)), "at 4, and reuses 3 positions with 4 tokens"),
    "reuse of unnamed tokens": (good(start=4, opening=reusing(3, 4)), "reuses 4 positions with 3 tokens"),
    "reuse of its own states": (good(start=4, opening=reusing(4, 4, sequence=5)), "reuses its own states"),
    "reuse of no token": (good(start=4, opening=reusing(4, 4, token=100)), "token 100 among those reused"),
    "reused tokens at the start": (good(opening=reusing(4, 4)), "it begins at 0, and reuses 4 positions"),
}


@pytest.mark.parametrize(("rows", "reason"), BAD.values(), ids=BAD)
def test_a_bad_step_fails_alone_and_says_why(world, rows, reason):
    world.step(1, rows)
    world.step(2, good(sequence=9, slot=3))
    while world.messages:
        world.deliver(0)
    (failed,) = world.failed
    assert (failed.request, failed.attempt) == (1, 1)
    assert reason in failed.reason
    assert set(world.results) == {2}
    assert not world.in_flight()


def test_a_bad_step_with_the_number_of_a_sequence_takes_no_states_from_it(world):
    world.step(2, good(sequence=1, slot=3))
    world.step(1, good(slot=SLOTS))
    world.step(4, good(sequence=1, slot=3, start=2, tokens=(3,)))
    while world.messages:
        world.deliver(0)
    assert [failed.request for failed in world.failed] == [1]
    assert set(world.results) == {2, 4}


def test_rows_for_a_plan_without_a_decoder_are_refused(diamond_plan):
    from onnxsplit.plan_files import load_plan

    state = NodeState()
    state.handle(Assigned(Assign("", "", "", 0, 0, "cpu", 0, False, False, 1, 1, "completion")))
    state.handle(Loaded(load_plan(diamond_plan)))
    state.handle(Wired(Wire(1, 1, ())))
    fragment = Fragment(1, 1, 1, 1000, 0, 0, CALLER, (1, 2, 3, 4), (), (), (), good())
    back, failure = state.handle(Arrived(fragment, {}, 0))
    assert back == GiveBack((fragment,))
    assert "the plan has no decoder" in failure.message.reason


def test_a_step_whose_sources_disagree_fails_once(case):
    world = World(case("in place"))
    node = world.nodes[1].state
    node._steps.sources = frozenset({0, CALLER})
    first = Fragment(1, 1, 1, 1000, 0, 1, 0, (1, 2), (), (), (), good())
    other = Fragment(1, 1, 1, 1000, 0, 0, CALLER, (1, 2), (), (), (), good(tokens=(3, 4)))
    assert node.handle(Arrived(first, {}, 0)) == []
    effects = node.handle(Arrived(other, {}, 0))
    assert {fragment for effect in effects if isinstance(effect, GiveBack) for fragment in effect.fragments} == {
        first,
        other,
    }
    (failure,) = (effect for effect in effects if isinstance(effect, ReportFailure))
    assert "differ between its sources" in failure.message.reason
    assert node.handle(Arrived(first, {}, 0)) == [GiveBack((first,))]


def test_scores_that_are_no_numbers_fail_the_step_and_leave_the_states(case):
    world = World(case("in place"))
    world.step(1, good())
    while world.messages:
        world.deliver(0)
    runner = world.nodes[1].runner
    right = runner._caches.run

    def broken(*arguments):
        outputs = right(*arguments)
        return outputs | {"logits": np.full_like(outputs["logits"], np.nan)}

    runner._caches.run = broken
    world.step(2, good(start=2, tokens=(3,)))
    while world.messages:
        world.deliver(0)
    assert "sequence 5 at position 3 hold nan" in world.failed[0].reason
    runner._caches.run = right
    world.step(3, good(start=0, epoch=2, tokens=(1, 2)))
    world.step(4, good(start=2, epoch=2, tokens=(3,)))
    while world.messages:
        world.deliver(0)
    expected = world.results[4][1].reshape(-1)
    whole = case("in place").scores([1, 2, 3])
    assert np.abs(expected - whole).max() <= 1e-5 * np.abs(whole).max()


def test_only_what_is_wanted_leaves_the_last_stage(world):
    world.step(1, good(), scores=False)
    world.step(2, good(sequence=6, slot=1, draw=False), scores=False)
    while world.messages:
        world.deliver(0)
    drawn, quiet = world.results[1][0], world.results[2][0]
    assert [token.position for token in drawn.drawn] == [2]
    assert (drawn.tensors, quiet.tensors, quiet.drawn) == ((), (), ())


def run_all(world: World, number: int, *rows: StepRow) -> np.ndarray:
    """Run a step alone; returns its scores, [rows, vocabulary]."""
    world.step(number, rows)
    while world.messages:
        world.deliver(0)
    assert not world.failed
    return world.results[number][1].reshape(len(rows), -1)


@pytest.mark.parametrize("name", CASES)
def test_the_last_step_can_be_taken_back(case, name):
    world, texts = World(case(name)), {7: [1, 2, 3], 8: [4, 5, 6]}
    alone = case(name).plan.decoder.rows == "one"
    number = 0

    def step(start: int, added: dict[int, int]) -> None:
        nonlocal number
        groups = [[s] for s in added] if alone else [list(added)]
        for group in groups:
            number += 1
            for sequence in group:
                texts[sequence] = [*texts[sequence][:start], added[sequence]]
            rows = [row(s, s - 7, start, texts[s][start:]) for s in group]
            for sequence, scores in zip(group, run_all(world, number, *rows), strict=True):
                whole = case(name).scores(texts[sequence])
                assert np.abs(scores - whole).max() <= 1e-5 * np.abs(whole).max()

    for slot, sequence in enumerate(texts):
        number += 1
        run_all(world, number, row(sequence, slot, 0, texts[sequence]))
    step(3, {7: 10, 8: 20})
    step(3, {7: 11, 8: 21})
    step(4, {7: 12, 8: 22})
    step(4, {8: 23})
    step(5, {7: 13, 8: 24})
    step(5, {7: 14, 8: 25})


def test_steps_that_can_run_go_first_come_first_served_past_those_that_wait(case):
    world = World(case("in place"))
    ran = []
    node = world.nodes[0]
    original = node.runner.run
    node.runner.run = lambda rows, *more: ran.append(rows[0].sequence * 10 + rows[0].start) or original(rows, *more)
    first = [row(1, 0, 2, [5]), row(1, 0, 3, [6])]  # of sequence 1, whose beginning has not arrived
    others = [row(2, 1, 0, [1]), row(3, 2, 0, [1]), row(2, 1, 1, [2])]
    for number, one in enumerate([*first, *others], 2):
        fragment = Fragment(number, 1, 1, 1000, 0, 0, CALLER, (1, 2), (), (), (), (one,))
        assert node.state.handle(Arrived(fragment, {}, 0)) == []
    while node.state.ready:
        world.handle(0, Turn(0))
    assert ran == [20, 30, 21]
    begin = Fragment(1, 1, 1, 1000, 0, 0, CALLER, (1, 2), (), (), (), (row(1, 0, 0, [1, 2]),))
    later = Fragment(9, 1, 1, 1000, 0, 0, CALLER, (1, 2), (), (), (), (row(4, 3, 0, [1]),))
    for fragment in (begin, later):
        node.state.handle(Arrived(fragment, {}, 0))
    while node.state.ready:
        world.handle(0, Turn(0))
    assert ran == [20, 30, 21, 10, 12, 13, 40], "a parked step comes before all that arrived later"
