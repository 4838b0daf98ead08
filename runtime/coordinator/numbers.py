"""The numbers of requests, sequences and steps, which are counted together. Pure."""

from __future__ import annotations


class Numbers:
    """Counts from 0.

    Attributes:
        following: the number that comes next.
    """

    def __init__(self) -> None:
        self.following = 0

    def next(self) -> int:
        """Take the next number."""
        number = self.following
        self.following += 1
        return number
