"""Intervals of times that are known from a few samples."""

from __future__ import annotations

import random

import pytest

from onnxsplit.planning.sampling import spread
from onnxsplit.timed import low_quartile

QUIET_NS = 1_000_000


def a_sample(chance: random.Random) -> int:
    """A time on a machine on which one sample in ten is disturbed, by its own length in the mean."""
    noise = abs(chance.gauss(0, 0.05)) + (chance.expovariate(1) if chance.random() < 0.1 else 0.0)
    return round(QUIET_NS * (1 + noise))


@pytest.mark.parametrize("count", [3, 5, 10, 11])
def test_nine_intervals_in_ten_hold_the_time_that_many_samples_show(count):
    chance = random.Random(count)
    true_ns = low_quartile([a_sample(chance) for _ in range(20_000)])
    held = 0
    for _ in range(2_000):
        samples = [a_sample(chance) for _ in range(count)]
        held += abs(true_ns - low_quartile(samples)) <= spread(samples) * low_quartile(samples)
    assert held >= 0.9 * 2_000


def test_one_disturbed_sample_does_not_widen_the_interval():
    quiet = [100_000 + 300 * number for number in range(10)]
    assert spread([*quiet[:9], 900_000]) == spread(quiet)


def test_samples_on_two_levels_are_unsure():
    assert spread([100_000] * 3 + [140_000] * 7) == pytest.approx(0.4)
