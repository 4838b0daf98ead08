"""The coordinator's state machine, event by event."""

from __future__ import annotations

import pytest

from onnxsplit.plan_files import load_plan
from runtime.coordinator.counters import MOST_COSTS
from runtime.coordinator.events import (
    Again,
    Announce,
    CloseAsked,
    Declined,
    DrainAsked,
    Drained,
    Enter,
    Expired,
    Forget,
    GivenUp,
    GiveStage,
    Introduce,
    Joined,
    KillNode,
    LeaveWanted,
    LinkChanged,
    LinksSeen,
    Lost,
    Met,
    Prepared,
    Reconnected,
    Reject,
    Reported,
    Resolve,
    Returned,
    Scaled,
    SendAway,
    ShareMemory,
    StartNode,
    Submitted,
    Tick,
    TimedOut,
    Unsendable,
)
from runtime.coordinator.node_record import Phase
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.state import CoordinatorState
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    LaunchFailed,
    NodeFailed,
    PipelineClosed,
    StageFailed,
    StageUnavailable,
)
from runtime.timings import Timings
from runtime.wire.messages.control import PROTOCOL, Hello
from runtime.wire.messages.data import ANY, NOT_NEEDED, Failed, Step, Visit

SECOND = 1_000_000_000
TIMINGS = Timings(backoff_s=1, settled_s=5, circuit_failures=3, circuit_s=30, lost_s=10)


def hello(name: str, stage: int = -1, replica: int = -1, number: int = 0) -> Joined:
    return Joined(name.encode(), Hello(PROTOCOL, number, 1, "host", f"at {name}", stage, replica, "", None, ""), 0)


@pytest.fixture
def plan(diamond_plan):
    """A diamond: 0 feeds 1 and 2, which 3 joins."""
    return load_plan(diamond_plan)


def do(machine, event):
    """Give the machine an event; return all its effects, those on requests first."""
    on_requests, on_nodes = machine.handle(event)
    return [*on_requests, *on_nodes]


def new(plan, replicas=(1, 1, 1, 1), attempts=3) -> CoordinatorState:
    """Return a machine whose processes were started, numbered from 1 by stage and replica."""
    machine = CoordinatorState(
        plan, replicas, choose=lambda stage, _: machine.roster.numbers(stage)[0], timings=TIMINGS, attempts=attempts
    )
    do(machine, Tick(0))
    return machine


def ready(plan, replicas=(1, 1, 1, 1), attempts=3) -> CoordinatorState:
    machine = new(plan, replicas, attempts)
    for number in range(1, sum(replicas) + 1):
        do(machine, hello(f"n{number}"))
    for number in range(1, sum(replicas) + 1):
        do(machine, Prepared(f"n{number}".encode(), (), 0))
    assert machine.state is PipelinePhase.READY
    return machine


def submit(machine, request, wanted=("y",), deadline_ns=None, now_ns=0):
    return do(machine, Submitted(request, wanted, 1000, deadline_ns, now_ns))


def returned(machine, request, names=("y",), history=(), attempt=1):
    return do(machine, Returned(request, attempt, names, history))


def met(machine, effects, now_ns=SECOND):
    """Return the effects of an event, and those that follow once the coordinator has connected to its nodes."""
    if any(isinstance(effect, Introduce) and effect.meet for effect in effects):
        effects = [*effects, *do(machine, Met((), now_ns))]
    return effects


def lose(machine, number, steps=None, reason="was killed", now_ns=SECOND):
    return met(machine, do(machine, Lost(number, reason, steps or {}, now_ns)), now_ns)


def come_back(machine, effects, now_ns=2 * SECOND):
    """Let the replacement of a lost process report and load; return the effects."""
    (start,) = [effect for effect in effects if isinstance(effect, StartNode)]
    name = f"n{start.number}"
    do(machine, hello(name, *start.slot, number=start.number))
    return met(machine, do(machine, Prepared(name.encode(), (), now_ns)), now_ns)


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


def test_processes_are_started_and_numbered(plan):
    machine = CoordinatorState(plan, (1, 2, 1, 1), choose=lambda *_: None)
    slots = [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)]
    assert do(machine, Tick(0)) == [StartNode(slot, number + 1) for number, slot in enumerate(slots)]
    assert do(machine, Tick(1)) == []


def test_nodes_are_introduced_when_all_are_there_and_announced_when_all_are_ready(plan):
    machine = new(plan)
    assert do(machine, hello("a", stage=2)) == [GiveStage(b"a", (2, 0))]
    do(machine, hello("b"))
    do(machine, hello("c"))
    give, introduce = do(machine, hello("d"))
    assert give == GiveStage(b"d", (3, 0))
    assert introduce == Introduce((b"b", b"c", b"a", b"d"), meet=True)
    assert [do(machine, Prepared(n, (), 0)) for n in (b"a", b"b", b"c")] == [[], [], []]
    assert do(machine, Prepared(b"d", (), 0))[-1] == Announce(None)


def test_memory_is_lent_only_where_both_sides_have_mapped_each_other(plan):
    machine = new(plan)
    for name in "abcd":
        do(machine, hello(name))
    do(machine, Met((1, 4), 0))
    mapped = {"a": (0, 2, 3), "b": (1, 4), "c": (4,), "d": (2, 3)}
    for name, numbers in mapped.items():
        effects = do(machine, Prepared(name.encode(), numbers, 0))
    shared = {effect.identity: effect.readers for effect in of(effects, ShareMemory)}
    assert shared == {None: (1,), b"a": (0, 2), b"b": (1, 4), b"c": (4,), b"d": (2, 3)}
    again = do(machine, Prepared(b"c", (1, 4), 0))
    assert again == [ShareMemory(b"a", (0, 2, 3)), ShareMemory(b"c", (1, 4))], "those for whom something changed"


def test_one_node_too_many_is_sent_away_by_name(plan):
    (effect,) = do(ready(plan), hello("late", stage=1))
    assert isinstance(effect, SendAway)
    assert "stage 1" in effect.reason
    assert (effect.fate, effect.again) == ("rejoin", False)


def test_a_process_that_was_replaced_before_it_reported_does_not_take_the_place_of_the_next(plan):
    machine = ready(plan)
    (old,) = of(lose(machine, 1), StartNode)
    lose(machine, old.number)
    (start,) = do(machine, Tick(3 * SECOND))
    assert isinstance(do(machine, hello("old", 0, 0, number=old.number))[0], SendAway)
    assert do(machine, hello("new", 0, 0, number=start.number))[0] == GiveStage(b"new", (0, 0))


def test_a_node_of_another_version_is_sent_away(plan):
    old = Joined(b"old", Hello(PROTOCOL + 1, 0, 1, "h", "a", -1, -1, "", None, ""), 0)
    (effect,) = do(new(plan), old)
    assert isinstance(effect, SendAway)
    assert "same version" in effect.reason
    assert effect.fate == "refused"


def test_session_times_are_counted_by_the_cost_of_requests_in_a_bounded_table(plan):
    machine = ready(plan)
    visit = Visit(0, 0, 1, 2, 9, 9, 0, 0)
    for number, cost in enumerate((1000, 1023, 1024, 5), 1):
        machine.handle(Submitted(number, ("a",), cost, None, 0))
        machine.handle(Returned(number, 1, ("a",), (visit,)))
    counters = machine.roster.nodes[0, 0].counters
    assert counters.by_cost == {896: [2, 14], 1024: [1, 7], 5: [1, 7]}
    for power in range(41):
        counters.add(visit, 1 << power)
    assert len(counters.by_cost) == MOST_COSTS + 1
    assert sum(requests for requests, _ in counters.by_cost.values()) == counters.requests == 45
    assert sum(ran_ns for _, ran_ns in counters.by_cost.values()) == counters.run_ns


def test_a_request_enters_and_is_answered_when_all_is_back(plan):
    machine = ready(plan)
    assert submit(machine, 1, ("y", "a")) == [Enter(1, 1, 1, 1000, None, (ANY, ANY, ANY, 4), ("y", "a"))]
    first, last = Visit(0, 0, 1, 2, 9, 9, 8, 4), Visit(3, 0, 10, 12, 20, 20, 0, 0)
    assert returned(machine, 1, ("a",), (first,)) == []
    assert returned(machine, 1, ("y",), (first, last)) == [Resolve(1, (first, last))]
    assert returned(machine, 1, ("y",), (first, last)) == []
    counters = machine.roster.nodes[0, 0].counters
    assert (counters.requests, counters.wait_ns, counters.run_ns, counters.output_bytes, counters.shared_bytes) == (
        1,
        1,
        7,
        8,
        4,
    )


def test_only_the_stages_that_are_needed_are_on_the_route(plan):
    (enter,) = submit(ready(plan), 1, ("left",))
    assert enter.route == (ANY, ANY, NOT_NEEDED, NOT_NEEDED)


def test_a_failed_stage_fails_its_request_alone(plan):
    machine = ready(plan)
    submit(machine, 1)
    submit(machine, 2)
    reject, forget = do(machine, Reported(Failed(1, 1, 1, 0, "bad shape")))
    assert isinstance(reject.error, StageFailed)
    assert "stage 1" in str(reject.error)
    assert "bad shape" in str(reject.error)
    assert forget == Forget(1, 1, (b"n1", b"n2", b"n3", b"n4"))
    assert returned(machine, 2) == [Resolve(2, ())]


def test_a_deadline_names_the_stages_that_had_not_finished(plan):
    machine = ready(plan)
    submit(machine, 1, deadline_ns=1000)
    assert machine.requests.deadlines.next_ns() == 1000
    assert machine.requests.expired(999) == ()
    assert machine.requests.expired(1000) == ((1, 1),)
    reject, _ = do(machine, Expired(1, {1: Step.DONE, 2: Step.RUNNING}))
    assert isinstance(reject.error, DeadlineExceeded)
    assert "stage 1 (node 1.0, pid 1 on host) was running it" in str(reject.error)
    assert "stage 2 (node 2.0, pid 1 on host) had not begun it" in str(reject.error)
    assert "stage 3" not in str(reject.error), "it is the turn of 1 and 2 first"


def test_deadlines_of_answered_requests_do_not_pile_up(plan):
    machine = ready(plan)
    for number in range(5000):
        submit(machine, number, deadline_ns=10**15)
        returned(machine, number)
    assert len(machine.requests.deadlines) < 2000


def test_what_is_overdue_says_for_which_node_it_waited(plan):
    machine = ready(plan, attempts=1)
    submit(machine, 1)
    late = int(1e12)
    assert machine.requests.overdue(late) == ((1, 1),)
    reject, *_ = do(machine, Tick(late, {(1, 1): {1: Step.DONE, 2: Step.RUNNING}}))
    assert "nothing was heard of it for 1000 s" in str(reject.error)
    assert "stage 1 (node 1.0, pid 1 on host) was running it" in str(reject.error)


def test_a_request_that_cannot_be_sent_ends_alone(plan):
    machine = ready(plan)
    submit(machine, 1)
    submit(machine, 2)
    assert do(machine, Unsendable(1, StageFailed("too large"), attempt=7)) == [], "an attempt that is over"
    reject, *_ = do(machine, Unsendable(1, StageFailed("too large")))
    assert str(reject.error) == "too large"
    assert len(machine.requests) == 1


def test_a_deadline_of_an_answered_request_is_forgotten(plan):
    machine = ready(plan)
    submit(machine, 1, deadline_ns=1000)
    submit(machine, 2, deadline_ns=2000)
    returned(machine, 1)
    assert machine.requests.deadlines.next_ns() == 2000
    assert machine.requests.expired(1500) == ()


def test_a_request_that_is_given_up_is_forgotten_everywhere(plan):
    machine = ready(plan)
    submit(machine, 1)
    reject, forget = do(machine, GivenUp(1))
    assert isinstance(reject.error, Cancelled)
    assert forget == Forget(1, 1, (b"n1", b"n2", b"n3", b"n4"))
    assert do(machine, GivenUp(1)) == []


# Losses


def test_what_a_lost_node_may_have_had_begins_again_when_another_is_there(plan):
    machine = ready(plan)
    submit(machine, 1)
    effects = lose(machine, 3)
    assert of(effects, StartNode) == [StartNode((2, 0), 5)]
    assert of(effects, Introduce) == [Introduce((b"n1", b"n2", b"n4"), meet=True)]
    assert of(effects, Forget) == [Forget(1, 1, (b"n1", b"n2", b"n4"))]
    assert of(effects, Again)[0].attempt == 1
    assert of(effects, Enter) == []
    assert machine.requests.waiting == 1
    assert returned(machine, 1) == [], "the first attempt is over"
    (enter,) = of(come_back(machine, effects), Enter)
    assert (enter.attempt, enter.view) == (2, machine.roster.view)
    assert returned(machine, 1, attempt=1) == []
    assert returned(machine, 1, attempt=2) == [Resolve(1, ())]


def test_with_a_replica_the_next_attempt_begins_at_once(plan):
    machine = ready(plan, (1, 2, 1, 1))
    submit(machine, 1)
    (enter,) = of(lose(machine, 2), Enter)
    assert (enter.attempt, enter.view) == (2, 2)


@pytest.mark.parametrize(
    ("known", "again"),
    [
        ({}, True),
        ({2: Step.RUNNING}, True),
        ({3: Step.RUNNING}, False),
        ({3: Step.DONE}, False),
        ({2: Step.DONE, 5: Step.RUNNING}, False),
        ({2: Step.DONE, 4: Step.RUNNING}, True),
        ({1: Step.RUNNING}, True),
    ],
    ids=[
        "unknown",
        "it ran there",
        "its replica runs it",
        "its replica ran it",
        "its reader has it",
        "another has something else of it",
        "it may be on its way",
    ],
)
def test_an_attempt_goes_on_when_the_loss_does_not_concern_it(plan, known, again):
    machine = ready(plan, (1, 2, 1, 1))  # numbers: 1 / 2, 3 / 4 / 5
    submit(machine, 1)
    effects = lose(machine, 2, {(1, 1): known})
    assert bool(of(effects, Again)) is again


def test_an_attempt_named_another_node_of_a_join_goes_on(plan):
    machine = ready(plan, (1, 1, 1, 2))
    submit(machine, 1)
    assert of(lose(machine, 5), Again) == []
    assert of(lose(machine, 4), Again) != []


def test_only_what_ran_on_a_lost_node_is_to_blame_and_is_given_up_in_the_end(plan):
    machine = ready(plan, (2, 1, 1, 1))
    submit(machine, 1)
    submit(machine, 2)
    number, attempts = 1, []
    for time in range(1, 4):
        steps = {(1, time): {number: Step.RUNNING}, (2, time): {}}
        effects = lose(machine, number, steps, "was killed by SIGSEGV", now_ns=time * 100 * SECOND)
        attempts.append([effect.request for effect in of(effects, Enter)])
        number = of(effects, StartNode)[0].number if of(effects, StartNode) else number
        come_back(machine, effects, now_ns=time * 100 * SECOND + 1)
    assert attempts == [[1, 2], [1, 2], [2]]
    (reject,) = of(effects, Reject)
    assert isinstance(reject.error, NodeFailed)
    assert "3 nodes" in str(reject.error)
    assert "stage 0" in str(reject.error)
    assert "SIGSEGV" in str(reject.error)
    assert returned(machine, 2, attempt=4) == [Resolve(2, ())]


def test_with_one_attempt_nothing_is_tried_again(plan):
    machine = ready(plan, (2, 1, 1, 1), attempts=1)
    submit(machine, 1)
    (reject,) = of(lose(machine, 1), Reject)
    assert isinstance(reject.error, NodeFailed)
    assert "not tried again" in str(reject.error)


def test_restarts_in_a_row_come_later_and_later_until_the_circuit_opens(plan):
    machine = ready(plan)
    starts = of(lose(machine, 1, now_ns=0), StartNode)
    assert len(starts) == 1, "the first at once"
    assert of(lose(machine, starts[0].number, now_ns=0), StartNode) == []
    assert do(machine, Tick(SECOND - 1)) == []
    (start,) = do(machine, Tick(SECOND))
    submit(machine, 1)
    (reject,) = of(lose(machine, start.number, reason="ended with exit code 1", now_ns=SECOND), Reject)
    assert isinstance(reject.error, StageUnavailable)
    assert "stage 0 has no node" in str(reject.error)
    assert "3 times in a row" in str(reject.error)
    assert "exit code 1" in str(reject.error)
    assert isinstance(submit(machine, 2)[0].error, StageUnavailable)
    assert do(machine, Tick(30 * SECOND)) == []
    half_open = do(machine, Tick(31 * SECOND))
    assert submit(machine, 3) == [], "it waits for the trial"
    (enter,) = of(come_back(machine, half_open, now_ns=32 * SECOND), Enter)
    assert enter.request == 3


def test_a_node_that_served_well_is_started_again_at_once(plan):
    machine = ready(plan)
    number = 1
    for time in range(1, 8):
        effects = lose(machine, number, now_ns=time * 10 * SECOND)
        (start,) = of(effects, StartNode)
        number = start.number
        come_back(machine, effects, now_ns=time * 10 * SECOND + 1)


def test_numbers_come_back_late(plan):
    machine = ready(plan)
    number, seen = 1, []
    for time in range(1, 300):
        effects = lose(machine, number, now_ns=time * 10 * SECOND)
        number = of(effects, StartNode)[0].number
        seen.append(number)
        come_back(machine, effects, now_ns=time * 10 * SECOND + 1)
    assert seen[:251] == list(range(5, 256))
    assert 0 not in seen
    assert not {2, 3, 4} & set(seen), "others have them"


def test_an_attempt_of_which_nothing_is_heard_is_made_again_more_and_more_patiently(plan):
    machine = ready(plan)
    submit(machine, 1)
    assert do(machine, Tick(10 * SECOND)) == []
    effects = do(machine, Tick(10 * SECOND + 1))
    assert [type(effect) for effect in effects] == [Again, Enter, Forget]
    assert do(machine, Tick(25 * SECOND)) == []
    assert of(do(machine, Tick(31 * SECOND)), Enter)[0].attempt == 3


def test_a_lost_node_that_comes_back_is_sent_away_and_not_heard(plan):
    machine = ready(plan)
    effects = lose(machine, 2, reason="has been silent")
    assert SendAway(b"n2", "the pipeline declared it dead: it has been silent", "rejoin") in effects
    assert do(machine, Prepared(b"n2", (), 0)) == []
    assert do(machine, LeaveWanted(b"n2", 0)) == []


def test_a_node_lost_before_all_are_ready_fails_the_launch(plan):
    machine = new(plan)
    (announce,) = lose(machine, 1, reason="ended with exit code 1")
    assert isinstance(announce.error, LaunchFailed)
    assert lose(machine, 2) == []


def test_a_refusal_and_a_late_start_fail_the_launch(plan):
    machine = new(plan)
    do(machine, hello("a", stage=0))
    (announce,) = do(machine, Declined(b"a", "no CUDA here", 0))
    assert "no CUDA here" in str(announce.error)
    (announce,) = do(new(plan), TimedOut("not ready"))
    assert isinstance(announce.error, LaunchFailed)


# More and fewer nodes


def test_a_node_is_added_while_requests_go_on(plan):
    machine = ready(plan)
    submit(machine, 1)
    (start,) = do(machine, Scaled(1, 2, 0))
    assert start.slot == (1, 1)
    assert do(machine, hello("new", 1, 1))[1] == Introduce((b"new",), meet=False)
    effects = do(machine, Prepared(b"new", (), 0))
    assert of(effects, Introduce) == [Introduce((b"n1", b"n2", b"new", b"n3", b"n4"), meet=True)]
    assert returned(machine, 1) == [Resolve(1, ())]


def test_a_node_that_is_not_needed_goes_when_nothing_can_reach_it(plan):
    machine = ready(plan, (1, 2, 1, 1))
    submit(machine, 1)
    effects = do(machine, Scaled(1, 1, 0))
    assert len(of(effects, Introduce)[0].identities) == 5
    assert of(effects, SendAway) == []
    submit(machine, 2)
    assert of(returned(machine, 2), SendAway) == []
    (away,) = of(returned(machine, 1), SendAway)
    assert away.identity == b"n3"
    assert of(lose(machine, 3, reason="ended with exit code 0"), StartNode) == []
    assert machine.roster.incidents == type(machine.roster.incidents)(), "that was no failure"


def test_a_node_that_leaves_is_replaced_and_its_work_is_not_lost(plan):
    machine = ready(plan)
    submit(machine, 1)
    effects = do(machine, LeaveWanted(b"n2", SECOND))
    assert of(effects, StartNode) == [StartNode((1, 0), 5)]
    assert of(effects, SendAway) == []
    assert submit(machine, 2) == [], "it waits for the new one"
    assert of(returned(machine, 1), SendAway) == [SendAway(b"n2", "it has no more work", "end")]
    lose(machine, 2, reason="ended with exit code 0")
    assert of(come_back(machine, effects), Enter)[0].request == 2


def test_a_node_that_dies_while_it_leaves_loses_nothing(plan):
    machine = ready(plan, (1, 2, 1, 1))
    submit(machine, 1)
    do(machine, Scaled(1, 1, 0))
    (enter,) = of(lose(machine, 3), Enter)
    assert enter.attempt == 2


def test_a_tentative_replica_that_does_not_start_is_given_up(plan):
    machine = ready(plan)
    (start,) = do(machine, Scaled(1, 2, 0, tentative=True))
    submit(machine, 1)
    assert of(lose(machine, start.number), StartNode) == []
    assert list(machine.roster.nodes) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert do(machine, Tick(9 * SECOND)) == []
    assert returned(machine, 1) == [Resolve(1, ())]
    assert machine.roster.planned == [1, 1, 1, 1]


def test_a_tentative_replica_that_declines_is_given_up(plan):
    machine = ready(plan)
    (start,) = do(machine, Scaled(1, 2, 0, tentative=True))
    do(machine, hello("new", 1, 1, start.number))
    (away,) = do(machine, Declined(b"new", "no memory", 0))
    assert (away.identity, away.fate) == (b"new", "refused")
    assert len(machine.roster.nodes) == 4


def test_a_tentative_replica_that_is_ready_is_like_any_other(plan):
    machine = ready(plan)
    effects = come_back(machine, do(machine, Scaled(1, 2, 0, tentative=True)))
    assert of(effects, Introduce)
    (again,) = of(lose(machine, 5), StartNode)
    assert again.slot == (1, 1)
    assert machine.roster.planned == [1, 2, 1, 1]


def test_replicas_that_are_not_ready_go_first_and_a_tentative_one_before_a_lost_one(plan):
    machine = ready(plan, (1, 3, 1, 1))
    lose(machine, 2)
    assert machine.roster.nodes[1, 0].phase is Phase.STARTED
    assert of(do(machine, Scaled(1, 2, SECOND)), KillNode), "the newest one is ready, and stays"
    assert [slot for slot in machine.roster.nodes if slot[0] == 1] == [(1, 1), (1, 2)]
    lose(machine, 3)
    lose(machine, 4)
    do(machine, Scaled(1, 3, SECOND, tentative=True))
    do(machine, Scaled(1, 2, SECOND))
    assert not any(node.is_tentative for node in machine.roster.nodes.values())


# The end


def test_draining_answers_what_is_in_flight_and_refuses_the_rest(plan):
    machine = ready(plan)
    submit(machine, 1)
    assert do(machine, DrainAsked()) == []
    (reject,) = submit(machine, 2)
    assert isinstance(reject.error, PipelineClosed)
    assert returned(machine, 1) == [Resolve(1, ()), Drained()]
    assert do(machine, DrainAsked()) == [Drained()]


def test_losses_while_draining_are_made_good(plan):
    machine = ready(plan, (2, 1, 1, 1))
    submit(machine, 1)
    do(machine, DrainAsked())
    assert of(lose(machine, 1), Enter)[0].attempt == 2


def test_closing_also_sends_nodes_away_that_leave_and_still_have_work(plan):
    machine = ready(plan, (1, 2, 1, 1))
    submit(machine, 1)
    assert of(do(machine, Scaled(1, 1, 0)), SendAway) == []
    assert {away.identity for away in of(do(machine, CloseAsked()), SendAway)} == {b"n%d" % n for n in range(1, 6)}


def test_closing_fails_what_is_in_flight_and_sends_all_nodes_away(plan):
    machine = ready(plan)
    submit(machine, 1)
    reject, _, *away = do(machine, CloseAsked())
    assert isinstance(reject.error, PipelineClosed)
    assert len(away) == 4
    assert do(machine, CloseAsked()) == []
    assert machine.roster.nodes[0, 0].phase is Phase.READY


def links(machine, *dead, now_ns=SECOND):
    return met(machine, do(machine, LinksSeen(frozenset(dead), now_ns)), now_ns)


def test_a_dead_link_is_reported_once_with_both_ends_and_again_when_it_is_back(plan):
    machine = ready(plan)
    story = "node 0.0 cannot reach node 1.0 at at n2"
    assert of(links(machine, (1, 2)), LinkChanged) == [LinkChanged(story, is_dead=True)]
    assert of(links(machine, (1, 2)), LinkChanged) == []
    assert machine.roster.incidents[-1].story == story
    assert machine.links.unreachable == story
    assert of(links(machine), LinkChanged) == [LinkChanged("node 0.0 reaches node 1.0 again", is_dead=False)]
    assert machine.links.unreachable is None


def test_a_dead_link_with_an_alternative_does_not_stop_serving(plan):
    machine = ready(plan, (1, 2, 1, 1))  # 0.0 is 1; 1.0 and 1.1 are 2 and 3; 2.0 is 4; 3.0 is 5
    links(machine, (1, 2))
    assert (machine.links.unreachable, machine.roster.dead_ends) == (None, frozenset())
    effects = links(machine, (2, 5))
    assert machine.roster.dead_ends == {2}, "what goes to 1.0 cannot go on"
    (introduce,) = of(effects, Introduce)
    assert [peer.takes for peer in machine.roster.peers(None, everyone=False)] == [True, False, True, True, True]
    assert introduce.meet
    links(machine, (2, 5), (3, 5))
    assert "node 1.1 cannot reach node 3.0" in machine.links.unreachable
    assert machine.links.avoided(3) == {5}
    links(machine)
    assert machine.roster.dead_ends == frozenset()


def test_an_attempt_that_may_be_stuck_at_a_dead_link_is_made_again(plan):
    machine = ready(plan, (1, 2, 1, 1))
    submit(machine, 1, now_ns=0)
    submit(machine, 2, now_ns=9 * SECOND)
    submit(machine, 3, ("right",), now_ns=0)
    effects = links(machine, (1, 2), now_ns=10 * SECOND)
    (again,) = of(effects, Again)
    assert (again.request, again.reason) == (1, "node 0.0 cannot reach node 1.0 at at n2")
    assert [(enter.request, enter.attempt) for enter in of(effects, Enter)] == [(1, 2)]


def test_a_request_whose_time_runs_out_names_the_dead_link_on_its_way(plan):
    machine = ready(plan)
    submit(machine, 1, deadline_ns=SECOND)
    links(machine, (1, 2))
    (reject, *_) = of(do(machine, Expired(1, {})), Reject)
    assert "node 0.0 cannot reach node 1.0 at at n2" in str(reject.error)
    submit(machine, 2, ("right",), deadline_ns=SECOND)
    (reject, *_) = of(do(machine, Expired(2, {})), Reject)
    assert "cannot reach" not in str(reject.error)


def test_a_node_that_cannot_send_its_results_is_named_with_the_address_it_sends_them_to(plan):
    machine = ready(plan)
    machine.links.data_address = "tcp://10.0.0.1:7"
    links(machine, (4, 0))
    assert machine.links.unreachable == "node 3.0 cannot reach the coordinator at tcp://10.0.0.1:7"


def test_the_links_of_a_node_that_is_lost_are_forgotten(plan):
    machine = ready(plan)
    links(machine, (1, 2))
    lose(machine, 2)
    assert of(links(machine), LinkChanged) == []
    assert machine.links.stories == {}


def test_the_links_of_a_node_that_has_left_are_not_said_to_be_back(plan):
    machine = ready(plan)
    links(machine, (1, 2))
    submit(machine, 1)
    do(machine, LeaveWanted(b"n2", SECOND))
    assert machine.roster.linked >= {1, 2}
    returned(machine, 1)
    assert 2 not in machine.roster.linked
    assert of(links(machine), LinkChanged) == []


def test_a_node_whose_control_link_was_broken_gets_the_list_of_nodes_again(plan):
    machine = new(plan)
    do(machine, hello("n1"))
    assert do(machine, Reconnected(b"n1")) == [], "it was told nothing yet"
    machine = ready(plan)
    assert do(machine, Reconnected(b"stranger")) == []
    machine.roster.nodes[0, 0].introduced = True
    assert do(machine, Reconnected(b"n1")) == [Introduce((b"n1",), meet=False), ShareMemory(b"n1", ())]


def test_what_all_unanswered_requests_cost_is_known(plan):
    machine = ready(plan)
    submit(machine, 1)
    submit(machine, 2)
    assert machine.requests.cost == 2000
    returned(machine, 1)
    assert machine.requests.cost == 1000
