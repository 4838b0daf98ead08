"""Requests of a kind that was checked before skip the checks, and end once like all others."""

from __future__ import annotations

import inspect
import os
import threading
from concurrent.futures import as_completed, wait
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.coordinator.answers import Answer
from runtime.errors import PipelineClosed, PipelineError
from runtime.requests.admission import Admission
from runtime.requests.ordinary import OrdinaryRequests, WholeRequest
from runtime.requests.request import Answering, OutputSelection

SELECTION = OutputSelection(("y", "z"), ("y", "z"), (), frozenset(), (), None)


def arrays(**changed) -> dict:
    return {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64)} | changed


@pytest.fixture
def kinds():
    kinds = OrdinaryRequests()
    assert kinds.learn(arrays(), SELECTION, asked=False, size=56, cost=1000) is not None
    return kinds


def test_a_request_of_the_same_kind_is_found(kinds):
    kind = kinds.find(arrays(a=np.ones((2, 3), np.float32)), None)
    assert (kind.size, kind.cost, kind.selection) == (56, 1000, SELECTION)
    assert kind.shapes == {"a": ("float32", (2, 3)), "b": ("int64", (4,))}
    assert kinds.find(arrays(a=np.ones((3, 2), np.float32).T), None) is kind, "how it lies in memory does not matter"


@pytest.mark.parametrize(
    "inputs",
    [
        arrays(a=np.zeros((3, 2), np.float32)),
        arrays(a=np.zeros((2, 3), np.float64)),
        arrays(a=np.zeros((2, 3), ">f4")),
        arrays(a=np.zeros((2, 3), np.float32).tolist()),
        arrays(a=np.ma.zeros((2, 3), np.float32)),
        arrays(a=np.zeros((2, 3), np.float32).view(np.matrix)),
        arrays(c=np.zeros(1)),
        {"a": arrays()["a"]},
        {"b": arrays()["b"], "a": arrays()["a"]},
        {1: arrays()["a"], "b": arrays()["b"]},
        list(arrays()),
        None,
    ],
)
def test_any_other_request_is_checked_first(kinds, inputs):
    assert kinds.find(inputs, None) is None


@pytest.mark.parametrize("outputs", [("y", "z"), ["y", "z"], "yz", {"y": 1}, [["y"]], (), 7])
def test_other_outputs_are_checked_first(kinds, outputs):
    assert kinds.find(arrays(), outputs) is None


def test_named_outputs_are_a_kind_of_their_own(kinds):
    kind = kinds.learn(arrays(), SELECTION, asked=True, size=56, cost=1000)
    assert kinds.find(arrays(), ["y", "z"]) is kinds.find(arrays(), ("y", "z")) is kind
    assert kinds.find(arrays(), ["z", "y"]) is None
    assert kinds.find(arrays(), None) is not kind


def test_strings_are_never_ordinary():
    kinds = OrdinaryRequests()
    texts = {"a": np.array(["x"], object)}
    assert kinds.learn(texts, SELECTION, asked=False, size=1, cost=1) is None
    assert kinds.find(texts, None) is None


class FakeRequestIO:
    """Keeps what it was given."""

    delivering = False

    def __init__(self, problem: BaseException | None = None) -> None:
        self.inbox = SimpleNamespace(pid=os.getpid(), check_process=lambda: None)
        self.problem, self.given_up, self.done = problem, [], None

    def submit(self, inputs, wanted, cost, deadline_ns, done, shapes):
        if self.problem is not None:
            raise self.problem
        self.done = done
        return 7

    def give_up(self, number):
        self.given_up.append(number)


def entered(kinds, problem: BaseException | None = None):
    request_io, admission = FakeRequestIO(problem), Admission(1, 100)
    request = WholeRequest(request_io, admission, kinds.find(arrays(), None), arrays(), None)
    assert admission.enter(request.place, request.size)
    request.enter()
    return request, request_io, admission


def test_an_answer_ends_the_request_and_gives_its_place_back(kinds):
    request, request_io, admission = entered(kinds)
    assert not request.done()
    assert admission.inside == 1
    request_io.done(Answer({"z": np.ones(1), "y": np.zeros(1)}))
    assert list(request.result()) == ["y", "z"]
    assert admission.inside == 0


def test_an_error_ends_it_too(kinds):
    request, request_io, admission = entered(kinds)
    request_io.done(Answer({}, PipelineClosed("closed")))
    assert isinstance(request.exception(), PipelineClosed)
    assert admission.inside == 0


def test_a_cancelled_request_is_given_up_and_leaves_its_place_when_that_is_known(kinds):
    request, request_io, admission = entered(kinds)
    assert request.cancel()
    assert request_io.given_up == [7]
    request_io.done(Answer({}, PipelineClosed("given up")))
    assert request.cancelled()
    assert admission.inside == 0


def test_what_cannot_be_sent_ends_with_the_reason(kinds):
    request, _, admission = entered(kinds, MemoryError("no room"))
    assert isinstance(request.exception(), PipelineError)
    assert "no room" in str(request.exception())
    assert admission.inside == 0


def test_an_interrupt_passes_through_and_abandon_frees_the_place(kinds):
    request_io, admission = FakeRequestIO(KeyboardInterrupt()), Admission(1, 100)
    request = WholeRequest(request_io, admission, kinds.find(arrays(), None), arrays(), None)
    assert admission.enter(request.place, request.size)
    with pytest.raises(KeyboardInterrupt):
        request.enter()
    request.abandon()
    assert admission.inside == 0
    assert request_io.given_up == []


def test_the_condition_of_a_future_is_entered_in_c_where_no_interrupt_can_leave_it_locked():
    condition = Answering()._condition
    assert not inspect.isfunction(type(condition).__enter__)
    assert not inspect.isfunction(type(condition).__exit__)


def test_any_number_of_threads_can_wait_for_a_future():
    future, results = Answering(), []
    threads = [threading.Thread(target=lambda: results.append(future.result(60))) for _ in range(5)]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeoutError):
        future.result(0.01)
    assert not wait([future], 0.01).done
    future.set_result({"y": 1})
    for thread in threads:
        thread.join()
    assert results == [{"y": 1}] * 5
    assert wait([future], 60).done == {future}
    assert next(as_completed([future])) is future
