"""The generator of load against servers in memory, with a simulated clock."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import numpy as np
import pytest

from onnxsplit.errors import InputError
from runtime.load.driver import Driver
from runtime.load.histogram import TimeHistogram
from runtime.load.patterns import ClosedLoop, OpenLoop, Pattern
from runtime.load.point import LoadPoint, summarise
from runtime.load.windows import Measuring

MS = 1_000_000
SECOND = 1_000 * MS

Server = Callable[[int], tuple[int, str | None]]
"""Takes the time at which a request comes; returns when it ends and how it failed."""


def worker(service_ns: int, stall: tuple[int, int] = (0, 0)) -> Server:
    """One worker that answers requests one after the other, and stands still between two times."""
    free = 0

    def answer(now_ns: int) -> tuple[int, str | None]:
        nonlocal free
        begin = max(now_ns, free)
        if stall[0] <= begin + service_ns and begin < stall[1]:
            begin = max(begin, stall[1])
        free = begin + service_ns
        return free, None

    return answer


def simulated(
    pattern: Pattern,
    server: Server,
    *,
    late: Callable[[int], int] = lambda now_ns: now_ns,
    **rules: float | int | None,
) -> LoadPoint:
    """Run a load against a server; ``late`` maps the time of a wake-up to the time at which it happens."""
    measuring = Measuring(**rules)
    driver, now = Driver(pattern, measuring, 0), 0
    ends: list[tuple[int, int, str | None, object]] = []
    while not driver.over or ends:
        for request in driver.due(now):
            end, failure = server(now)
            heapq.heappush(ends, (end, request.number, failure, request))
        wake = driver.wake_ns
        times = [time for time in (None if wake is None else late(wake), ends[0][0] if ends else None) if time]
        now = max(now, min(times, default=now))
        while ends and ends[0][0] <= now:
            end, _, failure, request = heapq.heappop(ends)
            driver.ended(request, end, failure)
    return summarise(driver, pattern, measuring, now_ns=now, client_cores=0.1, interrupted=False)


def test_an_open_loop_sends_at_its_rate_and_a_closed_loop_as_fast_as_answers_come():
    open_loop = simulated(OpenLoop(per_s=50), worker(10 * MS))
    closed = simulated(ClosedLoop(concurrency=4), worker(10 * MS))
    assert open_loop.answered_per_s == pytest.approx(50, rel=0.01)
    assert open_loop.latency.p50_ns == pytest.approx(10 * MS, rel=1e-3)
    assert closed.answered_per_s == pytest.approx(100, rel=0.01)
    assert closed.latency.p50_ns == pytest.approx(40 * MS, rel=1e-3)
    assert open_loop.stable
    assert closed.stable
    assert not open_loop.remarks + closed.remarks


def test_a_server_that_stops_for_a_second_shows_in_every_request_that_was_due_then():
    stalled = worker(5 * MS, stall=(4 * SECOND, 5 * SECOND))
    point = simulated(OpenLoop(per_s=100), stalled, most_windows=3, stability=10)
    # A hundred of the six hundred requests were due in that second.
    assert point.latency.count == 600
    assert point.latency.p99_ns > 0.9 * SECOND
    assert point.latency.p90_ns > 0.4 * SECOND
    assert point.latency.p50_ns < 10 * MS
    assert point.lag.max_ns == 0


def test_a_generator_that_stops_shows_in_lag_and_latency_but_not_in_service_time():
    def late(now_ns: int) -> int:
        return max(now_ns, 5 * SECOND) if 4 * SECOND <= now_ns < 5 * SECOND else now_ns

    point = simulated(OpenLoop(per_s=100), lambda now: (now + 5 * MS, None), late=late, most_windows=3, stability=10)
    assert point.lag.max_ns == pytest.approx(1 * SECOND, rel=0.02)
    assert point.latency.p99_ns > 0.9 * SECOND
    assert point.service.max_ns == 5 * MS
    assert any("client is late" in remark for remark in point.remarks)


def test_a_rate_above_the_capacity_is_said_and_ends_early():
    point = simulated(OpenLoop(per_s=150), worker(10 * MS))
    assert not point.stable
    assert not point.keeps_up
    assert point.windows == 3
    assert point.answered_per_s == pytest.approx(100, rel=0.02)
    assert point.sent
    assert any("The server does not keep up" in remark for remark in point.remarks)


@pytest.mark.parametrize("rate", [200, 5_000])
def test_a_rate_that_the_client_cannot_send_is_not_blamed_on_the_server(rate):
    never = 1 << 62  # the client wakes only when answers come, and then starts 64 requests at once
    point = simulated(OpenLoop(per_s=rate), lambda now: (now + 500 * MS, None), late=lambda _: never)
    assert point.windows == 3
    assert 0 < point.answered_per_s < 150
    assert not point.sent
    assert not point.keeps_up
    assert "This client does not keep up" in point.remarks[0]
    assert not any("server does" in remark for remark in point.remarks)


def test_figures_that_change_are_not_stable():
    source = random.Random(0)

    def slower(now_ns: int) -> tuple[int, str | None]:
        return now_ns + round((10 + 5 * now_ns / SECOND + source.random()) * MS), None

    point = simulated(ClosedLoop(concurrency=1), slower, most_windows=6)
    assert point.stable is False
    assert point.windows == 6
    assert any("not stable" in remark for remark in point.remarks)


def test_failures_are_counted_by_kind_and_are_not_answers():
    number = 0

    def failing(now_ns: int) -> tuple[int, str | None]:
        nonlocal number
        number += 1
        return now_ns + MS, {0: "503", 1: "429"}.get(number % 10)

    point = simulated(OpenLoop(per_s=100), failing, warmup_s=0, window_s=1)
    assert set(point.failures) == {"503", "429"}
    assert point.failures["503"] == pytest.approx(30, abs=1)
    assert point.answered_per_s == pytest.approx(80, rel=0.02)
    assert point.latency.count + point.failed == 300


def test_a_closed_loop_against_a_dead_server_pauses_and_ends():
    point = simulated(ClosedLoop(concurrency=2), lambda now: (now, "refused"))
    assert point.windows == 3
    assert point.answered_per_s == 0
    assert 0 < point.failures["refused"] <= 2 * 100 * 6 + 2


def test_the_warm_up_is_not_counted():
    point = simulated(OpenLoop(per_s=100), lambda now: (now + (900 if now < SECOND // 2 else 1) * MS, None))
    assert point.latency.max_ns == MS


def test_a_number_of_requests_ends_the_load():
    point = simulated(OpenLoop(per_s=100), worker(5 * MS), requests=250)
    assert point.latency.count == 250
    assert point.stable is None
    assert point.answered_per_s == pytest.approx(100, rel=0.01)


def test_a_number_of_requests_ends_although_the_server_never_answers():
    driver = Driver(ClosedLoop(concurrency=1), Measuring(requests=5, warmup_s=0), 0)
    assert len(driver.due(0)) == 1
    assert driver.wake_ns == 300 * SECOND
    assert driver.due(driver.wake_ns) == []
    assert driver.over


def test_requests_beyond_the_most_in_flight_are_failures(monkeypatch):
    monkeypatch.setattr("runtime.load.driver.MOST_OUTSTANDING", 10)
    point = simulated(OpenLoop(per_s=100), lambda now: (now + 5 * SECOND, None), warmup_s=0, most_windows=3)
    assert sum(point.failures.values()) == 600 - 20
    assert point.latency.count + point.failed == 600


def test_exponential_gaps_have_the_mean_rate_and_come_from_the_seed():
    def first(**options: object) -> list[int]:
        times = OpenLoop(per_s=1000, poisson=True, **options).due_ns()
        return [next(times) for _ in range(20_000)]

    gaps = np.diff(first())
    assert gaps.mean() == pytest.approx(1e6, rel=0.03)
    assert gaps.std() == pytest.approx(1e6, rel=0.03)
    assert first() == first()
    assert first(seed=1) != first(seed=2)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_percentiles_are_those_of_all_values(sigma):
    values = np.sort(np.random.default_rng(0).lognormal(15, sigma, 50_000).astype(int))
    first, second = TimeHistogram(), TimeHistogram()
    for number, value in enumerate(values.tolist()):
        (first if number % 2 else second).add(value)
    first.update(second)
    found = first.percentiles()
    for percent, figure in ((50, found.p50_ns), (90, found.p90_ns), (99, found.p99_ns), (99.9, found.p99_9_ns)):
        assert figure == pytest.approx(values[round(500 * percent) - 1], rel=6e-4, abs=1)
    assert (found.min_ns, found.max_ns, found.count) == (values.min(), values.max(), 50_000)
    assert found.mean_ns == pytest.approx(values.mean(), abs=1)


@pytest.mark.parametrize("percent", [0.1, 50, 99.9, 100])
def test_small_values_and_no_values_are_exact(percent):
    histogram = TimeHistogram()
    assert histogram.percentile(percent) == 0
    for value in range(1, 1001):
        histogram.add(value)
    assert histogram.percentile(percent) == round(percent * 10)


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (OpenLoop(per_s=0), "request rate"),
        (OpenLoop(per_s=float("nan")), "request rate"),
        (ClosedLoop(concurrency=0), "concurrency"),
        (Measuring(window_s=0), "window"),
        (Measuring(percentile=101), "percentile"),
        (Measuring(requests=0), "number of requests"),
    ],
)
def test_numbers_out_of_range_are_named(made, word):
    with pytest.raises(InputError, match=word):
        made.check()
