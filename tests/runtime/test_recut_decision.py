"""Re-cuts happen where they gain something, and speeds that change back and forth cause few of them."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest
from drifting import IN_FLIGHT, LOAD_S, PLAN_S, DriftingPipeline, alternates, falls, steady, window
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.balance.policies import UNIT_COST
from runtime.recut.decision import DecisionPhase, Rebalancing, RecutSettings, WantPlan
from runtime.recut.drift import Baseline
from runtime.recut.gain import NewPlan, contradiction, possible_gain, slowest_ns, verdict
from runtime.recut.patience import Planning, Stays
from runtime.recut.window import DriftSettings

SECOND = 1_000_000_000
SETTINGS = DriftSettings()
TEN_MINUTES = 600.0

stages = st.integers(2, 6)
seeds = st.integers(0, 1000)


def times_of(recuts) -> list[float]:
    return [at for at, _ in recuts]


# Drifts that a new cut mends


@settings(max_examples=20, derandomize=True)
@given(seed=seeds, stage_s=st.floats(1 / 12, 1 / 6), slow=st.integers(0, 2), at_s=st.floats(60, 90))
def test_a_device_that_falls_to_half_is_found_within_15_s(seed, stage_s, slow, at_s):
    speeds = [steady] * 3
    speeds[slow] = falls(at_s)
    run = DriftingPipeline(speeds, stage_s=stage_s, seed=seed).go(at_s + 40)
    ((decided_s, recut),) = run.recuts
    assert decided_s - at_s <= 15.0
    assert recut.candidate.speeds[f"h{slow}"] == pytest.approx(0.5, rel=0.1)
    assert len(run.wanted) == 1
    assert [kept for _, kept in run.proofs] == [True]


def test_nearly_all_speeds_are_found_within_5_percent():
    """A plan is wanted after two windows, thus after 20 to 70 requests, whose mean has an error of its own."""
    runs = [DriftingPipeline([falls(60 + seed / 7), steady, steady], seed=seed).go(80 + seed / 7) for seed in range(40)]
    found = [run.wanted[0][1].speeds["h0"] for run in runs]
    assert sum(speed == pytest.approx(0.5, rel=0.05) for speed in found) >= 38


def test_a_new_cut_answers_as_many_as_predicted():
    run = DriftingPipeline([falls(60), steady, steady]).go(150)
    drifted = fmean(answered for at, answered in run.rates if 62 < at < 71)
    after = fmean(answered for at, answered in run.rates if at > 100)
    assert run.recuts[0][1].gain == pytest.approx(1.67, rel=0.1)
    assert after / drifted == pytest.approx(1.67, rel=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_the_old_cut_comes_back_when_the_device_does(count):
    run = DriftingPipeline([falls(60, 0.4, until_s=900), *[steady] * (count - 1)], noise=0.05).go(1000)
    assert run.shares[0] == pytest.approx(1 / count, rel=0.05)
    assert len(run.recuts) == 2, "one for each change"
    assert [kept for _, kept in run.proofs] == [True, True]


def test_a_pipeline_that_is_not_full_is_cut_again_only_where_its_slowest_stage_is_busy():
    busy = DriftingPipeline([falls(60), steady, steady], arrival_per_s=5.0).go(120)
    assert len(busy.recuts) == 1
    idle = DriftingPipeline([falls(60), steady, steady], arrival_per_s=2.0).go(200)
    assert idle.recuts == []
    assert any("no request waits long" in why for why in idle.why)


# Speeds that change, noise, and other things that are no drift


@settings(max_examples=15, derandomize=True)
@given(
    each_s=st.sampled_from([10.0, 20.0, 40.0, 60.0]), count=stages, seed=seeds, speed=st.sampled_from([0.3, 0.5, 0.7])
)
def test_speeds_that_alternate_cause_at_most_one_new_cut(each_s, count, seed, speed):
    run = DriftingPipeline([alternates(each_s, speed), *[steady] * (count - 1)], seed=seed).go(TEN_MINUTES)
    assert len(run.recuts) <= 1


def test_speeds_that_alternate_for_hours_cause_few_new_cuts():
    run = DriftingPipeline([alternates(60), steady, steady], noise=0.05, stage_s=0.16).go(2 * 3600)
    assert len(run.recuts) <= 1


@settings(max_examples=12, derandomize=True)
@given(noise=st.sampled_from([0.1, 0.2]), count=stages, seed=seeds, is_common=st.booleans())
def test_noise_causes_at_most_one_new_cut(noise, count, seed, is_common):
    """The noise is that of each request, or also that of each stage for three seconds at a time."""
    run = DriftingPipeline([steady] * count, noise=noise, window_noise=noise * is_common, seed=seed).go(TEN_MINUTES)
    assert len(run.recuts) <= 1
    assert len(run.wanted) <= 10


@settings(max_examples=8, derandomize=True)
@given(count=stages, seed=seeds, speed=st.sampled_from([0.5, 2.0]), at_s=st.floats(5, 60))
def test_a_machine_that_is_slower_or_faster_as_a_whole_is_not_cut_again(count, seed, speed, at_s):
    assert DriftingPipeline([falls(at_s, speed)] * count, seed=seed).go(TEN_MINUTES).recuts == []


@settings(max_examples=8, derandomize=True)
@given(count=stages, seed=seeds, data=st.data())
def test_longer_requests_are_not_a_drift(count, seed, data):
    """Times grow with the length by powers that differ by stage."""
    growth = data.draw(st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=count, max_size=count))

    def cost(source: random.Random, now_s: float) -> int:
        return int(UNIT_COST * source.uniform(*((0.2, 0.6) if now_s < 60 else (0.4, 1.2))))

    run = DriftingPipeline([steady] * count, seed=seed, costs=cost, growth=growth).go(TEN_MINUTES)
    assert len(run.recuts) <= 1


@settings(max_examples=8, derandomize=True)
@given(count=stages, seed=seeds, arrival_per_s=st.floats(0.02, 1.0))
def test_low_traffic_causes_no_new_cut(count, seed, arrival_per_s):
    run = DriftingPipeline([falls(60), *[steady] * (count - 1)], seed=seed, arrival_per_s=arrival_per_s).go(TEN_MINUTES)
    assert run.recuts == []


@settings(max_examples=8, derandomize=True)
@given(count=stages, seed=seeds, lost=st.lists(st.floats(0, TEN_MINUTES), max_size=30))
def test_restarts_cause_no_new_cut(count, seed, lost):
    restarts = sorted((at, number % count) for number, at in enumerate(lost))
    assert DriftingPipeline([steady] * count, seed=seed, restarts=restarts).go(TEN_MINUTES).recuts == []


def test_failed_requests_cause_no_new_cut():
    failures = [(at / 2, at % 3) for at in range(1200)]
    run = DriftingPipeline([falls(60), steady, steady], failures=failures).go(TEN_MINUTES)
    assert run.recuts == []
    assert "could not execute a request" in run.rule.why


@pytest.mark.parametrize("lasts_s", [1.0, 3.0, LOAD_S])
def test_a_drift_that_is_shorter_than_loading_causes_no_new_cut(lasts_s):
    for seed in range(20):
        speeds = [falls(60 + seed / 7, until_s=60 + seed / 7 + lasts_s), steady, steady]
        assert DriftingPipeline(speeds, seed=seed).go(200).recuts == []


def test_a_pipeline_that_starts_on_a_busy_host_learns_its_usual_times_later():
    run = DriftingPipeline([falls(0, until_s=30), steady, steady]).go(100)
    assert run.recuts == run.wanted == []
    assert run.rule.slowness == {"h0": 1, "h1": 1, "h2": 1}
    later = DriftingPipeline([lambda now_s: 0.5 if now_s < 30 or now_s > 200 else 1.0, steady, steady]).go(250)
    assert later.recuts[0][1].candidate.speeds["h0"] == pytest.approx(0.5, rel=0.05)


def test_a_stage_that_lacks_a_replica_is_not_cut_again():
    rule = steady_rule()
    lost = replace(window(100, 60, 60), absent="node 0.1 is not ready: circuit open")
    for number in range(100):
        rule.look(lost, (100 + 3 * number) * SECOND)
    assert rule.why == "node 0.1 is not ready: circuit open"


# What becomes of new plans


def test_the_speeds_of_a_new_plan_are_told_once_its_usual_times_are_known():
    run = DriftingPipeline([falls(60), steady, steady]).go(150)
    swapped_s = next(at for at, drift in run.drift if at > 60 and drift == {})
    assert swapped_s > run.recuts[0][0]
    assert run.drift[-1][1] == {"h0": 1, "h1": 1, "h2": 1}
    assert max(run.drift[number][1].get("h0", 0) for number in range(len(run.drift))) > 1.8


def test_a_plan_that_turns_out_worse_is_rolled_back_and_doubles_the_cooldown():
    run = DriftingPipeline([falls(60), steady, steady], worsens=2.5).go(2100)
    assert [kept for _, kept in run.proofs] == [False, False, False]
    assert run.shares == [1 / 3] * 3
    first, second, third = times_of(run.recuts)
    assert first < 75
    assert run.proofs[0][0] + 600 <= second <= run.proofs[0][0] + 620
    assert run.proofs[1][0] + 1200 <= third <= run.proofs[1][0] + 1220


def test_a_plan_that_does_not_load_doubles_the_cooldown():
    run = DriftingPipeline([falls(60), steady, steady], loads=False).go(1400)
    first, second = times_of(run.recuts)
    assert first + LOAD_S + 600 <= second <= first + LOAD_S + 620


def test_the_cooldown_is_five_minutes_again_after_a_plan_that_was_kept():
    rule = steady_rule()
    rule.failed(0)
    rule.failed(0)
    assert rule.cooldown_s == 1200
    rule.proved(kept=True, now_ns=0)
    assert rule.cooldown_s == 300


def test_advice_is_given_and_nothing_is_done():
    run = DriftingPipeline([falls(60), steady, steady], settings=RecutSettings(acts=False)).go(500)
    assert run.recuts == []
    (first_s, first), (second_s, _) = run.advice
    assert first.text.startswith("device h0 runs at 0.")
    assert "a new cut would answer 1." in first.text
    assert second_s - first_s >= 300


def test_a_plan_without_a_gain_is_not_made_again_for_the_same_speeds():
    rule = steady_rule()
    wanted = 0
    for number in range(400):
        now_ns = (100 + 3 * number) * SECOND
        if isinstance(rule.look(window(100, 60, 60, requests=30), now_ns), WantPlan):
            wanted += 1
            rule.planned(None, now_ns)
    assert wanted == 1
    assert rule.why == "device h0 runs at 0.50 of its speed; no cut is better"


def test_a_replica_that_had_no_requests_prevents_no_plan():
    rule = Rebalancing(RecutSettings())

    def look(number: int, ms: float):
        now = window(ms, [60, 60], requests=30)
        nodes = {**now.nodes, (1, 0): replace(now.nodes[1, 0], runs={})}
        return rule.look(replace(now, nodes=nodes), 3 * number * SECOND)

    actions = [look(number, 50) for number in range(8)] + [look(number, 100) for number in range(8, 12)]
    (want,) = (action for action in actions if isinstance(action, WantPlan))
    assert want.stage_times_ns == (50_000_000, 60_000_000)
    assert want.speeds == {"h0": pytest.approx(0.5), "h1.1": 1}


def test_the_stage_times_that_a_plan_is_wanted_for_are_those_before_the_drift():
    run = DriftingPipeline([falls(60), steady, steady]).go(100)
    assert [time / 1e6 for time in run.wanted[0][1].stage_times_ns] == pytest.approx([80, 80, 80], rel=0.03)
    assert run.recuts[0][0] - run.wanted[0][0] >= PLAN_S


def steady_rule() -> Rebalancing:
    """A rule with a baseline of 50, 60 and 60 ms."""
    rule = Rebalancing(RecutSettings())
    for number in range(5):
        rule.look(window(50, 60, 60), 3 * number * SECOND)
    assert rule.phase is DecisionPhase.STEADY
    return rule


# Gains


def test_the_gain_of_a_plan_follows_the_speeds():
    old, new = [[("a", 60)], [("b", 60)]], [[("a", 40)], [("b", 80)]]
    plan = NewPlan(plan="new", speeds={"a": 0.5, "b": 1.0}, old_ns=120, new_ns=80, old=old, new=new)
    assert plan.gain_at({"a": 0.5}) == pytest.approx(1.5)
    assert plan.gain_at({"a": 0.25}) == pytest.approx(1.5)
    assert plan.gain_at({}) == pytest.approx(0.75)
    assert replace(plan, old=(), new=()).gain_at({}) == 1.5


def test_a_replica_that_is_slow_is_mended_by_the_balance_policy():
    assert slowest_ns([[("a", 60), ("b", 60), ("c", 60)], [("d", 20)]], {"a": 0.5}) == pytest.approx(24)
    usual, now = window([60] * 4, 15), window([120, 60, 60, 60], 15)
    drift = Baseline.of([usual]).compare(now, 10)
    assert drift is not None
    assert possible_gain(now, drift, drift.ratios(0.0)) < 1.15


def test_figures_that_the_times_do_not_explain_prevent_a_new_cut():
    usual = window(150, 60, 60)  # 20 requests in 3 s: 150 ms each
    assert contradiction(usual) == ""
    assert "do not explain the rate" in contradiction(replace(usual, answered=12))
    assert "do not explain the rate" in contradiction(replace(usual, answered=25))
    assert contradiction(replace(usual, answered=12, full_s=0.0)) == ""
    assert "is busy 40 % of the time" in contradiction(replace(usual, answered=8, full_s=0.0))


# Proof


def test_a_new_plan_is_judged_by_the_rates_if_the_pipeline_was_full():
    before = window(100, 50)
    assert verdict(before, replace(window(70, 70), answered=26), SETTINGS).gain == pytest.approx(1.3)
    worse = verdict(before, replace(window(70, 70), answered=19), SETTINGS)
    assert (worse.kept, worse.gain) == (False, pytest.approx(0.95))
    assert verdict(before, replace(window(70, 70), answered=20), SETTINGS).kept


def test_a_new_plan_is_judged_by_its_slowest_stage_otherwise():
    before, after = replace(window(100, 50), full_s=0.0), window(80, 60)
    assert verdict(before, after, SETTINGS).gain == 1.25
    assert verdict(before, window([160, 160], 60), SETTINGS).gain == 1.25
    assert not verdict(before, window(104, 60), SETTINGS).kept


def test_requests_of_other_sizes_do_not_spoil_the_proof():
    before = window(100, 50) + window(300, 100, cost=3000)
    assert verdict(before, window(240, 120, cost=3000), SETTINGS).gain == 1.25


def test_figures_that_prove_nothing_keep_the_plan():
    few = verdict(window(100, 50), window(300, 300, requests=3), SETTINGS)
    assert (few.kept, few.gain) == (True, None)
    assert verdict(window(100, 50), window(300, 300, cost=3000), SETTINGS).gain is None


# Patience


def test_the_next_drift_must_last_twice_as_long_as_those_that_ended():
    stays = Stays()

    def note(at_s: int, ratio: float) -> int:
        stays.note((at_s - 3) * SECOND, at_s * SECOND, {"a": ratio}, 0.1, is_sighted=ratio > 1)
        return stays.needed_ns() // SECOND

    assert [note(at, 1.0) for at in range(3, 60, 3)][-1] == 0
    assert [note(at, 2.0) for at in range(60, 81, 3)][-1] == 0
    assert note(81, 1.0) == 2 * 21
    assert note(84, 2.0) == 2 * 21
    assert note(84 + 700, 1.0) == 2 * 21, "a drift of more than ten minutes does not count"
    assert note(81 + 1900, 1.0) == 0, "after half an hour it is forgotten"


@pytest.mark.parametrize(("is_useful", "least_s"), [(True, 60), (False, 10)])
def test_other_speeds_want_another_plan_sooner_if_the_last_one_is_of_no_use(is_useful, least_s):
    planning = Planning(every_s=60, again_s=10, share=0.01, credit_s=10)

    def wants(second: int, speed: float) -> bool:
        return planning.wants({"a": speed}, 0.1, second * SECOND, is_useful=is_useful)

    assert wants(0, 0.5)
    planning.begin({"a": 0.5}, 0)
    assert not wants(100, 0.3), "a plan is being made"
    planning.end(None, SECOND)
    assert not wants(100, 0.52), "the speeds are those of the last plan"
    assert not wants(least_s - 1, 0.3)
    assert wants(least_s, 0.3)


def test_planning_takes_one_percent_of_the_time_in_the_long_run():
    planning = Planning(every_s=60, again_s=10, share=0.01, credit_s=10)
    took_s = begun = 0
    for second in range(36_000):
        speeds = {"a": 0.5 + 0.3 * (second // 20 % 2)}
        if planning.wants(speeds, 0.1, second * SECOND, is_useful=False):
            planning.begin(speeds, second * SECOND)
            planning.end(None, (second + 4) * SECOND)
            took_s, begun = took_s + 4, begun + 1
    assert begun > 10
    assert took_s <= 0.01 * 36_000 + 10 + 4


def test_the_simulated_pipeline_answers_as_many_as_its_slowest_stage_allows():
    run = DriftingPipeline([steady] * 3, noise=0.0).go(100)
    assert sum(answered for _, answered in run.rates) == pytest.approx(100 / 0.08, abs=3 * IN_FLIGHT)


def test_a_device_that_goes_back_right_after_the_change_gets_its_old_cut_back():
    """The usual times of the new plan are learned when the device is fast again, which is a drift nevertheless."""
    run = DriftingPipeline([falls(60), steady, steady], noise=0.05)
    while not run.recuts:
        run.go(run.now_s + 1)
    run.speeds[0] = steady
    run.go(run.now_s + 900)
    assert len(run.recuts) == 2
    _, again = run.recuts[1]
    assert 1.7 < again.candidate.speeds["h0"] < 2.3
