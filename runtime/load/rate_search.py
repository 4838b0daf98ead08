"""The search for the highest rate that keeps a p99. Pure.

A slice of a few seconds has a few hundred requests, so its p99 is known to a quarter or so, and chance decides single
comparisons with the p99 that is asked for. The search therefore fits a line to all slices: the logarithm of the p99
over the share of the limit that requests come at. Its slope is known beforehand about as well as a few slices tell it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NOISE = 0.25  # standard deviation of the logarithm of a slice's p99
_SLOPE, _SLOPE_DOUBT = 2.5, 1.0  # of the line, with the standard deviation of what is known beforehand
_LEAST_SLOPE = 0.5
_FAR, _FAR_WEIGHT = 0.7, 0.1  # the line is not straight, so slices further from the p99 that is asked for count less
_MOST = 1.0  # a p99 that is further away than this only says on which side the rate is
_LOWEST, _HIGHEST = 0.02, 0.98  # shares of the limit
_STEPS = (0.0, -0.06, 0.06)  # where the next slice is, from the rate found so far; spread, so that the slope is learnt
_LEAST_SLICES = 4
_CLEARLY = 2.0  # standard deviations


@dataclass(frozen=True)
class _Line:
    at: float
    value: float
    slope: float
    weight: float

    @property
    def crossing(self) -> float:
        """The share at which the p99 is the one that is asked for."""
        return self.at - self.value / self.slope


class RateSearch:
    """Finds the share of a target's limit at which its p99 is the one that is asked for.

    Args:
        p99_ns: the p99 that is asked for, in nanoseconds.
    """

    def __init__(self, p99_ns: int) -> None:
        self._p99_ns = max(1, p99_ns)
        self._slices: list[tuple[float, float]] = []  # the share, and the logarithm of the p99 over the one asked for

    @property
    def next_share(self) -> float:
        """The share of the limit for the next slice."""
        if not self._slices:
            return 0.5
        return _within(self.share + _STEPS[len(self._slices) % len(_STEPS)])

    def note(self, share: float, p99_ns: int, *, keeps_up: bool) -> None:
        """Take the p99 of a slice at a share of the limit, in nanoseconds, and whether the target kept up with it."""
        value = math.log(max(1, p99_ns) / self._p99_ns)
        self._slices.append((share, value if keeps_up else max(value, _MOST)))

    @property
    def share(self) -> float:
        """The highest share of the limit that keeps the p99, as far as it is known."""
        return _within(self._line().crossing)

    @property
    def doubt(self) -> float:
        """The standard deviation of the share."""
        line = self._line()
        return _NOISE / line.slope / math.sqrt(line.weight)

    @property
    def p99_ns(self) -> int:
        """The p99 at the share, by all slices; above the one asked for if no share keeps that."""
        line = self._line()
        return round(self._p99_ns * math.exp(line.value + line.slope * (self.share - line.at)))

    @property
    def keeps(self) -> bool:
        """Whether there is a share that keeps the p99."""
        return self._line().crossing >= _LOWEST

    def is_clearly_behind(self, limit_per_s: float, other: RateSearch, other_limit_per_s: float) -> bool:
        """Whether the rate of another target is higher, and chance is no likely reason."""
        if min(len(self._slices), len(other._slices)) < _LEAST_SLICES:
            return False
        doubt = math.hypot(self.doubt * limit_per_s, other.doubt * other_limit_per_s)
        return other.share * other_limit_per_s - self.share * limit_per_s > _CLEARLY * doubt

    def _line(self) -> _Line:
        """The line through all slices, by least squares with what is known of its slope."""
        points = [
            (share, max(-_MOST, min(_MOST, value)), 1.0 if abs(value) <= _FAR else _FAR_WEIGHT)
            for share, value in self._slices
        ]
        weight = sum(w for _, _, w in points)
        at = sum(w * x for x, _, w in points) / weight
        value = sum(w * y for _, y, w in points) / weight
        across = sum(w * (x - at) ** 2 for x, _, w in points) / _NOISE**2
        along = sum(w * (x - at) * (y - value) for x, y, w in points) / _NOISE**2
        prior = 1 / _SLOPE_DOUBT**2
        slope = max(_LEAST_SLOPE, (along + prior * _SLOPE) / (across + prior))
        return _Line(at, value, slope, weight)


def _within(share: float) -> float:
    return max(_LOWEST, min(_HIGHEST, share))
