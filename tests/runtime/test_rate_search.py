"""The search for the highest rate that keeps a p99: it comes near, although the p99 of every slice is rough."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from runtime.load.rate_search import RateSearch

ASKED = 10_000_000


def p99_of_queue(share, alone=0.4):
    """The p99 of a queue over the one that is asked for: it grows slowly at first, and without end near the limit."""
    return alone + 0.15 * share / max(1e-9, 1 - share)


def searched(p99_at, slices, *, noise=0.0, seed=0):
    search, chance = RateSearch(ASKED), random.Random(seed)
    for _ in range(slices):
        share = search.next_share
        assert 0 < share < 1
        search.note(share, round(ASKED * p99_at(share) * math.exp(chance.gauss(0, noise))), keeps_up=share < 0.99)
    return search


@pytest.mark.parametrize("alone", [0.3, 0.5, 0.7, 0.85])
def test_a_search_finds_the_rate_at_which_a_queue_has_the_p99(alone):
    right = (1 - alone) / (1.15 - alone)
    found = searched(lambda share: p99_of_queue(share, alone), 12)
    assert found.keeps
    assert found.share == pytest.approx(right, abs=0.06)
    assert found.p99_ns == pytest.approx(ASKED, rel=0.02)


def test_the_slices_of_a_search_make_up_for_their_noise():
    errors = [searched(p99_of_queue, 10, noise=0.25, seed=seed).share - 0.8 for seed in range(200)]
    assert abs(statistics.mean(errors)) < 0.05
    assert statistics.stdev(errors) < 0.07
    assert max(map(abs, errors)) < 0.25


def test_a_search_of_what_never_keeps_the_p99_says_so():
    found = searched(lambda share: 3.0 + share, 10)
    assert not found.keeps
    assert found.p99_ns > ASKED


def test_a_search_of_what_always_keeps_the_p99_goes_to_the_limit():
    found = searched(lambda share: 0.1 + 0.01 * share, 10)
    assert found.keeps
    assert found.share > 0.95
    assert found.p99_ns < ASKED


def test_a_rate_that_a_target_does_not_keep_up_with_is_too_high_whatever_its_p99():
    search = RateSearch(ASKED)
    for _ in range(6):
        search.note(search.next_share, 1_000, keeps_up=search.next_share < 0.6)
    assert search.share < 0.8


def test_who_is_clearly_behind_gets_no_further_slices_and_who_is_near_does():
    fast, slow, near = (searched(lambda s, a=a: p99_of_queue(s, a), 6) for a in (0.4, 0.8, 0.45))
    assert slow.is_clearly_behind(100.0, fast, 100.0)
    assert fast.is_clearly_behind(50.0, fast, 200.0)
    assert not near.is_clearly_behind(100.0, fast, 100.0)
    assert not fast.is_clearly_behind(100.0, slow, 100.0)
    assert not searched(p99_of_queue, 3).is_clearly_behind(50.0, fast, 200.0), "too few slices tell nothing"
