"""Whole numbers that may depend on the number of rows, and small arrays of them.

Exported models compute the shapes they reshape and expand to: ``Shape``, ``Gather``, ``Mul``, ``Concat``. Such a number
is followed as ``per_row * rows + fixed``. What holds for it must hold for every number of rows from one up; a question
whose answer depends on that number raises :class:`Undecided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_ELEMENTS = 128
"""Arrays of more elements are not followed: shapes are short."""

Values = np.ndarray[Any, Any]
"""An array of ``object``: Python numbers, and :class:`Linear` where the number of rows comes in."""


class Undecided(Exception):
    """The answer depends on the number of rows, or cannot be told."""


@dataclass(frozen=True, eq=False)
class Linear:
    """``per_row * rows + fixed``, with ``per_row`` never zero."""

    per_row: int
    fixed: int = 0

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return self != 0

    def __add__(self, other: object) -> Linear | int:
        per_row, fixed = _parts(other)
        return linear(self.per_row + per_row, self.fixed + fixed)

    __radd__ = __add__

    def __neg__(self) -> Linear:
        return Linear(-self.per_row, -self.fixed)

    def __sub__(self, other: object) -> Linear | int:
        per_row, fixed = _parts(other)
        return linear(self.per_row - per_row, self.fixed - fixed)

    def __rsub__(self, other: object) -> Linear | int:
        return -self + other

    def __mul__(self, other: object) -> Linear | int:
        per_row, factor = _parts(other)
        if per_row:
            raise Undecided
        return linear(self.per_row * factor, self.fixed * factor)

    __rmul__ = __mul__

    def __floordiv__(self, other: object) -> Linear | int:
        per_row, fixed = _parts(other)
        if per_row:
            quotient = self.per_row // per_row
            if (self.per_row, self.fixed) != (quotient * per_row, quotient * fixed):
                raise Undecided
            return quotient
        if fixed == 0 or self.per_row % fixed or self.fixed % fixed:
            raise Undecided
        return linear(self.per_row // fixed, self.fixed // fixed)

    def __rfloordiv__(self, other: object) -> int:
        raise Undecided

    def __eq__(self, other: object) -> bool:
        return self._sign(other) == 0

    def __ne__(self, other: object) -> bool:
        return self._sign(other) != 0

    def __lt__(self, other: object) -> bool:
        return self._sign(other) < 0

    def __gt__(self, other: object) -> bool:
        return self._sign(other) > 0

    def __le__(self, other: object) -> bool:
        return self._sign(other) <= 0

    def __ge__(self, other: object) -> bool:
        return self._sign(other) >= 0

    def _sign(self, other: object) -> int:
        """The sign of ``self - other``, which must be the same for every number of rows."""
        per_row, fixed = _parts(other)
        slope, at_one = self.per_row - per_row, self.per_row + self.fixed - per_row - fixed
        if slope == at_one == 0:
            return 0
        if slope >= 0 and at_one > 0:
            return 1
        if slope <= 0 and at_one < 0:
            return -1
        raise Undecided


def linear(per_row: int, fixed: int) -> Linear | int:
    """A number that depends on the rows, or a plain one."""
    return Linear(per_row, fixed) if per_row else fixed


def _parts(number: object) -> tuple[int, int]:
    if isinstance(number, Linear):
        return number.per_row, number.fixed
    if isinstance(number, bool | int):
        return 0, int(number)
    if isinstance(number, float) and number.is_integer():
        return 0, int(number)
    raise Undecided


def values(items: Sequence[Any], shape: tuple[int, ...] | None = None) -> Values:
    """An array of such numbers, of one dimension unless a shape is given."""
    array = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):
        array[place] = item
    return array if shape is None else array.reshape(shape)


def is_plain(array: Values) -> bool:
    """True when no element depends on the number of rows."""
    return not any(isinstance(item, Linear) for item in array.flat)
