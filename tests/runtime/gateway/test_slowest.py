"""The slowest requests of a minute, and where their time went."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from runtime.gateway.telemetry.slowest import KEPT, Slowest, SlowRequest, slowest_of_minute
from runtime.gateway.telemetry.timeline import Kind, Timeline, timeline
from runtime.wire.messages.data import Visit

MS = 1_000_000
S = 1000 * MS
DIAMOND = {(0, 1), (0, 2), (1, 3), (2, 3)}


def request(ended_ns: int, took_ns: int, **changes) -> SlowRequest:
    """A request that ended at a time and took some time."""
    begun = ended_ns - took_ns
    times = {"decoded_ns": begun, "refused_ns": 0, "entered_ns": begun, "left_ns": ended_ns, **changes}
    return SlowRequest(arrived_ns=begun, ended_ns=ended_ns, **times)


def visit(stage: int, arrived: float, started: float, ended: float, sent: float, replica: int = 0) -> Visit:
    """A visit with times in milliseconds."""
    return Visit(stage, replica, *(round(time * MS) for time in (arrived, started, ended, sent)), 0, 0)


def passed(*visits: Visit, refused: float = 0, entered: float = 5, left: float = 50) -> SlowRequest:
    """A request that arrived at 0, was decoded at 1 ms, and was answered at 51 ms."""
    times = (0, 1 * MS, round(refused * MS), round(entered * MS), round(left * MS), 51 * MS)
    return SlowRequest(*times, visits)


def parts(found: Timeline) -> dict[str, int]:
    """The milliseconds of all periods of a kind and node."""
    sums: Counter[str] = Counter()
    for period in found.periods:
        sums[f"{period.kind.value} {period.node}".strip()] += period.ns // MS
    return dict(sums)


@given(st.lists(st.lists(st.integers(min_value=1, max_value=100), max_size=12), max_size=90))
def test_the_five_slowest_of_the_last_minute_are_kept(seconds):
    taken, everything = Slowest(), []
    kept: list[SlowRequest] = []
    for number, times in enumerate(seconds):
        for took in times:
            one = request(number * S, took)
            everything.append(one)
            if one.total_ns > taken.least_ns:
                taken.add(one)
        kept = slowest_of_minute((*kept, *taken.take()), number * S)
    last = [one for one in everything if one.ended_ns > (len(seconds) - 61) * S]
    slowest = sorted((one.total_ns for one in last), reverse=True)[:KEPT]
    assert sorted((one.total_ns for one in kept), reverse=True)[:KEPT] == slowest
    assert len(kept) <= 60 * KEPT


def test_most_requests_cost_one_comparison():
    slowest = Slowest()
    took = list(range(1, 10_001))
    random.Random(0).shuffle(took)
    added = 0
    for one in took:
        if one > slowest.least_ns:
            slowest.add(request(S, one))
            added += 1
    assert added < 100
    assert sorted(one.total_ns for one in slowest.take()) == [9996, 9997, 9998, 9999, 10_000]


def test_periods_name_every_wait_and_run():
    found = timeline(passed(visit(0, 6, 8, 12, 13), visit(1, 14, 40, 48, 49), refused=3), 0, {(0, 1)})
    assert parts(found) == {
        "read": 1, "queue": 2, "admission": 2, "wait 0.0": 2, "run 0.0": 4, "wait 1.0": 26, "run 1.0": 8,
        "send": 5, "answer": 1,
    }  # fmt: skip
    assert sum(period.ns for period in found.periods) == found.total_ns == 51 * MS
    assert found.summary == "Most of the time it waited for stage 1 (26 of 51 ms)."


def test_a_request_that_lies_unread_at_a_busy_node_waits_for_it():
    visits = visit(0, 5, 5, 6, 6), visit(1, 40, 40, 48, 48)
    others = [(visit(1, 0, 0, 20, 20),), (visit(1, 20, 20, 39, 39),), (visit(1, 6, 7, 30, 30, replica=1),), visits]
    one = passed(*visits)
    found = timeline(msgspec.structs.replace(one, visits=visits, others=(others[:2], others[2:])), 0, {(0, 1)})
    assert parts(found) == {
        "read": 1, "queue": 4, "run 0.0": 1, "send": 1 + 2, "wait 1.0": 33, "run 1.0": 8, "answer": 1
    }  # fmt: skip
    assert found.summary == "Most of the time it waited for stage 1 (33 of 51 ms)."


def test_the_visits_of_the_latest_executions_are_kept_and_no_more():
    slowest = Slowest()
    for number in range(1000):
        slowest.ran((visit(number, 0, 0, 0, 0),))
    stages = [visits[0].stage for block in slowest.others for visits in block]
    assert stages == list(range(1000 - len(stages), 1000))
    assert 128 <= len(stages) <= 256


def test_a_stage_beside_the_slow_one_is_not_part_of_the_sum():
    visits = visit(0, 5, 5, 6, 6), visit(1, 7, 7, 8, 8), visit(2, 9, 10, 45, 46), visit(3, 47, 47, 49, 49)
    found = timeline(passed(*visits), 0, DIAMOND)
    assert [period.node for period in found.periods if period.kind is Kind.RUN] == ["0.0", "2.0", "3.0"]
    assert [period.node for period in found.beside] == ["1.0"]
    assert found.summary == "Most of the time it ran in stage 2 (35 of 51 ms)."


def test_times_of_another_hosts_clock_are_placed_in_order():
    far = 10**6
    found = timeline(passed(visit(0, far, far + 2, far + 12, far + 13), visit(1, 14, 20, 30, 31)), 0, {(0, 1)})
    assert not found.placed
    assert parts(found)["run 0.0"] == 10
    assert sum(period.ns for period in found.periods) == found.total_ns


@given(st.lists(st.integers(min_value=0, max_value=40 * MS), min_size=20, max_size=20), st.booleans())
def test_the_periods_follow_each_other_and_add_up(numbers, ordered):
    times = sorted(numbers) if ordered else numbers
    visits = tuple(Visit(stage, 0, *times[4 * stage : 4 * stage + 4], 0, 0) for stage in range(4))
    one = SlowRequest(0, times[16], times[17], max(times[16:18]), 45 * MS, 46 * MS, visits)
    found = timeline(one, 0, DIAMOND)
    now = 0
    for period in found.periods:
        assert (period.start_ns, period.ns > 0) == (now, True)
        now += period.ns
    assert now == found.total_ns


def test_a_failed_request_is_listed_as_such():
    failed = SlowRequest(0, 0, 0, 0, 0, 51 * MS, reason="TIMEOUT", message="its time ran out")
    found = timeline(failed, S, set())
    assert (found.reason, found.at_ms, parts(found)) == ("TIMEOUT", 1000, {"failed": 51})
    assert found.summary == "It failed after 51 ms: its time ran out"
