"""The histograms of texts, and the recent times that the page shows."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from runtime.gateway.openai.figures import RequestFigures
from runtime.gateway.telemetry.texts import Histogram, TextTimes


def test_a_value_counts_in_every_bucket_from_its_own_on():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.add(value)
    assert histogram.buckets == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == pytest.approx(7.65)
    assert histogram.median == 0.5


def test_the_median_is_that_of_the_last_thousand():
    histogram = Histogram((1.0,))
    for value in [9.0] * 500 + [2.0] * 1000:
        histogram.add(value)
    assert histogram.median == 2.0
    assert Histogram((1.0,)).median == 0.0


def test_times_follow_the_figures_of_a_text():
    figures = RequestFigures()
    times = TextTimes(figures)
    record = figures.begin(5, now_ns=0)
    record.tokens([2_000_000_000])
    record.tokens([2_500_000_000, 3_000_000_000])
    record.end("stop", now_ns=4_000_000_000)
    assert list(times.first_token.recent) == [2.0]
    assert list(times.gap.recent) == [0.5, 0.5]
    assert list(times.whole.recent) == [4.0]
    assert (list(times.prompt.recent), list(times.generation.recent)) == ([5.0], [3.0])
