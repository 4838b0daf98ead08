"""Which replica takes a request. Pure: numbers in, a choice out."""

from __future__ import annotations

from collections.abc import Sequence


def least_outstanding(outstanding: Sequence[int]) -> int:
    """The replica with the fewest requests on their way to it or in it; the first of equals."""
    return min(range(len(outstanding)), key=lambda replica: outstanding[replica])
