"""The node's state machine, event by event."""

from __future__ import annotations

import pytest

from onnxsplit.plan import CALLER
from onnxsplit.plan_files import load_plan
from runtime.node.events import (
    Arrived,
    Assigned,
    AttemptCancelled,
    Connect,
    Discard,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    GiveBack,
    LeaveAsked,
    LendMemory,
    Load,
    Loaded,
    LoadFailed,
    Passed,
    ReportFailure,
    Run,
    SayLeaving,
    SayReady,
    SayRefused,
    Shared,
    StopAsked,
    Turn,
    Wired,
)
from runtime.node.state import TRANSITIONS, NodePhase, NodeState
from runtime.transition_table import IllegalEventError
from runtime.wire.messages.control import Assign, Peer, Wire
from runtime.wire.messages.data import ANY, Failed, Fragment, Visit

ROUTE = (ANY, ANY, ANY, 4)
VIEW = 1


def wire(me: int, view: int = VIEW, without: int = -1) -> Wire:
    """Connect the caller and a node of every stage, except one that is lost."""
    stages = {0: CALLER} | {stage + 1: stage for stage in range(4)}
    peers = (Peer(n, stage, 0, stage != CALLER, f"at {n}", "", None, "") for n, stage in stages.items())
    return Wire(view, me, tuple(peer for peer in peers if peer.number != without))


def assign(stage: int) -> Assign:
    return Assign("id", "folder", "", stage, 0, "cpu", 0, False, False, 1, 1, "completion")


def ready(plan, stage: int) -> NodeState:
    node = NodeState()
    node.handle(Assigned(assign(stage)))
    node.handle(Loaded(plan))
    node.handle(Wired(wire(stage + 1)))
    return node


def fragment(request: int, source: int, wanted=("y",), route=ROUTE, history=(), attempt=1, view=VIEW, budget=0):
    return Fragment(request, attempt, view, 1000, budget, source + 1, source, route, wanted, (), history)


def arrive(node: NodeState, request: int, source: int, tensors=None, **more):
    return node.handle(Arrived(fragment(request, source, **more), tensors or {}, now_ns=100))


def turn(node: NodeState, now_ns: int = 120):
    return node.handle(Turn(now_ns))


def executed(started_ns: int = 150, ended_ns: int = 170) -> Executed:
    return Executed(started_ns, ended_ns, ended_ns + 5, 64, 32)


@pytest.fixture
def plan(diamond_plan):
    return load_plan(diamond_plan)


def test_from_hello_to_ready(plan):
    node = NodeState()
    assert node.handle(Assigned(assign(0))) == [Load(assign(0))]
    assert node.handle(Loaded(plan)) == []
    connect, said = node.handle(Wired(wire(1)))
    assert connect == Connect(1, wire(1).peers, frozenset({0, 2, 3}), frozenset({0, 2, 3}))
    assert said == SayReady()
    assert node.state is NodePhase.READY
    assert node.handle(Shared((2, 3))) == [LendMemory((2, 3))]


def test_a_node_knows_who_sends_to_it_as_well(plan):
    node = NodeState()
    node.handle(Assigned(assign(3)))
    node.handle(Loaded(plan))
    connect = node.handle(Wired(wire(4)))[0]
    assert connect.neighbours == {0, 2, 3}
    assert connect.targets == {0}


def test_a_stage_that_does_not_load_is_refused_and_the_node_ends():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    assert node.handle(LoadFailed("no such file")) == [SayRefused("no such file"), Exit("no such file")]
    assert node.state is NodePhase.STOPPED


def test_a_join_runs_when_all_its_sources_are_here(plan):
    node = ready(plan, 3)
    arrive(node, 7, 1, {"left": 1})
    assert not node.ready
    assert turn(node) == []
    arrive(node, 7, 2, {"right": 2})
    assert node.ready
    (run,) = turn(node)
    assert run == Run((7, 1), 1000, {"left": 1, "right": 2}, (fragment(7, 1), fragment(7, 2)), ((CALLER, ("y",)),))


def test_fragments_of_two_requests_do_not_mix(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "1"})
    arrive(node, 2, 2, {"right": "2"})
    arrive(node, 2, 1, {"left": "2"})
    (run,) = turn(node)
    assert (run.key, run.inputs) == ((2, 1), {"right": "2", "left": "2"})


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
    assert turn(node)[0].key[0] == 1
    assert turn(node) == []
    node.handle(executed())
    assert turn(node)[0].key[0] == 2
    node.handle(ExecutionFailed("why"))
    assert turn(node)[0].key[0] == 3


def test_outputs_go_to_every_stage_that_reads_them(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    assert turn(node)[0].leaving == ((1, ("a",)), (2, ("a",)))
    assert node.handle(executed())[0].leaving == ((1, ("a",)), (2, ("a",)))


def test_outputs_go_on_with_what_the_request_has_passed_and_then_inputs_are_given_back(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    turn(node)
    forward, back = node.handle(executed())
    assert back == GiveBack((fragment(1, CALLER),))
    visit = Visit(0, 0, 100, 150, 170, 175, 64, 32)
    assert forward == Forward(fragment(1, CALLER), 0, ((1, ("a",)), (2, ("a",))), (visit,))


def test_a_join_combines_the_stages_of_its_branches_once_each(plan):
    first, left, right = (Visit(stage, 0, 1, 2, 3, 4, 5, 6) for stage in range(3))
    node = ready(plan, 3)
    arrive(node, 1, 1, history=(first, left))
    arrive(node, 1, 2, history=(first, right))
    turn(node)
    forward = node.handle(executed())[0]
    assert [visit.stage for visit in forward.history] == [0, 1, 2, 3]


def test_a_stage_that_is_not_needed_gets_nothing(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, wanted=("right", "a"), route=(0, -1, 0, -1))
    assert turn(node)[0].leaving == ((2, ("a",)), (CALLER, ("a",)))


def test_a_failure_is_reported_with_its_reason(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    turn(node)
    assert node.handle(ExecutionFailed("bad shape")) == [
        GiveBack((fragment(1, CALLER),)),
        ReportFailure(Failed(1, 1, 0, 0, "bad shape")),
    ]


def test_a_cancelled_request_is_forgotten_and_what_comes_late_is_given_back(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1)
    assert node.handle(AttemptCancelled(1, 1)) == [GiveBack((fragment(1, 1),))]
    assert arrive(node, 1, 2) == [GiveBack((fragment(1, 2),))]
    assert turn(node) == []


def test_a_cancelled_request_that_waits_does_not_run_and_one_that_runs_goes_nowhere(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER)
    arrive(node, 2, CALLER)
    turn(node)
    node.handle(AttemptCancelled(2, 1))
    assert node.handle(AttemptCancelled(1, 1)) == []
    assert node.handle(executed()) == [GiveBack((fragment(1, CALLER),)), Discard()]
    assert turn(node) == []


@pytest.mark.parametrize("state", list(NodePhase))
def test_every_state_can_be_stopped(state):
    assert TRANSITIONS[state, StopAsked] is NodePhase.STOPPED


def test_an_illegal_event_tells_what_led_to_it():
    node = NodeState()
    node.handle(Assigned(assign(0)))
    with pytest.raises(IllegalEventError, match="Wired in state LOADING; before it: Assigned in WAITING"):
        node.handle(Wired(wire(1)))


def test_attempts_do_not_mix_and_cancelling_one_leaves_the_next(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1, {"left": "old"})
    arrive(node, 1, 2, {"right": "new"}, attempt=2)
    assert node.handle(AttemptCancelled(1, 1)) == [GiveBack((fragment(1, 1),))]
    arrive(node, 1, 2, {"right": "late"})
    arrive(node, 1, 1, {"left": "new"}, attempt=2)
    assert turn(node)[0].inputs == {"left": "new", "right": "new"}
    assert turn(node) == []


def test_an_attempt_from_after_a_loss_waits_until_the_loss_is_known_here(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, view=VIEW + 1)
    assert turn(node) == []
    node.handle(Wired(wire(1, view=VIEW + 1, without=2)))
    assert turn(node)[0].key == (1, 1)


def test_a_change_of_nodes_opens_links_to_those_there_are(plan):
    connect, said = ready(plan, 0).handle(Wired(wire(1, view=2, without=3)))
    assert (connect.targets, said) == (frozenset({0, 2}), SayReady())


def test_requests_whose_time_ran_out_do_not_run(plan):
    node = ready(plan, 0)
    arrive(node, 1, CALLER, budget=10)
    arrive(node, 2, CALLER, budget=1000)
    back, run = turn(node, now_ns=200)
    assert (back, run.key) == (GiveBack((fragment(1, CALLER, budget=10),)), (2, 1))
    assert node.handle(executed())[0].budget_ns == 100 + 1000 - 175


def test_requests_that_nobody_waits_for_any_more_are_forgotten(plan):
    node = ready(plan, 3)
    arrive(node, 1, 1)
    arrive(node, 2, 1)
    assert node.handle(Passed(2)) == [GiveBack((fragment(1, 1),))]
    assert arrive(node, 1, 2) == [GiveBack((fragment(1, 2),))]


def test_a_node_that_is_to_leave_asks_to_be_relieved_and_goes_on(plan):
    node = ready(plan, 0)
    assert node.handle(LeaveAsked("SIGTERM")) == [SayLeaving()]
    arrive(node, 1, CALLER)
    assert turn(node)[0].key == (1, 1)
    assert NodeState().handle(LeaveAsked("SIGTERM")) == [Exit("SIGTERM")]
