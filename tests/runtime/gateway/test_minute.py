"""Counts of the last minute, charts of the last hour, and buckets for times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.gateway.telemetry.history import History
from runtime.gateway.telemetry.minute import LastMinute, percentile
from runtime.time_buckets import bucket_of, middle_of

S = 1_000_000_000
MS = 1_000_000


@given(st.integers(min_value=0, max_value=2**62))
def test_a_bucket_stands_for_a_time_within_five_percent(time_ns):
    assert abs(middle_of(bucket_of(time_ns)) - time_ns) <= max(1, 0.05 * time_ns)


@given(st.integers(min_value=-(2**62), max_value=2**62), st.integers(min_value=0, max_value=2**62))
def test_longer_times_have_later_buckets_and_there_are_few(one, longer):
    assert bucket_of(one) <= bucket_of(max(one, 0) + longer) < 1000


@given(st.lists(st.integers(min_value=1, max_value=10**12), min_size=1), st.sampled_from([50, 99]))
def test_percentiles_are_those_of_the_sorted_times(times, percent):
    counts: dict[int, int] = {}
    for time_ns in times:
        counts[bucket_of(time_ns)] = counts.get(bucket_of(time_ns), 0) + 1
    exact = sorted(times)[max(1, math.ceil(len(times) * percent / 100)) - 1]
    assert percentile(counts, percent) == pytest.approx(exact, rel=0.05, abs=1)


def test_a_slow_request_of_twelve_minutes_ago_is_forgotten():
    minute, times = LastMinute(), {bucket_of(800 * MS): 1}
    minute.update(0, (0,), {})
    minute.update(1 * S, (1,), times)
    assert minute.percentile(99) == pytest.approx(800 * MS, rel=0.05)
    for second in range(2, 62):
        minute.update(second * S, (1,), times)
    assert (minute.percentile(99), minute.totals, minute.per_s(minute.totals[0])) == (0, (0,), 0.0)


def test_rates_are_over_the_time_that_was_seen():
    minute = LastMinute()
    minute.update(0, (100,))
    assert minute.per_s(1) == 0.0
    minute.update(2 * S, (140,))
    assert minute.per_s(minute.totals[0]) == 20.0


def test_counts_that_begin_anew_are_not_negative():
    minute, bucket = LastMinute(), bucket_of(5 * MS)
    minute.update(0, (50,), {bucket: 50})
    part = minute.update(1 * S, (3,), {bucket: 3})
    assert (part.totals, dict(part.times)) == ((3,), {bucket: 3})


def test_the_past_of_a_minute_is_bounded():
    minute = LastMinute()
    for second in range(500):
        minute.update(second * S, (second,), {bucket_of(second): 1 for second in range(second)})
    assert len(minute._parts) == 60


def seconds(history: History, *, first: int, count: int, answered: int = 5, took_ns: int = 4 * MS) -> None:
    """Add one sample per second, in each of which requests were answered."""
    minute = LastMinute()
    minute.update(first * S, (0,), {})
    for number in range(1, count + 1):
        total = answered * number
        part = minute.update((first + number) * S, (total,), {bucket_of(took_ns): total})
        history.add((first + number) * 1000, part, part.totals[0])


def test_an_hour_has_a_point_for_each_ten_seconds_and_no_more_than_an_hour():
    history = History()
    seconds(history, first=1_000_000, count=5000)
    assert (len(history.minute), len(history.hour)) == (60, 360)
    steps = {
        after.at_ms - before.at_ms for before, after in zip(list(history.hour), list(history.hour)[1:], strict=False)
    }
    assert steps == {10_000}
    assert {round(point.per_s, 6) for point in history.hour} == {5.0}
    assert history.hour[-1].p99_ns == pytest.approx(4 * MS, rel=0.05)


def test_where_no_sample_was_taken_there_is_no_point():
    history = History()
    seconds(history, first=1_000_000, count=30)
    seconds(history, first=1_000_600, count=30)
    times = [point.at_ms // 1000 - 1_000_000 for point in history.hour]
    assert times == [10, 20, 30, 40, 610, 620, 630]


def test_a_clock_that_is_set_back_leaves_the_points_in_order():
    history = History()
    seconds(history, first=1_000_000, count=60)
    seconds(history, first=999_000, count=5)
    for points in (history.minute, history.hour):
        times = [point.at_ms for point in points]
        assert times == sorted(set(times))
    assert history.minute[-1].at_ms == 999_005_000
