"""The coordinator's state machine, event by event."""

from __future__ import annotations

import pytest

from onnxsplit.plan import load_plan
from runtime.coordinator_state import (
    Announce,
    CloseAsked,
    CoordinatorState,
    Declined,
    Enter,
    Expired,
    Forget,
    GiveStage,
    Joined,
    Lost,
    Met,
    Prepared,
    Reject,
    Reported,
    Resolve,
    Returned,
    SendAway,
    ShareMemory,
    State,
    Submitted,
    TimedOut,
    WireAll,
)
from runtime.errors import DeadlineExceeded, LaunchFailed, NodeFailed, PipelineClosed, StageFailed
from runtime.messages import PROTOCOL, Failed, Hello, Visit


def hello(name: str, stage: int = -1, replica: int = -1) -> Joined:
    return Joined(name.encode(), Hello(PROTOCOL, 1, "host", f"address-{name}", stage, replica, "", None))


@pytest.fixture
def plan(diamond_plan):
    return load_plan(diamond_plan)


def ready(plan, replicas=(1, 1, 1, 1)) -> CoordinatorState:
    machine = CoordinatorState(plan, replicas)
    for number in range(sum(replicas)):
        machine.handle(hello(f"n{number}"))
    for number in range(sum(replicas)):
        machine.handle(Prepared(f"n{number}".encode(), ()))
    assert machine.state is State.READY
    return machine


def test_nodes_are_wired_when_all_are_there_and_announced_when_all_are_ready(plan):
    machine = CoordinatorState(plan, (1, 1, 1, 1))
    assert machine.handle(hello("a", stage=2)) == [GiveStage(b"a", (2, 0))]
    machine.handle(hello("b"))
    machine.handle(hello("c"))
    give, wire = machine.handle(hello("d"))
    assert give == GiveStage(b"d", (3, 0))
    assert wire == WireAll()
    assert [machine.handle(Prepared(n, ())) for n in (b"a", b"b", b"c")] == [[], [], []]
    assert machine.handle(Prepared(b"d", ()))[-1] == Announce(None)


def test_memory_is_lent_only_where_both_sides_have_mapped_each_other(plan):
    machine = CoordinatorState(plan, (1, 1, 1, 1))
    for name in "abcd":
        machine.handle(hello(name))
    machine.handle(Met((1, 4)))
    mapped = {"a": (0, 2, 3), "b": (1, 4), "c": (4,), "d": (2, 3)}
    for name, numbers in mapped.items():
        effects = machine.handle(Prepared(name.encode(), numbers))
    shared = {effect.identity: effect.readers for effect in effects if isinstance(effect, ShareMemory)}
    assert shared == {None: (1,), b"a": (0, 2), b"b": (1, 4), b"c": (4,), b"d": (2, 3)}


def test_one_node_too_many_is_sent_away_by_name(plan):
    machine = ready(plan)
    (effect,) = machine.handle(hello("late", stage=1))
    assert isinstance(effect, SendAway)
    assert "stage 1" in effect.reason


def test_a_node_of_another_version_is_sent_away(plan):
    machine = CoordinatorState(plan, (1, 1, 1, 1))
    (effect,) = machine.handle(Joined(b"old", Hello(PROTOCOL + 1, 1, "h", "a", -1, -1, "", None)))
    assert isinstance(effect, SendAway)
    assert "same version" in effect.reason


def test_a_request_enters_and_is_answered_when_all_is_back(plan):
    machine = ready(plan)
    assert machine.handle(Submitted(1, ("y", "a"), None)) == [Enter(1, (0, 0, 0, 0), ("y", "a"))]
    first, last = Visit(0, 0, 1, 2, 9, 9, 8, 4), Visit(3, 0, 10, 12, 20, 20, 0, 0)
    assert machine.handle(Returned(1, ("a",), (first,))) == []
    assert machine.handle(Returned(1, ("y",), (first, last))) == [Resolve(1, (first, last))]
    assert machine.handle(Returned(1, ("y",), (first, last))) == []
    assert (machine.nodes[0, 0].requests, machine.nodes[0, 0].wait_ns, machine.nodes[0, 0].run_ns) == (1, 1, 7)
    assert (machine.nodes[0, 0].output_bytes, machine.nodes[0, 0].shared_bytes) == (8, 4)


def test_only_the_stages_that_are_needed_are_on_the_route(plan):
    (enter,) = ready(plan).handle(Submitted(1, ("left",), None))
    assert enter == Enter(1, (0, 0, -1, -1), ("left",))


def test_requests_go_to_the_replica_with_the_fewest(plan):
    machine = ready(plan, (1, 2, 1, 1))
    routes = [machine.handle(Submitted(n, ("y",), None))[0].route for n in range(3)]
    assert [route[1] for route in routes] == [0, 1, 0]
    machine.handle(Returned(0, ("y",), ()))
    machine.handle(Returned(2, ("y",), ()))
    assert machine.handle(Submitted(3, ("y",), None))[0].route[1] == 0


def test_outstanding_work_returns_to_nothing(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), None))
    machine.handle(Submitted(2, ("y",), None))
    machine.handle(Returned(1, ("y",), ()))
    machine.handle(Reported(Failed(2, 3, 0, "why")))
    assert [node.outstanding for node in machine.nodes.values()] == [0, 0, 0, 0]


def test_a_failed_stage_fails_its_request_alone(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), None))
    machine.handle(Submitted(2, ("y",), None))
    reject, forget = machine.handle(Reported(Failed(1, 1, 0, "bad shape")))
    assert isinstance(reject.error, StageFailed)
    assert "stage 1" in str(reject.error)
    assert "bad shape" in str(reject.error)
    assert isinstance(forget, Forget)
    assert machine.handle(Returned(2, ("y",), ())) == [Resolve(2, ())]


def test_a_deadline_names_the_stages_that_had_not_finished(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), 1000))
    assert machine.next_deadline_ns() == 1000
    assert machine.expired(999) == {}
    assert machine.expired(1000) == {1: (0, 0, 0, 0)}
    reject, _ = machine.handle(Expired(1, frozenset({0})))
    assert isinstance(reject.error, DeadlineExceeded)
    assert "stage 1, 2, 3 had not finished" in str(reject.error)


def test_a_deadline_of_an_answered_request_is_forgotten(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), 1000))
    machine.handle(Submitted(2, ("y",), 2000))
    machine.handle(Returned(1, ("y",), ()))
    assert machine.next_deadline_ns() == 2000
    assert machine.expired(1500) == {}


def test_a_lost_node_fails_everything_with_its_story(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), None))
    reject = machine.handle(Lost((2, 0), "was killed by SIGKILL"))[0]
    assert isinstance(reject.error, NodeFailed)
    assert "stage 2 (node 2.0, pid 1 on host) was killed by SIGKILL" in str(reject.error)
    assert machine.handle(Submitted(2, ("y",), None)) == [Reject(2, reject.error)]
    assert machine.handle(Lost((1, 0), "too")) == []


def test_a_node_lost_before_all_are_ready_fails_the_launch(plan):
    machine = CoordinatorState(plan, (1, 1, 1, 1))
    (announce,) = machine.handle(Lost((0, 0), "ended with exit code 1"))
    assert isinstance(announce.error, LaunchFailed)


def test_a_refusal_and_a_late_start_fail_the_launch(plan):
    machine = CoordinatorState(plan, (1, 1, 1, 1))
    machine.handle(hello("a", stage=0))
    (announce,) = machine.handle(Declined(b"a", "no CUDA here"))
    assert "no CUDA here" in str(announce.error)
    (announce,) = CoordinatorState(plan, (1, 1, 1, 1)).handle(TimedOut("not ready"))
    assert isinstance(announce.error, LaunchFailed)


def test_closing_fails_what_is_in_flight_and_sends_all_nodes_away(plan):
    machine = ready(plan)
    machine.handle(Submitted(1, ("y",), None))
    reject, _, *away = machine.handle(CloseAsked())
    assert isinstance(reject.error, PipelineClosed)
    assert len(away) == 4
    assert machine.handle(CloseAsked()) == []
