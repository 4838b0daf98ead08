"""Windows of a pipeline's figures, the baseline, and the slowness of devices."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from drifting import SECOND, node_stats, window
from hypothesis import given
from hypothesis import strategies as st

from runtime.coordinator.counters import OTHER_COSTS
from runtime.recut.drift import Baseline, noise_of
from runtime.recut.learning import Learning
from runtime.recut.window import DriftSettings, Look, NodeWindow, Window, window_between

DEVICES = {(0, 0): "h0", (1, 0): "h1"}
SETTINGS = DriftSettings()


def look(at_s: float, *nodes, answered: int = 0) -> Look:
    return Look(now_ns=int(at_s * SECOND), answered=answered, nodes=nodes)


def slowness(baseline: Window, now: Window, noise: float = 0.0) -> dict[str, float]:
    drift = Baseline.of([baseline]).compare(now, 10)
    assert drift is not None
    return {device: round(ratio, 3) for device, ratio in drift.ratios(noise).items()}


# Windows


def test_a_window_is_what_happened_between_two_looks():
    before = look(1, node_stats(0, 0, {896: (5, 50)}), node_stats(1, 0, {}), answered=5)
    after = look(4, node_stats(0, 0, {896: (8, 90), 1024: (1, 7)}), node_stats(1, 0, {896: (3, 3)}), answered=9)
    found = window_between(before, after, DEVICES, full=0.5)
    assert (found.seconds, found.answered, found.full_s, found.trouble) == (3.0, 4, 1.5, "")
    assert found.nodes[0, 0] == NodeWindow(device="h0", runs={896: (3, 40), 1024: (1, 7)})
    assert found.nodes[1, 0] == NodeWindow(device="h1", runs={896: (3, 3)})


@pytest.mark.parametrize(
    ("before", "after", "trouble"),
    [
        ({}, {"restarts": 1}, "node 0.0 was lost"),
        ({}, {"failures": 1}, "node 0.0 could not execute a request"),
        ({"state": "loading"}, {}, "node 0.0 was not ready: loading"),
        ({}, {"state": "circuit open"}, "node 0.0 is not ready: circuit open"),
    ],
)
def test_figures_of_a_node_that_was_disturbed_do_not_count(before, after, trouble):
    figures = {896: (50, 50)}
    found = window_between(
        look(0, node_stats(0, 0, {}, **before), node_stats(1, 0, {})),
        look(9, node_stats(0, 0, figures, **after), node_stats(1, 0, figures)),
        DEVICES,
        full=1.0,
    )
    assert found.trouble == trouble
    assert found.fewest() == (0, 0)
    assert not found.is_enough(SETTINGS)


def test_a_node_that_is_new_does_not_count():
    found = window_between(
        look(0, node_stats(0, 0, {})), look(1, *(node_stats(s, 0, {}) for s in (0, 1))), DEVICES, full=1
    )
    assert found.trouble == "node 1.0 is new"


def test_windows_add_up_until_they_are_enough():
    one = window(50, 60, requests=6, seconds=2.0)
    assert not one.is_enough(SETTINGS)
    both = one + one
    assert both.is_enough(SETTINGS)
    assert (both.seconds, both.answered, both.nodes[0, 0].runs) == (4.0, 12, {1000: (12, 600_000_000)})
    assert (one + window(50, requests=6)).trouble == "node 1.0 is new or gone"
    assert not (one + window(50, [60, 60])).is_enough(SETTINGS), "its replica is on another device now"


def test_the_slowest_stage_is_that_of_the_longest_time_for_each_node():
    assert window(50, [70, 70], 40).bottleneck() == (0, 50e6)
    assert window(50, 70, 40).bottleneck() == (1, 70e6)


# Slowness


def test_a_device_that_takes_twice_as_long_is_found():
    assert slowness(window(50, 60, 70), window(50, 120, 70)) == {"h0": 1, "h1": 2, "h2": 1}
    assert slowness(window(50, 60), window(100, 60)) == {"h0": 2, "h1": 1}


@given(factor=st.floats(0.2, 5.0), stages=st.integers(2, 6))
def test_a_machine_that_is_slower_as_a_whole_has_no_slow_device(factor, stages):
    times = [50.0 + 7 * stage for stage in range(stages)]
    found = slowness(window(*times), window(*(factor * time for time in times)))
    assert all(ratio == pytest.approx(1, abs=0.002) for ratio in found.values())


def test_replicas_count_for_their_devices_and_a_device_is_judged_over_all_its_stages():
    found = slowness(window(50, [60, 60], 70), window(50, [60, 180], 70))
    assert found == {"h0": 1, "h1.0": 1, "h1.1": 3, "h2": 1}

    def shared(*times: float) -> Window:
        found = window(*times)
        nodes = {k: NodeWindow(device="a" if k[0] < 2 else f"h{k[0]}", runs=n.runs) for k, n in found.nodes.items()}
        return Window(seconds=3, answered=20, full_s=3, nodes=nodes)

    assert slowness(shared(50, 150, 60, 70), shared(100, 150, 60, 70))["a"] == 1.25


def test_longer_requests_are_not_a_slow_device():
    usual = window(10, 10, 10) + window(30, 90, 40, cost=3000)
    assert slowness(usual, window(30, 90, 40, cost=3000)) == {"h0": 1, "h1": 1, "h2": 1}
    assert slowness(usual, window(30, 180, 40, cost=3000) + window(10, 20, 10)) == {"h0": 1, "h1": 2, "h2": 1}


def test_costs_that_the_baseline_lacks_are_not_compared():
    usual = Baseline.of([window(10, 10)])
    assert usual.compare(window(90, 10, cost=2000), 10) is None
    assert Baseline.of([window(10, 10, cost=OTHER_COSTS)]).compare(window(10, 10, cost=OTHER_COSTS), 10) is None


def test_new_costs_are_learned_at_the_present_speed():
    learning = Learning(SETTINGS)
    for _ in range(4):
        learning.compare(window(10, 10, 10))
    learning.compare(window(10, 20, 10))
    assert learning.compare(window(30, 80, 40, cost=3000)) is None
    assert "sizes that were not seen before" in learning.why
    drift = learning.compare(window(30, 80, 40, cost=3000))
    assert drift is not None
    assert drift.ratios(0.0) == pytest.approx({"h0": 1, "h1": 2, "h2": 1})


def test_a_ratio_within_the_noise_is_one():
    assert slowness(window(50, 60, 70), window(51, 62.4, 90), noise=0.1) == {
        "h0": 1,
        "h1": 1,
        "h2": round(90 / 70 / math.sqrt(1.02 * 1.04), 3),
    }


# The baseline


def learned(*windows: Window, made=None) -> Learning:
    learning = Learning(SETTINGS, made)
    for each in windows:
        learning.compare(each)
    return learning


def usual_ms(learning: Learning, stage: int) -> float:
    assert learning.baseline is not None
    requests, ran_ns = learning.baseline.runs[stage, f"h{stage}"][1000]
    return ran_ns / requests / 1e6


def test_the_first_window_is_warm_up_and_three_more_make_the_baseline():
    warm_up, usual = window(900, 900), window(50, 60)
    assert learned(warm_up, usual, usual).baseline is None
    assert usual_ms(learned(warm_up, usual, usual, usual), 1) == 60


def test_windows_without_a_drift_refine_the_baseline_up_to_their_number():
    def ratio(later: int) -> float:
        learning = learned(*[window(50, 60, 70)] * 4, *[window(50, 61, 70)] * later)
        return usual_ms(learning, 1) / usual_ms(learning, 0)

    assert ratio(7) == pytest.approx((3 * 60 + 7 * 61) / 10 / 50, rel=1e-4)
    assert ratio(50) == ratio(7)


def test_a_drift_is_never_learned():
    assert usual_ms(learned(*[window(50, 60, 70)] * 4, *[window(50, 120, 70)] * 100), 1) == 60


def test_a_machine_that_is_slower_as_a_whole_does_not_change_the_baseline():
    assert usual_ms(learned(*[window(50, 60, 70)] * 4, *[window(100, 120, 140)] * 100), 1) == pytest.approx(60)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_baseline_from_a_busy_time_is_taken_again_when_the_device_is_faster(stages):
    busy, usual = window(100, *[60] * (stages - 1)), window(50, *[60] * (stages - 1))
    assert usual_ms(learned(*[busy] * 4, usual, usual), 0) == 100, "three windows in a row are needed"
    assert usual_ms(learned(*[busy] * 4, *[usual] * 3), 0) == 50


def test_a_device_that_recovers_after_a_swap_is_a_drift():
    slow, usual = window(50, 60, 70), window(25, 60, 70)
    learning = learned(*[slow] * 4, *[usual] * 50, made={"h0": 0.5})
    assert usual_ms(learning, 0) == 50
    drift = learning.compare(usual)
    assert drift is not None
    assert drift.ratios(0.0) == pytest.approx({"h0": 0.5, "h1": 1, "h2": 1})


def test_one_device_that_does_not_follow_a_faster_machine_is_slow():
    learning = learned(*[window(50, 60, 70)] * 4, *[window(50, 30, 35)] * 50)
    assert usual_ms(learning, 1) == 60
    drift = learning.compare(window(50, 30, 35))
    assert drift is not None
    assert drift.ratios(0.0) == pytest.approx({"h0": 2, "h1": 1, "h2": 1})


# Noise


@given(deviation=st.floats(0.03, 0.2), devices=st.integers(2, 6), seed=st.integers(0, 100))
def test_the_noise_is_twice_the_deviation_even_where_the_speed_changes(deviation, devices, seed):
    source = random.Random(seed)
    names = [f"h{n}" for n in range(devices)]
    windows = [
        {name: math.exp(source.gauss(0, deviation)) * (2 if number >= 200 and name == "h0" else 1) for name in names}
        for number in range(400)
    ]
    assert noise_of(windows, SETTINGS) == pytest.approx(2 * deviation, rel=0.3)


def test_what_all_devices_have_in_common_is_not_noise():
    windows = [{"h0": factor, "h1": factor, "h2": factor} for factor in (1.0, 2.0, 0.5, 3.0)]
    assert noise_of(windows, SETTINGS) == SETTINGS.least_noise
    assert all(before != after for before, after in pairwise(windows))
