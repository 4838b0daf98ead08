"""The histograms of texts, and the times that the page shows."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from runtime.gateway.openai.figures import RequestFigures
from runtime.gateway.telemetry.texts import Histogram, TextTimes
from runtime.time_buckets import bucket_of


def test_a_value_counts_in_every_bucket_from_its_own_on():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.add(value)
    assert histogram.buckets == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == pytest.approx(7.65)
    assert sum(histogram.times.values()) == 4


def test_times_follow_the_figures_of_a_text():
    figures = RequestFigures()
    times = TextTimes(figures)
    record = figures.begin(5, now_ns=0)
    record.tokens([2_000_000_000])
    record.tokens([2_500_000_000, 3_000_000_000])
    record.end("stop", now_ns=4_000_000_000)
    assert times.first_token.times == {bucket_of(2_000_000_000): 1}
    assert times.gap.times == {bucket_of(500_000_000): 2}
    assert times.whole.total == 4.0
    assert (times.prompt.total, times.generation.total) == (5.0, 3.0)
