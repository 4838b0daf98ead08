"""Latencies under load: at shares of the rate that a pipeline was found to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxsplit.plan_base import PlanStruct
from runtime.load.loop import measure
from runtime.load.patterns import OpenLoop
from runtime.load.target import LoadTarget
from runtime.load.windows import Measuring

SHARES = (0.5, 0.8)
"""The shares of the pipeline's rate at which latencies are measured."""

_ENOUGH = 100  # requests; of fewer the 99th percentile is the slowest
_MOST_WINDOW_S = 10.0


class LoadLatency(PlanStruct, frozen=True, kw_only=True):
    """The latency of one contender under one load of an open loop with exponential gaps.

    Attributes:
        name: the contender.
        share: the rate as a share of the pipeline's highest.
        rate_per_s: the rate in requests per second.
        p50_ns: the median of the latency, from when a request was due until its answer.
        p99_ns: its 99th percentile.
        requests: the number of requests that these are of.
        keeps_up: whether answers came as fast as requests. If not, latencies grow as long as the load lasts.
    """

    name: str
    share: float
    rate_per_s: float
    p50_ns: int
    p99_ns: int
    requests: int
    keeps_up: bool

    @property
    def has_percentiles(self) -> bool:
        """Whether there were enough requests for a 99th percentile, which otherwise is the slowest of them."""
        return self.requests >= _ENOUGH


def latencies_under_load(
    targets: Mapping[str, LoadTarget], most_per_s: float, window_s: float, say: Callable[[str], None]
) -> tuple[LoadLatency, ...]:
    """Measure every contender at the same rates.

    Args:
        targets: the contenders by name.
        most_per_s: the rate in requests per second that shares are taken of.
        window_s: the least length of a window in seconds; each load has at least three. At a low rate they are longer,
            up to ten seconds, until three have a hundred requests.
        say: called with a description of each step.
    """
    found = []
    for share in SHARES:
        enough_s = max(window_s, min(_MOST_WINDOW_S, _ENOUGH / 3 / (share * most_per_s)))
        rules = Measuring(warmup_s=window_s, window_s=enough_s, most_windows=6)
        for name, target in targets.items():
            say(f"latency of {name} at {share:.0%} of the pipeline's rate")
            point = measure(target, OpenLoop(per_s=share * most_per_s, poisson=True), rules)
            found.append(
                LoadLatency(
                    name=name,
                    share=share,
                    rate_per_s=share * most_per_s,
                    p50_ns=point.latency.p50_ns,
                    p99_ns=point.latency.p99_ns,
                    requests=point.latency.count,
                    keeps_up=point.keeps_up,
                )
            )
            if point.interrupted:
                raise KeyboardInterrupt
    return tuple(found)
