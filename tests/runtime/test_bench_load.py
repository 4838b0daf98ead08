"""Latencies under load: how long they are measured, and what they are percentiles of."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec.structs
import pytest

from runtime.bench_load import latencies_under_load


@pytest.mark.parametrize(
    ("most_per_s", "window_s", "expected_s"),
    [(1_000.0, 0.4, [0.4, 0.4]), (20.0, 0.4, [100 / 30, 100 / 48]), (1.0, 0.4, [10.0, 10.0]), (1.0, 15.0, [15.0] * 2)],
)
def test_windows_hold_a_hundred_requests_or_last_ten_seconds(monkeypatch, most_per_s, window_s, expected_s):
    asked = []

    def measure(target, pattern, rules):
        asked.append((pattern.per_s, rules.window_s))
        return SimpleNamespace(
            latency=SimpleNamespace(p50_ns=1, p99_ns=2, count=99 + len(asked)), keeps_up=True, interrupted=False
        )

    monkeypatch.setattr("runtime.bench_load.measure", measure)
    loads = latencies_under_load({"pipeline": None}, most_per_s, window_s, lambda _: None)
    assert [rate for rate, _ in asked] == [0.5 * most_per_s, 0.8 * most_per_s]
    assert [seconds for _, seconds in asked] == pytest.approx(expected_s)
    assert [(load.requests, load.has_percentiles) for load in loads] == [(100, True), (101, True)]
    assert not msgspec.structs.replace(loads[0], requests=99).has_percentiles
