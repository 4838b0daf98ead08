"""The figures of one load, window by window, and the rule that says when they are stable.

    warm-up  | window 0 | window 1 | window 2 | window 3 |  the end: requests in flight are waited for
             ^ measuring begins             the last three windows agree: stable

A request's times belong to the window in which it was due, and its answer counts in the window in which it came. So a
server that stops for a second shows in the times of every request that was due in that second, and in no answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from onnxsplit.errors import InputError
from onnxsplit.numbers import MOST_SECONDS, real_problem, whole_problem
from onnxsplit.plan_base import PlanStruct
from runtime.load.histogram import TimeHistogram

AGREEING = 3
"""Number of windows in a row that must agree for a load to be stable; also those that the result is taken from."""

_KEEPS_UP = 0.95  # share of the requests due that must be answered, so that an open loop is stable
_OVERWHELMED = 0.9  # below this share, with a queue that grows, the measurement ends early


class Measuring(PlanStruct, frozen=True, kw_only=True):
    """How a load is measured.

    Attributes:
        warmup_s: seconds before measuring begins; their requests are not counted.
        window_s: length of one window in seconds.
        most_windows: windows after which measuring ends although the load is not stable.
        stability: how far rate and latency of each of the last windows may be from their mean, as a share of it.
        percentile: the percentile of the latency that stability goes by; None for the mean.
        requests: number of requests to measure, instead of windows; None to measure until the load is stable.
        drain_s: least number of seconds to wait, after the measurement, for requests in flight; they are awaited for
            twice as long as the longest answer took, if that is more.
    """

    warmup_s: float = 1.0
    window_s: float = 2.0
    most_windows: int = 10
    stability: float = 0.1
    percentile: float | None = None
    requests: int | None = None
    drain_s: float = 10.0

    def check(self) -> None:
        """Raise InputError for a number that is out of range."""
        problems = [
            real_problem("the warm-up time", self.warmup_s, MOST_SECONDS, zero=True),
            real_problem("the length of a window", self.window_s, MOST_SECONDS),
            whole_problem("the most windows", self.most_windows, AGREEING, 1_000_000),
            real_problem("the stability", self.stability, 10),
            None if self.percentile is None else real_problem("the percentile", self.percentile, 100),
            None if self.requests is None else whole_problem("the number of requests", self.requests, 1, 10**9),
            real_problem("the time to wait for answers", self.drain_s, MOST_SECONDS, zero=True),
        ]
        if found := next(filter(None, problems), None):
            raise InputError(found)


class LoadWindow:
    """What happened in one window, or in several.

    Attributes:
        due: requests that were due in it.
        answered: answers that came in it.
        outstanding: requests in flight at its end; None before that.
        unsent: requests that were due by its end, and that the client had not sent yet.
        latency: times from when the requests that were due in it should have started until their answers, in ns.
        service: times of the same requests from when they were sent.
        lag: times by which the same requests were sent late.
        counts: amounts of what those answers brought, by name; tokens, for example.
        failures: number of requests due in it that failed, by kind.
        messages: what the first failure of each kind said.
        times: further times of the answers to requests due in it, by name; until the first token, for example.
    """

    def __init__(self) -> None:
        self.due = self.answered = self.unsent = 0
        self.outstanding: int | None = None
        self.latency, self.service, self.lag = TimeHistogram(), TimeHistogram(), TimeHistogram()
        self.failures: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.messages: dict[str, str] = {}
        self.times: dict[str, TimeHistogram] = {}

    def add_times(self, times: Mapping[str, Sequence[int]]) -> None:
        """Count further times of an answer, by name."""
        for name, values in times.items():
            histogram = self.times.setdefault(name, TimeHistogram())
            for value in values:
                histogram.add(value)

    def update(self, other: LoadWindow) -> None:
        """Add another window to this one."""
        self.due += other.due
        self.answered += other.answered
        self.latency.update(other.latency)
        self.service.update(other.service)
        self.lag.update(other.lag)
        self.failures.update(other.failures)
        self.counts.update(other.counts)
        self.messages = {**other.messages, **self.messages}
        for name, histogram in other.times.items():
            self.times.setdefault(name, TimeHistogram()).update(histogram)


def joined(windows: Sequence[LoadWindow]) -> LoadWindow:
    """Several windows as one."""
    total = LoadWindow()
    for window in windows:
        total.update(window)
    return total


def judged_ns(window: LoadWindow, percentile: float | None) -> float:
    """The latency that a load is judged by: a percentile, or the mean when None."""
    return window.latency.mean if percentile is None else window.latency.percentile(percentile)


def is_stable(windows: Sequence[LoadWindow], rules: Measuring) -> bool:
    """Whether the last windows agree in rate and latency, and answers come as fast as requests."""
    last = windows[-AGREEING:]
    if len(last) < AGREEING or not keeps_up(last, _KEEPS_UP):
        return False
    rates = [window.answered for window in last]
    latencies = [judged_ns(window, rules.percentile) for window in last]
    return _agree(rates, rules.stability) and _agree(latencies, rules.stability)


def is_overwhelmed(windows: Sequence[LoadWindow]) -> bool:
    """Whether requests have come faster than answers throughout the last windows, and wait in a queue that grows."""
    last = windows[-AGREEING:]
    queue = [(window.outstanding or 0) + window.unsent for window in last]
    grows = all(earlier < later for earlier, later in pairwise(queue))
    return len(last) == AGREEING and grows and not keeps_up(last, _OVERWHELMED)


def is_refused(windows: Sequence[LoadWindow]) -> bool:
    """Whether all requests of the last windows failed."""
    last = joined(windows[-AGREEING:])
    return len(windows) >= AGREEING and not last.answered and last.failures.total() > 0


def keeps_up(windows: Sequence[LoadWindow], share: float = _KEEPS_UP) -> bool:
    """Whether at least a share of the requests due was answered or failed, but for a few that are always in flight."""
    grown = (windows[-1].outstanding or 0) - (windows[0].outstanding or 0)
    return grown + _held_back(windows) <= max(2.0, (1 - share) * _due(windows))


def is_sent(windows: Sequence[LoadWindow]) -> bool:
    """Whether the client sent the requests as fast as they were due."""
    return _held_back(windows) <= max(2.0, (1 - _KEEPS_UP) * _due(windows))


def _held_back(windows: Sequence[LoadWindow]) -> int:
    """By how many the requests have grown that were due and not sent."""
    return windows[-1].unsent - windows[0].unsent


def _due(windows: Sequence[LoadWindow]) -> int:
    """Number of requests that were due after the first window, those that were not sent included."""
    return sum(window.due for window in windows[1:]) + windows[-1].unsent


def _agree(values: Sequence[float], share: float) -> bool:
    mean = sum(values) / len(values)
    return mean > 0 and all(abs(value - mean) <= share * mean for value in values)
