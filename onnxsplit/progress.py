"""Progress of long work, reported in a few words through a callback."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""A callback that takes a few words about what is being done."""


def silent(_: str) -> None:
    """Report nothing; the default of functions that take a callback."""
