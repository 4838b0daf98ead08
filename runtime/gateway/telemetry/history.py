"""The requests of a model over the last minute and the last hour, for charts. Pure: the caller gives the time.

A point says what an interval added: each second has one, and each ten seconds. An interval in which the server took no
sample has no point, so a chart has a gap there.
"""

from __future__ import annotations

from collections import Counter, deque

from msgspec import Struct

from runtime.gateway.telemetry.minute import Interval, percentile

SECONDS = 60
_BIN_MS = 10_000
_BINS = 360


class Point(Struct, frozen=True, array_like=True):
    """An interval on a chart.

    Attributes:
        at_ms: End of the interval, in milliseconds since the epoch.
        per_s: Answered requests per second.
        p99_ns: 99th percentile of their times; 0 when none was answered.
    """

    at_ms: int
    per_s: float
    p99_ns: int


class History:
    """Points of one model, at most 60 of a second and 360 of ten seconds.

    Attributes:
        minute: Points of the last samples.
        hour: Points of ten seconds each, of which all samples were taken.
    """

    def __init__(self) -> None:
        self.minute: deque[Point] = deque(maxlen=SECONDS)
        self.hour: deque[Point] = deque(maxlen=_BINS)
        self._bin = 0
        self._answered = 0
        self._seconds = 0.0
        self._times: Counter[int] = Counter()

    def add(self, at_ms: int, part: Interval, answered: int) -> Point:
        """Add what the interval that ends now has added.

        Args:
            at_ms: The time, in milliseconds since the epoch. When the clock was set back, later points are dropped.
            part: The interval.
            answered: Requests that were answered in it.
        """
        point = Point(at_ms, answered / part.seconds if part.seconds else 0.0, percentile(part.times, 99))
        if self._bin and at_ms // _BIN_MS != self._bin:
            self._close_bin()
        self._bin = at_ms // _BIN_MS
        self._answered += answered
        self._seconds += part.seconds
        self._times.update(part.times)
        _append(self.minute, point)
        return point

    def _close_bin(self) -> None:
        if self._seconds:
            rate = self._answered / self._seconds
            _append(self.hour, Point((self._bin + 1) * _BIN_MS, rate, percentile(self._times, 99)))
        self._answered, self._seconds = 0, 0.0
        self._times.clear()


def _append(points: deque[Point], point: Point) -> None:
    while points and points[-1].at_ms >= point.at_ms:
        points.pop()
    points.append(point)
