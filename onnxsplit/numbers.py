"""Checks of the numbers that callers give, and their largest allowed values."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TypeGuard

from onnxsplit.errors import shown

MOST_SIZE = 2**31 - 1
"""The largest size of a dimension, and the largest number of rows of a batch."""

MOST_SECONDS = 10_000_000.0
"""The longest time that is accepted, in seconds: 115 days."""

MOST_BYTES = 1 << 50
"""The largest size that is accepted, in bytes: one pebibyte."""

MOST_FILE_BYTES = 512 << 30
"""The largest size in bytes of one file of a model or a plan."""

MOST_ROUNDS = 100
"""The largest number of rounds in which the real stages are run to correct a cut."""

MOST_STEP_ROWS = 1024
"""The largest number of rows in the step that the costs of a decoder are taken at."""

MOST_INFLIGHT = 1_000_000
"""The largest limit on the requests that one pipeline has in flight."""

MOST_ATTEMPTS = 1_000_000
"""The largest number of attempts that a request can be given."""

LEAST_SPEED, MOST_SPEED = 1e-6, 1e6
"""The bounds of the speed of a device relative to before."""

MOST_GAIN_PERCENT = 1e6
"""The largest gain of a new cut that can be demanded, in percent."""


def whole_problem(name: str, value: object, least: int, most: int) -> str | None:
    """Check a whole number, such as an ``int`` or an integer of NumPy; a ``bool`` is not one.

    Args:
        name: the option or argument that the message names.
        value: what the caller gave.
        least: the smallest allowed value.
        most: the largest allowed value.

    Returns:
        A message that says what is allowed and what was found; None when the value is allowed.
    """
    if is_whole(value) and least <= value <= most:
        return None
    return f"{name} must be a whole number, at least {least} and at most {most}, not {shown(value)}"


def real_problem(name: str, value: object, most: float, *, zero: bool = False) -> str | None:
    """Check a number that may have a fraction: above 0 (or 0 too, with ``zero``) and at most ``most``.

    The result is as for :func:`whole_problem`.
    """
    if is_real(value) and (0 < value <= most or (zero and value == 0)):
        return None
    least = "of at least 0" if zero else "above 0"
    return f"{name} must be a number {least} and at most {most:.12g}, not {shown(value)}"


def speed_problem(device: str, value: object) -> str | None:
    """Check the speed of a device relative to when its plan was made; the result is as for :func:`whole_problem`."""
    if is_real(value) and LEAST_SPEED <= value <= MOST_SPEED:
        return None
    return (
        f"the speed of {shown(device)} must be a number from {LEAST_SPEED:g} to {MOST_SPEED:g}, not {shown(value)}; "
        "0.5 is half as fast as when the plan was made"
    )


def as_int(value: object) -> object:
    """Turn an integer of any library into an ``int``; return anything else unchanged."""
    return int(value) if is_whole(value) else value


def parse_whole(text: str, most: int) -> int | None:
    """Read a whole number from 0 to ``most``; return None when the text is not one."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 30 or int(text) > most:
        return None
    return int(text)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of any library; a ``bool`` is not one."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_real(value: object) -> TypeGuard[float]:
    """Whether a value is a number of any library, perhaps with a fraction; a ``bool`` is not one."""
    return not isinstance(value, bool) and isinstance(value, Real)
