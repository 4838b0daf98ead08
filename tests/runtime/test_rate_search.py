"""The search for the highest rate that keeps a p99: it comes near, whichever trial chance spoils."""

from __future__ import annotations

import pytest

from runtime.load.rate_search import RateSearch


def searched(keeps, trials, spoiled=()):
    """Search where rates up to ``keeps`` are kept, except in the spoiled trials."""
    search = RateSearch()
    for trial in range(trials):
        if (share := search.share) is None:
            break
        search.note(share <= keeps and trial not in spoiled)
    return search


@pytest.mark.parametrize("keeps", [0.07, 0.3, 0.55, 0.86, 1.0])
def test_a_search_comes_near_the_highest_rate_from_below(keeps):
    found = searched(keeps, 12)
    assert found.low <= keeps <= found.high
    assert found.high - found.low <= 1 / 64


@pytest.mark.parametrize("spoiled", range(12))
@pytest.mark.parametrize("keeps", [0.3, 0.55, 0.86])
def test_one_spoiled_trial_does_not_lead_a_search_away(keeps, spoiled):
    found = searched(keeps, 12, {spoiled})
    assert found.low <= keeps <= found.high
    assert found.high - found.low <= 1 / 32


def test_a_search_ends_where_hardly_any_rate_is_kept():
    found = searched(0.0, 100)
    assert found.share is None
    assert found.low == 0.0


def test_who_is_far_behind_is_known_after_few_trials():
    found = searched(0.55, 6)
    assert found.is_beaten(0.7)
    assert not found.is_beaten(0.56)
    assert not searched(0.55, 2).is_beaten(0.99), "it is not known well enough yet"
    assert not searched(0.05, 6).is_beaten(0.99), "no rate that it keeps is known yet"
