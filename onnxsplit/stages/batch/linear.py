"""Integers that may depend on the number of rows, and small arrays of them.

Exported models compute the shapes that they reshape and expand to, by ``Shape``, ``Gather``, ``Mul`` and ``Concat``.
Such a number is followed as ``per_row * rows + fixed``. A statement about it must hold for every number of rows from 1
up; a question whose answer depends on the number of rows raises :class:`Undecided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_ELEMENTS = 128
"""The most elements of an array that is followed; shapes are short."""

Values = np.ndarray[Any, Any]
"""An array of dtype ``object`` that holds Python numbers, and :class:`Linear` for those that depend on the rows."""


class Undecided(Exception):
    """The answer depends on the number of rows, or is not known."""


@dataclass(frozen=True, eq=False)
class Linear:
    """The number ``per_row * rows + fixed``; ``per_row`` is never zero."""

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
    """The number ``per_row * rows + fixed``, as a plain integer if ``per_row`` is zero."""
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
    """An array of numbers; it has one dimension unless a shape is given."""
    array = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):
        array[place] = item
    return array if shape is None else array.reshape(shape)


def is_plain(array: Values) -> bool:
    """Whether no element depends on the number of rows."""
    return not any(isinstance(item, Linear) for item in array.flat)
