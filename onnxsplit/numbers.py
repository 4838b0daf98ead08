"""Numbers that callers give: whole or finite, and within bounds."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard

MOST_SIZE = 2**31 - 1
"""The largest size of a dimension that can be asked for, and the most rows of a batch."""

MOST_SECONDS = 10_000_000.0
"""The longest time that can be asked for: 115 days."""

MOST_BYTES = 1 << 50
"""The largest size in bytes that can be asked for: a pebibyte."""

MOST_ROUNDS = 100
"""How often the real stages can be run to correct a cut."""

MOST_INFLIGHT = 1_000_000
"""Requests of one pipeline that can be allowed in flight."""

MOST_ATTEMPTS = 1_000_000
"""How often a request can be allowed to kill a node."""


def whole_problem(name: str, value: object, least: int, most: int) -> str | None:
    """What is wrong with a number that must be whole and lie between two others; None when nothing is.

    NumPy's integers will do; booleans, floats and texts will not.
    """
    if is_whole(value) and least <= value <= most:
        return None
    return f"{name} must be a whole number, at least {least} and at most {most}, not {_shown(value)}"


def real_problem(name: str, value: object, most: float, *, zero: bool = False) -> str | None:
    """As :func:`whole_problem`, for a number above 0, or from 0, that may have a fraction."""
    if _is_real(value) and (0 < value <= most or (zero and value == 0)):
        return None
    least = "of at least 0" if zero else "above 0"
    return f"{name} must be a number {least}, not {_shown(value)} (at most {most:.12g})"


def as_int(value: object) -> object:
    """A whole number of any library as Python's own; anything else as it is."""
    return int(value) if is_whole(value) else value


def parse_whole(text: str, most: int) -> int | None:
    """A whole number that is not negative and at most ``most``; None when the text is none."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 30 or int(text) > most:
        return None
    return int(text)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of any library; booleans are none."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_real(value: object) -> TypeGuard[float]:
    return not isinstance(value, bool) and isinstance(value, Real)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]} ..."


MOST_FILE_BYTES = 512 << 30
"""Bytes that any one file of a model or a plan may have."""
