"""What was counted in the last minute, from counts that only grow. Pure: the caller gives the time.

    sample      0        1        2              60        61
    parts         [ 1 s ]  [ 1 s ]  ...            [ 1 s ]        each holds what its interval added
                          `------------ 60 s -------------'       the minute: the parts whose end is in it

Times are counted in the buckets of :mod:`runtime.time_buckets`, so percentiles are exact to 1/32. A part has an entry
for each bucket that was hit in its interval, and there are fewer than 1000 buckets.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.time_buckets import middle_of

MINUTE_NS = 60_000_000_000


@dataclass(frozen=True)
class Interval:
    """What an interval has added.

    Attributes:
        from_ns: Beginning of the interval.
        to_ns: End of the interval.
        totals: What was added to each count.
        times: What was added to each bucket of times.
    """

    from_ns: int
    to_ns: int
    totals: tuple[int, ...]
    times: Mapping[int, int]

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return (self.to_ns - self.from_ns) / 1e9


class LastMinute:
    """Counts of the last minute."""

    def __init__(self) -> None:
        self._parts: deque[Interval] = deque()
        self._before: tuple[int, tuple[int, ...], dict[int, int]] | None = None
        self._times: Counter[int] = Counter()

    def update(self, now_ns: int, totals: Sequence[int], times: Mapping[int, int] | None = None) -> Interval:
        """Take the counts so far.

        Counts that have become smaller began anew. The first call sets the beginning and adds nothing.

        Args:
            now_ns: The time.
            totals: Counts that only grow; as many as in the call before.
            times: Numbers of times by bucket, which only grow.

        Returns:
            What was added since the call before.
        """
        times = dict(times or {})
        before = self._before or (now_ns, tuple(totals), times)
        part = _added(before, now_ns, totals, times)
        if self._before is not None:
            self._parts.append(part)
            self._times.update(part.times)
        self._before = (now_ns, tuple(totals), times)
        while self._parts and self._parts[0].to_ns <= now_ns - MINUTE_NS:
            self._times.subtract(self._parts.popleft().times)
        self._times = +self._times
        return part

    @property
    def seconds(self) -> float:
        """Time that the counts cover; shorter than a minute at the beginning, and 0 before the second call."""
        return sum(part.seconds for part in self._parts)

    @property
    def totals(self) -> tuple[int, ...]:
        """What was added to each count in the last minute."""
        assert self._before is not None
        return tuple(sum(part.totals[place] for part in self._parts) for place in range(len(self._before[1])))

    def per_s(self, count: float) -> float:
        """A count of the last minute as a rate; 0 before the second call."""
        return count / self.seconds if self._parts else 0.0

    def percentile(self, percent: float) -> int:
        """The time that ``percent`` of 100 times of the last minute do not exceed; 0 without any."""
        return percentile(self._times, percent)


def _added(
    before: tuple[int, tuple[int, ...], dict[int, int]], now_ns: int, totals: Sequence[int], times: Mapping[int, int]
) -> Interval:
    then_ns, old, old_times = before
    if any(new < was for new, was in zip(totals, old, strict=True)):
        old, old_times = (0,) * len(old), {}
    return Interval(
        then_ns,
        now_ns,
        tuple(new - was for new, was in zip(totals, old, strict=True)),
        {
            bucket: count - old_times.get(bucket, 0)
            for bucket, count in times.items()
            if count > old_times.get(bucket, 0)
        },
    )


def percentile(times: Mapping[int, int], percent: float) -> int:
    """The time that ``percent`` of 100 times do not exceed, from their numbers by bucket; 0 without any."""
    left = max(1, math.ceil(round(sum(times.values()) * percent / 100, 6)))
    for bucket in sorted(times):
        left -= times[bucket]
        if left <= 0:
            return middle_of(bucket)
    return 0
