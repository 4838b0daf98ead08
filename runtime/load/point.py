"""The result of one load."""

from __future__ import annotations

from onnxsplit.plan_base import PlanStruct
from runtime.load.driver import Driver
from runtime.load.histogram import Percentiles, TimeHistogram
from runtime.load.patterns import ClosedLoop, OpenLoop, Pattern
from runtime.load.windows import AGREEING, LoadWindow, Measuring, is_sent, joined, judged_ns, keeps_up

_LATE_NS = 1_000_000  # requests that start later than this, and than a share of the latency, are said to be late
_LATE_SHARE = 0.1
_BUSY_CORES = 0.9  # processor time per second at which the one thread of the generator has none left
_IDLE_SHARE = 0.1  # of a closed loop's requests that the generator holds back


class LoadPoint(PlanStruct, frozen=True, kw_only=True):
    """How a target answers one load. The figures are those of the last windows, or of all requests that were asked for.

    Attributes:
        concurrency: the number of requests in flight; None for an open loop.
        rate_per_s: the rate at which requests were due; None for a closed loop.
        sent_per_s: the rate at which requests were due in the windows that count; it differs from ``rate_per_s``
            by chance where gaps are exponential.
        answered_per_s: answers per second. Failures are not answers.
        latency: times from when requests should have started until their answers. Where a client is late, or waits for
            a connection, that time is included.
        service: times from when the same requests were sent.
        mean_of_all_ns: mean time of all answers from when their requests were sent, those of the warm-up and of windows
            that do not count included, as a server's own counters include them.
        lag: times by which this client sent requests late.
        judged_ns: the latency that stability goes by: the mean, or the percentile that was asked for.
        times: distributions of further times of the answers, by name.
        counts_per_s: what answers brought, by name, for each second; tokens, for example.
        failures: number of failed requests by kind.
        messages: what the first failure of each kind said.
        unanswered: requests that had no answer when waiting for them ended.
        seconds: length of the time that the figures are of.
        windows: number of windows that were measured.
        stable: whether the last three agree; None where a number of requests was asked for.
        keeps_up: whether answers came as fast as requests were due.
        sent: whether this client sent requests as fast as they were due. If not, the load says nothing of the server.
        client_cores: processor time of this process per second. Where the target is a pipeline in this process,
            sending and receiving is a part of it.
        interrupted: whether the measurement was ended before its time.
        remarks: what makes the figures doubtful, in sentences.
    """

    concurrency: int | None
    rate_per_s: float | None
    sent_per_s: float
    answered_per_s: float
    latency: Percentiles
    service: Percentiles
    mean_of_all_ns: int
    lag: Percentiles
    judged_ns: int
    times: dict[str, Percentiles]
    counts_per_s: dict[str, float]
    failures: dict[str, int]
    messages: dict[str, str]
    unanswered: int
    seconds: float
    windows: int
    stable: bool | None
    keeps_up: bool
    sent: bool
    client_cores: float
    interrupted: bool
    remarks: tuple[str, ...]

    @property
    def failed(self) -> int:
        """Number of failed requests, those without an answer included."""
        return sum(self.failures.values()) + self.unanswered


def summarise(
    driver: Driver, pattern: Pattern, rules: Measuring, *, now_ns: int, client_cores: float, interrupted: bool
) -> LoadPoint:
    """The result of a load that is over.

    Args:
        driver: the driver of the load.
        pattern: what it was given.
        rules: what it was given.
        now_ns: when the measurement ended, for one without a complete window.
        client_cores: processor time of this process per second.
        interrupted: whether it was ended before its time.
    """
    windows = driver.windows[: driver.complete][-AGREEING:]
    seconds = len(windows) * rules.window_s
    if not windows:  # a number of requests, or an interrupt
        windows = driver.windows or [LoadWindow()]
        seconds = max(1, (driver.last_end_ns if rules.requests else now_ns) - driver.begins_ns) / 1e9
    total = joined(windows)
    stable = driver.stable if rules.requests is None else None
    up, sent = keeps_up(windows), is_sent(windows)
    busy = sum(window.latency.total for window in windows) / seconds / 1e9  # requests in flight, on average
    return LoadPoint(
        concurrency=pattern.concurrency if isinstance(pattern, ClosedLoop) else None,
        rate_per_s=pattern.per_s if isinstance(pattern, OpenLoop) else None,
        sent_per_s=total.due / seconds,
        answered_per_s=total.answered / seconds,
        latency=total.latency.percentiles(),
        service=total.service.percentiles(),
        mean_of_all_ns=round(driver.service.mean),
        lag=total.lag.percentiles(),
        judged_ns=round(judged_ns(total, rules.percentile)),
        times={name: histogram.percentiles() for name, histogram in sorted(total.times.items())},
        counts_per_s={name: count / seconds for name, count in sorted(total.counts.items())},
        failures=dict(total.failures.most_common()),
        messages=total.messages,
        unanswered=0 if interrupted else driver.outstanding,
        seconds=seconds,
        windows=driver.complete,
        stable=stable,
        keeps_up=up,
        sent=sent,
        client_cores=client_cores,
        interrupted=interrupted,
        remarks=tuple(_remarks(pattern, total, stable=stable, up=up, sent=sent, cores=client_cores, busy=busy)),
    )


def _remarks(
    pattern: Pattern, total: LoadWindow, *, stable: bool | None, up: bool, sent: bool, cores: float, busy: float
) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    late = _lateness(total.lag, total.service)
    if not sent and isinstance(pattern, OpenLoop):
        found.append(
            f"This client does not keep up: it cannot send {pattern.per_s:g} requests a second, so this says nothing "
            "of the server. Use a lower rate, or a faster or idle host."
        )
    elif not up and not (late and cores > _BUSY_CORES):
        found.append("The server does not keep up: requests wait in a queue that grows as long as the load lasts.")
    elif stable is False:
        found.append("The figures are not stable: rate or latency differ too much between the last three windows.")
    if late and sent:
        found.append(f"This client is late: {late}. Its latencies are partly its own; use a faster or idle host.")
    idle = 1 - busy / pattern.concurrency if isinstance(pattern, ClosedLoop) else 0.0
    if cores > _BUSY_CORES and (late or idle > _IDLE_SHARE):
        found.append(f"This client is at its limit: it uses {cores:.2f} cores, and can use one.")
    elif idle > _IDLE_SHARE and not total.failures and total.answered:
        found.append(
            f"This client keeps {busy:.1f} requests in flight instead of {pattern.concurrency}, "  # type: ignore[union-attr]
            "because its own work takes the rest of the time."
        )
    return found


def _lateness(lag: TimeHistogram, service: TimeHistogram) -> str:
    late_ns = lag.percentile(99)
    if late_ns <= max(_LATE_NS, _LATE_SHARE * service.percentile(50)):
        return ""
    return f"it sends requests up to {late_ns / 1e6:.1f} ms late (p99)"
