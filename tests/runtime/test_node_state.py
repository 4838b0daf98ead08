"""The node's state machine, event by event."""

from __future__ import annotations

import pytest

from onnxsplit.plan import load_plan
from runtime.messages import CALLER, Assign, Failed, Finished, Fragment
from runtime.node_state import (
    TRANSITIONS,
    Arrived,
    Assigned,
    Cancelled,
    Connect,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    IllegalEventError,
    Load,
    Loaded,
    LoadFailed,
    NodeState,
    Report,
    Run,
    SayReady,
    SayRefused,
    State,
    StopAsked,
    Wired,
)

ROUTE = (0, 0, 0, 0)


def assign(stage: int) -> Assign:
    return Assign("id", "folder", stage, 0, "cpu", 0, "results")


def ready(plan, stage: int) -> NodeState:
    node = NodeState()
    node.handle(Assigned(assign(stage)))
    node.handle(Loaded(plan))
    node.handle(Wired((("a",), ("b",), ("c",), ("d",))))
    return node


def fragment(request: int, source: int, wanted=("y",), route=ROUTE) -> Fragment:
    return Fragment(request, source, route, wanted, ())


def arrive(node: NodeState, request: int, source: int, tensors=None, **more):
    return node.handle(Arrived(fragment(request, source, **more), tensors or {}, now_ns=100))


@pytest.fixture
def plan(diamond_plan):
    return load_plan(diamond_plan)


def test_from_hello_to_ready(plan):
    node = NodeState()
    assert node.handle(Assigned(assign(0))) == [Load(assign(0))]
    assert node.handle(Loaded(plan)) == []
    connect, said = node.handle(Wired((("a",), ("b",), ("c",), ("d",))))
    assert connect == Connect({1: ("b",), 2: ("c",)})
    assert said == SayReady()
    assert node.state is State.READY


def test_a_stage_that_does_not_load_is_refused_and_the_node_ends():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    assert node.handle(LoadFailed("no such file")) == [SayRefused("no such file"), Exit("no such file")]
    assert node.state is State.STOPPED


def test_a_join_runs_when_all_its_sources_are_here(plan):
    node = ready(plan, 3)
    assert arrive(node, 7, 1, {"left": 1}) == []
    assert arrive(node, 7, 2, {"right": 2}) == [Run(7, {"left": 1, "right": 2})]


def test_fragments_of_two_requests_do_not_mix(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "1"})
    arrive(node, 2, 2, {"right": "2"})
    assert arrive(node, 2, 1, {"left": "2"}) == [Run(2, {"right": "2", "left": "2"})]


def test_a_duplicate_and_a_stranger_are_dropped(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "first"})
    assert arrive(node, 1, 1, {"left": "second"}) == []
    assert arrive(node, 1, 0, {"a": 0}) == []
    assert arrive(node, 1, 2, {"right": 2}) == [Run(1, {"left": "first", "right": 2})]


def test_one_request_runs_at_a_time_in_order(plan):
    node = ready(plan, 0)
    assert arrive(node, 1, CALLER, {"x": 1}) == [Run(1, {"x": 1})]
    assert arrive(node, 2, CALLER, {"x": 2}) == []
    assert arrive(node, 3, CALLER, {"x": 3}) == []
    assert node.handle(Executed(1, {"a": 0}, 150, 170))[-1] == Run(2, {"x": 2})
    assert node.handle(ExecutionFailed(2, "why"))[-1] == Run(3, {"x": 3})


def test_outputs_go_to_every_stage_that_reads_them_and_the_time_is_reported(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, {"x": 1})
    *forwards, report = node.handle(Executed(1, {"a": 5}, started_ns=150, ended_ns=170))
    assert [(f.stage, f.tensors) for f in forwards] == [(1, {"a": 5}), (2, {"a": 5})]
    assert report == Report(Finished(1, 0, 0, 50, 20))


def test_a_stage_that_is_not_needed_gets_nothing(plan):
    node = ready(plan, 0)
    route = (0, -1, 0, -1)
    arrive(node, 1, CALLER, {"x": 1}, wanted=("right", "a"), route=route)
    forwards = [e for e in node.handle(Executed(1, {"a": 5}, 0, 0)) if isinstance(e, Forward)]
    assert [(f.stage, f.tensors) for f in forwards] == [(2, {"a": 5}), (CALLER, {"a": 5})]


def test_a_failure_is_reported_with_its_reason(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, {"x": 1})
    assert node.handle(ExecutionFailed(1, "bad shape")) == [Report(Failed(1, 0, 0, "bad shape"))]


def test_a_cancelled_request_frees_its_place(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": 1})
    node.handle(Cancelled(1))
    assert arrive(node, 1, 2, {"right": 2}) == []
    node = ready(plan, 0)
    arrive(node, 1, CALLER, {})
    arrive(node, 2, CALLER, {})
    node.handle(Cancelled(2))
    assert not any(isinstance(e, Run) for e in node.handle(Executed(1, {"a": 0}, 0, 0)))


@pytest.mark.parametrize("state", list(State))
def test_every_state_can_be_stopped(state):
    assert TRANSITIONS[state, StopAsked] is State.STOPPED


def test_an_illegal_event_tells_what_led_to_it():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    with pytest.raises(IllegalEventError, match="Wired in state LOADING; before it: Assigned in WAITING"):
        node.handle(Wired(()))
