"""The node's state machine, event by event."""

from __future__ import annotations

import pytest

from onnxsplit.plan import load_plan
from runtime.messages import CALLER, Assign, Failed, Fragment, Peer, Visit
from runtime.node_state import (
    TRANSITIONS,
    Arrived,
    Assigned,
    Cancelled,
    Connect,
    Discard,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    GiveBack,
    IllegalEventError,
    Load,
    Loaded,
    LoadFailed,
    NodeState,
    Report,
    Run,
    SayReady,
    SayRefused,
    Share,
    Shared,
    State,
    StopAsked,
    Turn,
    Wired,
)

ROUTE = (0, 0, 0, 0)
PEERS = (Peer(CALLER, 0, "caller", "", None), *(Peer(stage, 0, f"node {stage}", "", None) for stage in range(4)))


def assign(stage: int) -> Assign:
    return Assign("id", "folder", stage, 0, "cpu", 0, False, False)


def ready(plan, stage: int) -> NodeState:
    node = NodeState()
    node.handle(Assigned(assign(stage)))
    node.handle(Loaded(plan))
    node.handle(Wired(PEERS))
    return node


def fragment(request: int, source: int, wanted=("y",), route=ROUTE, history=()) -> Fragment:
    return Fragment(request, source + 1, source, route, wanted, (), history)


def arrive(node: NodeState, request: int, source: int, tensors=None, **more):
    return node.handle(Arrived(fragment(request, source, **more), tensors or {}, now_ns=100))


def turn(node: NodeState):
    return node.handle(Turn())


def executed(request: int, started_ns: int = 150, ended_ns: int = 170) -> Executed:
    return Executed(request, started_ns, ended_ns, ended_ns + 5, 64, 32)


@pytest.fixture
def plan(diamond_plan):
    return load_plan(diamond_plan)


def test_from_hello_to_ready(plan):
    node = NodeState()
    assert node.handle(Assigned(assign(0))) == [Load(assign(0))]
    assert node.handle(Loaded(plan)) == []
    connect, said = node.handle(Wired(PEERS))
    assert connect == Connect(1, {0: PEERS[0], 2: PEERS[2], 3: PEERS[3]}, frozenset({0, 2, 3}))
    assert said == SayReady()
    assert node.state is State.READY
    assert node.handle(Shared((2, 3))) == [Share((2, 3))]


def test_a_node_knows_who_sends_to_it_as_well(plan):
    node = NodeState()
    node.handle(Assigned(assign(3)))
    node.handle(Loaded(plan))
    connect = node.handle(Wired(PEERS))[0]
    assert set(connect.neighbours) == {0, 2, 3}
    assert connect.targets == {0}


def test_a_stage_that_does_not_load_is_refused_and_the_node_ends():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    assert node.handle(LoadFailed("no such file")) == [SayRefused("no such file"), Exit("no such file")]
    assert node.state is State.STOPPED


def test_a_join_runs_when_all_its_sources_are_here(plan):
    node = ready(plan, 3)
    arrive(node, 7, 1, {"left": 1})
    assert not node.ready
    assert turn(node) == []
    arrive(node, 7, 2, {"right": 2})
    assert node.ready
    (run,) = turn(node)
    assert run == Run(7, {"left": 1, "right": 2}, (fragment(7, 1), fragment(7, 2)), {0: ("y",)})


def test_fragments_of_two_requests_do_not_mix(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "1"})
    arrive(node, 2, 2, {"right": "2"})
    arrive(node, 2, 1, {"left": "2"})
    (run,) = turn(node)
    assert (run.request, run.inputs) == (2, {"right": "2", "left": "2"})


def test_a_duplicate_and_a_stranger_are_given_back_at_once(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "first"})
    assert arrive(node, 1, 1, {"left": "second"}) == [GiveBack((fragment(1, 1),))]
    assert arrive(node, 1, 0, {"a": 0}) == [GiveBack((fragment(1, 0),))]
    arrive(node, 1, 2, {"right": 2})
    assert turn(node)[0].inputs == {"left": "first", "right": 2}


def test_one_request_runs_at_a_time_in_order(plan):
    node = ready(plan, 0)
    for request in (1, 2, 3):
        assert arrive(node, request, CALLER, {"x": request}) == []
    assert turn(node)[0].request == 1
    assert turn(node) == []
    node.handle(executed(1))
    assert turn(node)[0].request == 2
    node.handle(ExecutionFailed(2, "why"))
    assert turn(node)[0].request == 3


def test_outputs_go_to_every_stage_that_reads_them(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    assert turn(node)[0].targets == {2: ("a",), 3: ("a",)}


def test_outputs_go_on_with_what_the_request_has_passed_and_then_inputs_are_given_back(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    turn(node)
    forward, back = node.handle(executed(1))
    assert back == GiveBack((fragment(1, CALLER),))
    assert forward == Forward(1, ROUTE, ("y",), (Visit(0, 0, 100, 150, 170, 175, 64, 32),))


def test_a_join_joins_what_its_branches_have_passed_once_each(plan):
    first, left, right = (Visit(stage, 0, 1, 2, 3, 4, 5, 6) for stage in range(3))
    node = ready(plan, 3)
    arrive(node, 1, 1, history=(first, left))
    arrive(node, 1, 2, history=(first, right))
    turn(node)
    forward = node.handle(executed(1))[0]
    assert [visit.stage for visit in forward.history] == [0, 1, 2, 3]


def test_a_stage_that_is_not_needed_gets_nothing(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, wanted=("right", "a"), route=(0, -1, 0, -1))
    assert turn(node)[0].targets == {3: ("a",), 0: ("a",)}


def test_a_failure_is_reported_with_its_reason(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    turn(node)
    assert node.handle(ExecutionFailed(1, "bad shape")) == [
        GiveBack((fragment(1, CALLER),)),
        Report(Failed(1, 0, 0, "bad shape")),
    ]


def test_a_cancelled_request_is_forgotten_and_what_comes_late_is_given_back(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1)
    assert node.handle(Cancelled(1)) == [GiveBack((fragment(1, 1),))]
    assert arrive(node, 1, 2) == [GiveBack((fragment(1, 2),))]
    assert turn(node) == []


def test_a_cancelled_request_that_waits_does_not_run_and_one_that_runs_goes_nowhere(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    arrive(node, 2, CALLER)
    turn(node)
    node.handle(Cancelled(2))
    assert node.handle(Cancelled(1)) == []
    assert node.handle(executed(1)) == [GiveBack((fragment(1, CALLER),)), Discard()]
    assert turn(node) == []


@pytest.mark.parametrize("state", list(State))
def test_every_state_can_be_stopped(state):
    assert TRANSITIONS[state, StopAsked] is State.STOPPED


def test_an_illegal_event_tells_what_led_to_it():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    with pytest.raises(IllegalEventError, match="Wired in state LOADING; before it: Assigned in WAITING"):
        node.handle(Wired(()))
