"""The search for the highest rate that keeps a condition, by trials some of which chance spoils. Pure."""

from __future__ import annotations

_ROUGH = 1 / 8
_LOWEST = 0.02


class RateSearch:
    """A bisection between 0 and the limit of a target.

    Something else on the host may delay a few requests of any trial, and 1 % of late requests is enough to spoil a 99th
    percentile. A rate is therefore too high only if two trials in succession say so.

    Attributes:
        low: the highest share of the limit that was kept; 0 if none was.
        high: the lowest share that was not; 1 if all were kept.
    """

    def __init__(self) -> None:
        self.low, self.high = 0.0, 1.0
        self._doubted = False

    @property
    def share(self) -> float | None:
        """The share of the limit that the next trial is made at; None if hardly any requests are left at it."""
        middle = (self.low + self.high) / 2
        return middle if middle >= _LOWEST else None

    @property
    def is_second(self) -> bool:
        """Whether the next trial repeats one that did not keep the condition."""
        return self._doubted

    def note(self, kept: bool) -> None:
        """Take the result of a trial at the present share."""
        middle = (self.low + self.high) / 2
        if kept:
            self.low = middle
        elif self._doubted:
            self.high = middle
        self._doubted = not kept and not self._doubted

    def is_beaten(self, best: float) -> bool:
        """Whether the share is known roughly, and is below another one."""
        return self.low > 0 and self.high - self.low <= _ROUGH and self.high < best
