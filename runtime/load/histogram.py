"""Percentiles of any number of values in bounded memory."""

from __future__ import annotations

import math
from collections import Counter

from onnxsplit.plan_base import PlanStruct

_BITS = 11  # of a value that are kept: buckets are 0.1 % wide at most


class Percentiles(PlanStruct, frozen=True, kw_only=True):
    """The distribution of times of one load. Percentiles are exact to 0.05 %, the other figures are exact.

    Attributes:
        count: the number of times; 0 makes all figures 0.
        mean_ns: their mean.
        min_ns: the smallest.
        max_ns: the largest.
        p50_ns: the median.
        p90_ns: the 90th percentile: nine of ten times are not above it.
        p95_ns: the 95th.
        p99_ns: the 99th.
        p99_9_ns: the 99.9th.
    """

    count: int
    mean_ns: int
    min_ns: int
    max_ns: int
    p50_ns: int
    p90_ns: int
    p95_ns: int
    p99_ns: int
    p99_9_ns: int


class TimeHistogram:
    """Counts values in buckets whose width is proportional to the value, as HdrHistogram does.

    At most some 50,000 buckets exist for values below 2^63, whatever their number.

    Attributes:
        count: the number of values.
        total: their sum.
        most: the largest of them; 0 without any.
    """

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = self.total = self.most = 0
        self._least: int | None = None

    def add(self, value: int) -> None:
        """Count a value; one below 0 counts as 0."""
        value = max(0, value)
        shift = max(0, value.bit_length() - _BITS)
        self._buckets[(shift << (_BITS - 1)) + (value >> shift)] += 1
        self.count += 1
        self.total += value
        self.most = max(self.most, value)
        self._least = value if self._least is None else min(self._least, value)

    def update(self, other: TimeHistogram) -> None:
        """Count all values of another histogram."""
        if other._least is None:
            return
        self._buckets.update(other._buckets)
        self.count += other.count
        self.total += other.total
        self.most = max(self.most, other.most)
        self._least = other._least if self._least is None else min(self._least, other._least)

    @property
    def mean(self) -> float:
        """The mean of the values; 0 without any."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> int:
        """The smallest value that at least ``percent`` of 100 values do not exceed; 0 without values."""
        left = max(1, math.ceil(round(self.count * percent / 100, 6)))  # the product is not exact
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return self._value(bucket)
        return 0

    def _value(self, bucket: int) -> int:
        """The middle of a bucket, within the values that were counted."""
        shift = max(0, (bucket >> (_BITS - 1)) - 1)
        low = (bucket - (shift << (_BITS - 1))) << shift
        return min(self.most, max(self._least or 0, low + (1 << shift) // 2))

    def percentiles(self) -> Percentiles:
        """The usual percentiles of the values."""
        return Percentiles(
            count=self.count,
            mean_ns=round(self.mean),
            min_ns=self._least or 0,
            max_ns=self.most,
            p50_ns=self.percentile(50),
            p90_ns=self.percentile(90),
            p95_ns=self.percentile(95),
            p99_ns=self.percentile(99),
            p99_9_ns=self.percentile(99.9),
        )
