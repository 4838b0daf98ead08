"""The coordinator sends steps as fragments without tensors, and passes tokens and scores to their readers."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np
import pytest

from onnxsplit.plan_decoder import Control, Decoder
from onnxsplit.plan_files import load_plan
from runtime.balance.router import Router
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import GivenUp, Reject, Unsendable
from runtime.coordinator.inbox import Inbox
from runtime.coordinator.numbers import Numbers
from runtime.coordinator.request_io import RequestIO
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import Busy, PipelineClosed
from runtime.memory.payloads import Payloads
from runtime.wire import codec
from runtime.wire.messages.data import Fragment
from runtime.wire.messages.sequences import Drawn, Opening, Sampling, StepRow

DECODER = Decoder(
    states=(),
    controls=(Control(input="x", role="tokens"),),
    scores="y",
    vocabulary=3,
    rows="right",
    chunk="one-row",
    rollback=True,
    max_length=64,
)
SAMPLING = Sampling()
ROUTE = (5, 6)


class FakeMachine:
    """A stand-in that records events, and answers each with the effects that the test has prepared."""

    error = None

    def __init__(self) -> None:
        self.numbers = Numbers()
        self.events: list[object] = []
        self.effects: deque[list[object]] = deque()

    def handle(self, event):
        self.events.append(event)
        return (self.effects.popleft() if self.effects else []), []


class FakeOutlet:
    """A link that keeps what is sent."""

    connected = True

    def __init__(self) -> None:
        self.sent: list[Fragment] = []
        self.problem: Exception | None = None

    def send(self, header, frames=(), *, track=False):
        if self.problem is not None:
            raise self.problem
        assert not frames
        self.sent.append(codec.decode_data(header))
        return ()


@pytest.fixture
def plan(chain_plan):
    return msgspec.structs.replace(load_plan(chain_plan), decoder=DECODER)


@pytest.fixture
def parts(plan):
    """The sequences of a coordinator whose machine and links are stand-ins."""
    machine, payloads = FakeMachine(), Payloads(0)
    payloads.meet(0, {})
    links = DataLinks(plan, machine, payloads, Router("completion", payloads.board))
    for number in ROUTE:
        links.outlets[number] = FakeOutlet()
    requests = RequestIO(plan, machine, payloads, links, Inbox(), replay=True, trace=False)
    yield requests, machine, links.outlets
    if not requests.ended:
        requests.fail(PipelineClosed("the pipeline was closed"))


def begin(requests, machine, *effects, scores: bool = False) -> tuple[int, TokenStream]:
    stream = TokenStream()
    machine.effects.append(list(effects))
    number = requests.generate(stream, (1, 2), 5, SAMPLING, scores=scores, wait=True, deadline_ns=None)
    requests.answers.deliver()
    return number, stream


def step(number: int, *rows: StepRow, scores: bool = False) -> EnterStep:
    return EnterStep(number, 3, 250, ROUTE, rows, scores)


def row(sequence: int, start: int = 0, slot: int = 0) -> StepRow:
    opening = Opening(2, SAMPLING) if start == 0 else None
    return StepRow(sequence, 1, slot, start, (1, 2) if start == 0 else (7,), draw=True, opening=opening)


def came_back(number: int, rows, drawn, tensors=()) -> Fragment:
    return Fragment(number, 1, 3, 250, 0, ROUTE[1], 1, ROUTE, (), tensors, (), tuple(rows), tuple(drawn))


def test_a_step_goes_to_the_stages_that_begin_it_with_rows_and_without_tensors(parts):
    requests, machine, outlets = parts
    begin(requests, machine, step(1, row(0)))
    assert isinstance(machine.events[0], SequenceSubmitted)
    (fragment,) = outlets[5].sent
    assert (fragment.request, fragment.attempt, fragment.view, fragment.cost) == (1, 1, 3, 250)
    assert (fragment.rows, fragment.tensors, fragment.wanted, fragment.route) == ((row(0),), (), (), ROUTE)
    assert outlets[6].sent == []


def test_tokens_reach_their_readers_and_the_next_step_leaves_first(parts):
    requests, machine, outlets = parts
    number, stream = begin(requests, machine, step(1, row(0)))
    drawn = Drawn(number, 1, 2, 7)
    machine.effects.append([Emit(number, drawn), step(2, row(number, 2))])
    woken_after: list[int] = []
    stream.when_more(0, lambda: woken_after.append(len(outlets[5].sent)))
    with requests.lock:
        requests.take_step(came_back(1, [row(0)], [drawn]), {})
    assert woken_after == [], "readers are woken without the lock"
    requests.answers.deliver()
    assert woken_after == [2]
    returned = machine.events[-1]
    assert isinstance(returned, StepReturned)
    assert (returned.step, returned.drawn) == (1, (drawn,))
    assert (stream.drawn, stream.times_ns, stream.ended) == ([drawn], [returned.now_ns], False)
    machine.effects.append([Emit(number, Drawn(number, 1, 3, 1)), Finish(number, "length")])
    with requests.lock:
        requests.take_step(came_back(2, [row(0, 2)], [Drawn(number, 1, 3, 1)]), {})
    assert ([one.token for one in stream.drawn], stream.reason) == ([7, 1], "length")
    assert requests.sequences.streams == {}


def test_scores_are_asked_for_where_a_caller_wants_them_and_copied_row_by_row(parts):
    requests, machine, outlets = parts
    first, one = begin(requests, machine, scores=True)
    second, other = begin(requests, machine, step(2, row(first), row(second := 1), scores=True))
    assert outlets[5].sent[0].wanted == ("y",)
    raw = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    fragment = came_back(2, [row(first), row(second)], [Drawn(first, 1, 2, 0), Drawn(second, 1, 2, 1)])
    scores = requests.sequences.scores_of(fragment, {"y": raw})
    raw[:] = 0
    machine.effects.append([Emit(drawn.sequence, drawn) for drawn in fragment.drawn])
    with requests.lock:
        requests.take_step(fragment, scores)
    assert [stream.scores[0].tolist() for stream in (one, other)] == [[3, 4, 5], [9, 10, 11]]


def test_a_step_that_cannot_be_sent_is_told_to_the_machine(parts):
    requests, machine, outlets = parts
    outlets[5].problem = OSError("no route")
    begin(requests, machine, step(1, row(0)))
    event = machine.events[-1]
    assert isinstance(event, Unsendable)
    assert event.request == 1
    assert "no route" in str(event.error)


def test_a_refused_sequence_ends_with_the_reason(parts):
    requests, machine, _ = parts
    _, stream = begin(requests, machine, Reject(0, Busy("no room")))
    assert isinstance(stream.error, Busy)
    assert requests.sequences.streams == {}


def test_giving_up_later_passes_through_the_inbox(parts):
    requests, machine, _ = parts
    number, _ = begin(requests, machine)
    requests.give_up_later(number)
    assert list(requests.inbox.events) == [GivenUp(number)]


def test_the_end_of_the_pipeline_ends_all_sequences(parts):
    requests, machine, _ = parts
    _, stream = begin(requests, machine)
    woken: list[bool] = []
    stream.when_more(0, lambda: woken.append(True))
    requests.fail(PipelineClosed("the pipeline was closed"))
    assert isinstance(stream.error, PipelineClosed)
    assert woken == [True]
    _, late = begin(requests, machine)
    assert isinstance(late.error, PipelineClosed)
