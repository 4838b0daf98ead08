"""Candidates for running a model: the model of queues, which are run, and which is picked."""

from __future__ import annotations

import heapq
import math
import random

import msgspec.structs
import pytest

from onnxsplit.plan import HostCosts
from onnxsplit.planning.candidates import (
    Candidate,
    Choice,
    Figures,
    RequestCost,
    Wishes,
    bottleneck_of,
    front,
    keeps_wishes,
    pick,
    predict,
    some_counts,
    some_threads,
    to_run,
    waiting_ns,
)

HOST = HostCosts(source="measured", node_ns=100, caller_ns=200, hop_ns=50, tensor_ns=3, bytes_per_s=1e9)
MS = 1_000_000


def choice(kind="session", nodes=1, limit=100.0, p99_ms=10.0, *, rate=None, measured=True, **more) -> Choice:
    replicas = (nodes,) if kind in ("session", "replicas") else (1,) * nodes
    figures = Figures(
        limit_per_s=limit,
        rate_per_s=0.7 * limit if rate is None else rate,
        p50_ns=MS,
        p99_ns=None if p99_ms is None else round(p99_ms * MS),
    )
    given = {"memory_bytes": 1, "total_bytes": nodes, "predicted": figures, "measured": figures if measured else None}
    return Choice(candidate=Candidate(kind=kind, replicas=replicas, threads=1), **{**given, **more})


def simulated_waits(servers: int, per_s: float, run_ns: int, requests: int = 200_000) -> list[float]:
    """Times that requests wait, which come at random and whose runs all take the same time."""
    source, now, free = random.Random(1), 0.0, [0.0] * servers
    waits = []
    for _ in range(requests):
        now += source.expovariate(per_s) * 1e9
        begins = max(now, heapq.heappop(free))
        heapq.heappush(free, begins + run_ns)
        waits.append(begins - now)
    return sorted(waits)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.8), (2, 0.7), (4, 0.85)])
def test_the_tail_of_the_waits_is_near_that_of_a_simulated_queue(servers, load):
    run_ns = 10 * MS
    per_s = load * servers / (run_ns / 1e9)
    simulated = simulated_waits(servers, per_s, run_ns)
    expected = run_ns + simulated[int(0.99 * len(simulated))]
    assert run_ns + waiting_ns(0.01, run_ns // servers, servers, per_s) == pytest.approx(expected, rel=0.2)


def test_nobody_waits_at_a_rate_of_none_and_all_wait_forever_at_the_limit():
    assert waiting_ns(0.01, 10 * MS, 1, 0.0) == 0
    assert math.isinf(waiting_ns(0.01, 10 * MS, 1, 100.0))


def test_a_session_has_no_overhead_and_nodes_have_theirs():
    cost = RequestCost(runs_ns=(1000,), host=HOST, cores=2)
    assert bottleneck_of(Candidate(kind="session", replicas=(1,), threads=1), cost) == (1000, 1000)
    assert bottleneck_of(Candidate(kind="replicas", replicas=(1,), threads=1), cost) == (1100, 1100 + 100 + 200)


def test_replicas_are_as_many_times_faster_until_the_cores_are_used_up():
    cost = RequestCost(runs_ns=(1000,), host=HOST, cores=4)
    times = [bottleneck_of(Candidate(kind="replicas", replicas=(n,), threads=1), cost)[0] for n in (1, 2, 4)]
    assert times == [1100, 550, round((1100 + 200) / 4)]


def test_a_batch_shares_the_overhead_of_its_run():
    one = Candidate(kind="replicas", replicas=(1,), threads=1)
    joined = msgspec.structs.replace(one, max_batch=4)
    cost = RequestCost(runs_ns=(4000,), host=HOST, cores=8)
    assert bottleneck_of(joined, cost)[0] == (4000 + 100) // 4


def test_the_figures_are_those_of_the_rate_that_is_asked_for():
    assert predict(10 * MS, 10 * MS, 1, Wishes()).rate_per_s == pytest.approx(70)
    assert predict(10 * MS, 10 * MS, 1, Wishes(rate_per_s=50)).rate_per_s == 50
    assert predict(10 * MS, 10 * MS, 1, Wishes(rate_per_s=150)).p99_ns is None
    found = predict(10 * MS, 10 * MS, 1, Wishes(p99_ns=30 * MS))
    assert 0 < found.rate_per_s < 100
    assert found.p99_ns == pytest.approx(30 * MS, rel=1e-3)
    assert predict(10 * MS, 10 * MS, 1, Wishes(p99_ns=9 * MS)).rate_per_s == 0


def test_the_best_of_each_kind_is_run_before_a_second_one_of_a_kind():
    choices = [choice(limit=1), choice("replicas", 2, limit=9), choice("replicas", 3, limit=8), choice("stages", 2)]
    chosen = to_run(choices, Wishes(), 3)
    assert [one.candidate.kind for one in chosen] == ["stages", "replicas", "session"]
    assert len(to_run(choices, Wishes(), 9)) == 4
    assert to_run([choice(left_out="no memory"), choice(not_run="far")], Wishes(), 3) == []


def test_the_fastest_is_picked_and_of_those_alike_the_simplest():
    session, replicas, stages = choice(limit=60), choice("replicas", 2, limit=100), choice("stages", 3, limit=104)
    assert pick([session, replicas, stages], Wishes()) is replicas
    assert pick([session, stages], Wishes()) is stages


def test_at_a_rate_the_shortest_p99_is_picked_of_those_that_keep_it():
    slow = choice(limit=90, p99_ms=1, rate=100)
    late = choice("replicas", 2, limit=300, p99_ms=30, rate=100)
    soon = choice("stages", 2, limit=150, p99_ms=12, rate=100)
    assert pick([slow, late, soon], Wishes(rate_per_s=100)) is soon
    assert not keeps_wishes(slow, Wishes(rate_per_s=100))
    assert keeps_wishes(late, Wishes(rate_per_s=100, p99_ns=30 * MS))


def test_without_a_rate_the_highest_that_keeps_the_p99_is_picked():
    wishes = Wishes(p99_ns=20 * MS)
    fast_but_late = choice("replicas", 2, limit=200, rate=0.0, p99_ms=50)
    steady = choice(limit=100, rate=80.0, p99_ms=19)
    assert pick([fast_but_late, steady], wishes) is steady


def test_what_was_measured_goes_before_what_was_predicted_and_the_nearest_is_picked_where_none_keeps_the_wishes():
    predicted = choice("stages", 2, limit=500, measured=False)
    assert pick([choice(limit=10), predicted], Wishes()).candidate.kind == "session"
    wishes = Wishes(rate_per_s=1000)
    near = choice("replicas", 2, limit=400, p99_ms=None, rate=1000)
    assert pick([choice(limit=100, p99_ms=None, rate=1000), near], wishes) is near
    assert pick([choice(left_out="no memory")], Wishes()) is None


def test_the_front_has_what_nothing_beats_in_both():
    slow, best, beaten = choice(limit=10, p99_ms=1), choice("replicas", 2, limit=50), choice("stages", 2, limit=40)
    assert front([slow, best, beaten, choice(limit=99, p99_ms=None)], Wishes()) == [slow, best]


def test_predictions_do_not_hide_candidates_that_were_run_from_the_front():
    run, promised = choice("stages", 2, limit=73, p99_ms=110), choice("replicas", 2, limit=265, measured=False)
    assert front([run, promised], Wishes()) == [run]


def test_without_wishes_the_highest_limit_is_picked_though_its_p99_was_not_found():
    fast, slow = choice(limit=94.5, p99_ms=None), choice("stages", 2, limit=73, p99_ms=110)
    assert pick([fast, slow], Wishes()) is fast


def test_numbers_to_try():
    assert some_counts(2) == (1, 2)
    assert some_counts(10) == (1, 2, 3, 4, 6, 8, 10)
    assert some_threads(1, 6) == (1, 2, 4, 6)
    assert some_threads(4, 2) == (1,)


def test_names():
    assert Candidate(kind="session", replicas=(1,), threads=2).name == "session x 2"
    assert Candidate(kind="replicas", replicas=(2,), threads=1, max_batch=4).name == "2 replicas x 1, batch 4"
    assert Candidate(kind="hybrid", replicas=(1, 2), threads=1, devices=("a", "b", "b2")).name == (
        "2 stages 1+2 x 1, a+b+b2"
    )
