"""Progress: long work says in a few words what it does, through one callback."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
"""Takes a few words that say what is being done now."""


def silent(_: str) -> None:
    """Say nothing: the default of every function that takes a callback."""
