"""A request in parts gives all parts in order or the first error, and gives its places back."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.coordinator.answers import Answer
from runtime.errors import Cancelled, NotSeparable, PipelineClosed, StageFailed
from runtime.requests.admission import Admission
from runtime.requests.request import OutputSelection, Request

ASKED = OutputSelection(
    names=("y", "c"), computed=("y",), passed=("c",), optional=frozenset(), defaults=(), axes={"x": 0, "y": 0}
)


class FakeRequestIO:
    """A stand-in that keeps admitted parts and answers when the test says so."""

    delivering = False
    fails_from = None
    refuses = False
    problem: BaseException = MemoryError("no room")

    def __init__(self) -> None:
        self.inbox = SimpleNamespace(pid=os.getpid(), check_process=lambda: None)
        self.entered = []

    def submit(self, inputs, wanted, cost, deadline_ns, done) -> int:
        assert (wanted, cost) == (("y",), 1000)
        if self.fails_from is not None and len(self.entered) >= self.fails_from:
            raise self.problem
        if self.refuses:
            self.entered.append((inputs["x"], done))
            done(Answer({}, PipelineClosed("closed")))
            return len(self.entered) - 1
        self.entered.append((inputs["x"], done))
        return len(self.entered) - 1

    def give_up(self, number: int) -> None:
        self.answer(number, Cancelled("given up"))

    def answer(self, number: int, error=None) -> None:
        array, done = self.entered[number]
        done(Answer({"y": array * 10} if error is None else {}, error))


def started(parts: int, room: int, **fake_is):
    """Start a request of parts with one row each, at an admission for ``room`` parts."""
    request_io, admission = FakeRequestIO(), Admission(room, 1 << 20)
    for name, value in fake_is.items():
        setattr(request_io, name, value)
    arrays = [{"x": np.array([number])} for number in range(parts)]
    request = Request(request_io, admission, arrays, ASKED, 8, 1000, None, {"c": np.array(7)})
    admission.enter(request.place, 8)
    request.enter()
    return request, request_io, admission


def free(admission: Admission) -> int:
    return admission.requests - admission.inside


def test_parts_enter_as_far_as_there_is_room_and_as_others_leave():
    _, request_io, _ = started(5, room=2)
    assert len(request_io.entered) == 2
    request_io.answer(1)
    request_io.answer(0)
    assert len(request_io.entered) == 4


def test_the_answer_is_in_order_whatever_the_order_of_the_parts():
    request, request_io, admission = started(3, room=3)
    for number in (2, 0, 1):
        assert not request.future.done()
        request_io.answer(number)
    found = request.future.result(0)
    assert found["y"].tolist() == [0, 10, 20]
    assert found["c"] == 7
    assert list(found) == ["y", "c"]
    assert free(admission) == 3


def test_the_first_error_is_the_answer_and_no_more_parts_enter():
    request, request_io, admission = started(5, room=2)
    request_io.answer(0, StageFailed("bad"))
    assert isinstance(request.future.exception(0), StageFailed)
    request_io.answer(1, PipelineClosed("later"))
    assert isinstance(request.future.exception(0), StageFailed)
    assert len(request_io.entered) == 2
    assert free(admission) == 2


@pytest.mark.parametrize("room", [1, 2, 7])
def test_all_places_come_back(room):
    request, request_io, admission = started(6, room)
    for number in range(6):
        request_io.answer(number)
    assert request.future.result(0)["y"].tolist() == [0, 10, 20, 30, 40, 50]
    assert free(admission) == room


def test_a_request_that_is_given_up_ends_its_parts_and_leaves_its_places():
    request, request_io, admission = started(5, room=2)
    assert request.future.cancel()
    assert request.future.cancelled()
    assert len(request_io.entered) == 2, "no other part enters"
    assert free(admission) == 2


def test_parts_that_are_refused_at_once_do_not_keep_the_caller():
    request, request_io, admission = started(64, room=8, refuses=True)
    assert isinstance(request.future.exception(0), PipelineClosed)
    assert len(request_io.entered) == 1
    assert free(admission) == 8


@pytest.mark.parametrize("fails_from", [0, 1, 3])
def test_a_part_that_cannot_be_sent_ends_the_request_and_leaves_its_place(fails_from):
    request, request_io, admission = started(5, room=2, fails_from=fails_from)
    for number in range(fails_from):
        if number < len(request_io.entered):
            request_io.answer(number)
    assert "no room" in str(request.future.exception(0))
    for number in range(fails_from, len(request_io.entered)):
        request_io.answer(number)
    assert free(admission) == 2


def test_an_interrupt_while_a_part_is_sent_leaves_its_place():
    request_io, admission = FakeRequestIO(), Admission(2, 1 << 20)
    request_io.fails_from, request_io.problem = 0, KeyboardInterrupt()
    request = Request(request_io, admission, [{"x": np.array([0])}], ASKED, 8, 1000, None, {})
    admission.enter(request.place, 8)
    with pytest.raises(KeyboardInterrupt):
        request.enter()
    request.abandon()
    assert free(admission) == 2


def test_parts_that_cannot_be_joined_end_the_request_with_words():
    request, request_io, admission = started(2, room=2)
    for number in range(2):
        _, done = request_io.entered[number]
        done(Answer({"y": np.zeros((1, 3 + number))}))
    with pytest.raises(NotSeparable, match=r"'y' came back as \[1, 3\], \[1, 4\].*micro_batch=0"):
        request.future.result(0)
    assert free(admission) == 2


def test_an_answer_that_comes_twice_counts_once():
    request, request_io, admission = started(2, room=1)
    request_io.answer(0)
    request_io.answer(0)
    request_io.answer(1)
    request_io.answer(1, StageFailed("late"))
    assert request.future.result(0)["y"].tolist() == [0, 10]
    assert admission.inside == 0


def test_an_answered_request_cannot_be_given_up():
    request, request_io, _ = started(1, room=2)
    request_io.answer(0)
    assert not request.future.cancel()
    assert request.future.result(0)["y"] == [0]
