"""Finds stop strings in a text that comes in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds text back until it can no longer be the beginning of a stop string.

    Args:
        stops: the stop strings; none is empty.
        include: whether the text that is given out contains the stop string that was found.

    Attributes:
        found: the stop string that was found; None for none. The first that is complete counts, and of several that
            end at one place, the longest. So the pieces in which a text comes make no difference.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self._overlaps = [0] * len(self._stops)  # of the held text with the beginning of each

    def add(self, text: str) -> str:
        """Add new text; returns what is final. After a stop string was found, everything is dropped."""
        if self.found is not None:
            return ""
        held = self._held + text
        places = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            end, place = min(places)
            self.found, self._held = held[place:end], ""
            return held[:end] if self._include else held[:place]
        self._overlaps = [
            _overlap(held, stop, most + len(text)) for stop, most in zip(self._stops, self._overlaps, strict=True)
        ]
        keep = max(self._overlaps, default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text has ended; returns what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str, most: int) -> int:
    """The length of the longest end of a text that is a beginning of a stop string, but not all of it.

    It is at most ``most``: with each character, it grows by one or shrinks. So a text takes one comparison a character.
    """
    longest = min(len(text), len(stop) - 1, most)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
