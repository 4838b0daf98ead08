"""The balancing policies, with given load figures."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import pytest

from runtime.balance.board import LoadBoard
from runtime.balance.policies import UNIT_COST, Balancer, Replica, ServiceTime, cost_of
from runtime.balance.router import Router
from runtime.wire.messages.control import POLICIES, Peer
from runtime.wire.messages.data import Receipt

MS = 1_000_000


def replica(outstanding=0.0, service_ms=5.0, **more) -> Replica:
    return Replica(int(outstanding * UNIT_COST), int(service_ms * MS), int(service_ms * MS), **more)


def chosen(policy, *replicas, cost=UNIT_COST, times=1):
    balancer = Balancer(policy)
    choices = [balancer.choose(replicas, cost) for _ in range(times)]
    return choices[0] if times == 1 else Counter(choices)


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_replicas_take_turns(policy):
    assert chosen(policy, replica(), replica(), replica(), times=9) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(
    ("policy", "replicas", "expected"),
    [
        ("completion", [replica(3), replica(0, 10)], 1),
        ("completion", [replica(3), replica(0, 30)], 0),
        ("completion", [replica(1, transfer_ns=20 * MS), replica(3)], 1),
        ("completion", [replica(2, running=UNIT_COST, running_ns=4 * MS), replica(2)], 0),
        ("completion", [replica(1, running=UNIT_COST, running_ns=90 * MS), replica(3)], 1),
        ("completion", [replica(0, 50, age_ns=60_000 * MS), replica(3)], 0),
        ("completion", [replica(1, 50, age_ns=60_000 * MS), replica(3)], 1),
        ("completion", [replica(0, 0), replica(1)], 0),
        ("task", [replica(3, 1), replica(2, 50)], 1),
        ("latency", [replica(0, 50), replica(3)], 1),
        ("latency", [Replica(0, 5 * MS, 40 * MS), replica(3)], 1),
    ],
    ids=[
        "the quicker queue",
        "the quicker node",
        "the nearer one",
        "the one that is nearly done",
        "not the one that is stuck",
        "a slow one is tried again after a while",
        "with one request at a time",
        "a new one",
        "the least work",
        "the least time",
        "a peak counts",
    ],
)
def test_a_policy_picks(policy, replicas, expected):
    assert chosen(policy, *replicas) == expected


def test_resource_goes_by_speed_whatever_is_outstanding():
    assert chosen("resource", replica(9, 5), replica(0, 10), replica(0, 10), times=20) == {0: 10, 1: 5, 2: 5}


def test_resource_recovers_from_not_knowing():
    balancer = Balancer("resource")
    for _ in range(7):
        balancer.choose([replica(0, 0), replica(0, 0)], UNIT_COST)
    counts = Counter(balancer.choose([replica(0, 5), replica(0, 15)], UNIT_COST) for _ in range(40))
    assert abs(counts[0] - 30) <= 1


def test_large_requests_count_as_what_they_are():
    assert chosen("task", replica(16), replica(3)) == 1
    assert cost_of(1600, 100) == 16 * UNIT_COST
    assert cost_of(0, 100) == 1
    assert cost_of(1 << 60, 1) == 1 << 40


def test_a_service_time_is_divided_by_cost_and_decays():
    service_time = ServiceTime()
    service_time.ran(160 * MS, 16 * UNIT_COST, 1)
    assert service_time.service_ns == 10 * MS
    service_time.ran(50 * MS, UNIT_COST, 1000 * MS)
    assert service_time.service_ns > 20 * MS, "a measurement from a second ago has little weight, despite its size"
    assert service_time.peak_ns == service_time.longest_ns == 50 * MS
    service_time.ran(10 * MS, UNIT_COST, 9000 * MS)
    assert service_time.service_ns < 11 * MS
    assert service_time.peak_ns < 11 * MS
    assert service_time.longest_ns == 50 * MS


def test_what_is_outstanding_is_what_all_sent_less_what_is_done():
    sender, other, node = LoadBoard(), LoadBoard(), LoadBoard()
    sender.send(3, 5000)
    other.send(3, 1000)
    node.finish(1, 2000)
    assert [sender.sent(3) - node.done(1), other.sent(3) - node.done(2)] == [3000, 1000]
    sender.clear(3)
    assert sender.sent(3) == 0
    node.began(1000, 7)
    assert node.times == (0, 0, 0, 7, 1000)


def test_the_last_node_of_a_stage_is_chosen_while_it_leaves():
    nodes = [Peer(number, 0, number, takes, "", "", None, "") for number, takes in ((1, False), (2, True))]
    router = Router("completion", LoadBoard())
    router.learn(0, nodes, {1: LoadBoard(), 2: LoadBoard()})
    assert router.choose(0, (), UNIT_COST, 0, 0) == 2
    router.learn(0, nodes[:1], {1: LoadBoard()})
    assert router.choose(0, (), UNIT_COST, 0, 0) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_of_many_replicas_a_few_are_looked_at_and_none_is_forgotten(policy):
    balancer, count = Balancer(policy, seed=7), 50
    counts = Counter()
    for _ in range(count * 40):
        places = balancer.candidates(count)
        assert 0 < len(places) < 10
        counts[balancer.choose([replica() for _ in places], UNIT_COST, places)] += 1
    assert sorted(counts) == list(range(count))
    assert max(counts.values()) < 4 * 40


def test_a_busy_one_of_many_is_left_alone():
    balancer = Balancer("completion", seed=1)
    busy = set(range(20))
    for _ in range(200):
        places = balancer.candidates(60)
        taken = balancer.choose([replica(9 if place in busy else 0) for place in places], UNIT_COST, places)
        assert taken not in busy or set(places) <= busy


def far(count: int) -> Router:
    """Return a router whose replicas are all on other hosts."""
    router = Router("completion", LoadBoard(peers=count + 2))
    router.learn(0, [Peer(n + 1, 0, n, True, "", "", None, "") for n in range(count)], {})
    return router


def test_load_of_replicas_on_other_hosts_is_what_was_sent_and_what_they_report():
    router = far(3)
    for number, times in ((1, 3), (2, 1), (3, 2)):
        for _ in range(times):
            router.sent(number, UNIT_COST)
    assert router.choose(0, (-1,), UNIT_COST, 0, 0) == 2
    router.told(Receipt(1, 3 * UNIT_COST, 3 * UNIT_COST, 0, 5 * MS, 5 * MS), 1)
    assert router.outstanding(1) == 0
    assert router.choose(0, (-1,), UNIT_COST, 0, 1) == 1
    router.learn(0, [Peer(n, 0, n, True, "", "", None, "") for n in (2, 3, 4)], {})
    assert (router.outstanding(4), router.outstanding(2)) == (0, UNIT_COST)


def test_a_choice_costs_the_same_among_a_thousand_as_among_twenty():
    few, many = far(20), far(1000)

    assert instructions(lambda: many.choose(0, (-1,), UNIT_COST, 1000, 1)) < 3 * instructions(
        lambda: few.choose(0, (-1,), UNIT_COST, 1000, 1)
    )


def instructions(action: Callable[[], object]) -> int:
    """Count the Python instructions of an action; the count does not depend on the load of the machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count
