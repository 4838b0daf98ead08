"""Long listings in few rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

_FEWEST = 4  # as many rows are read more easily as one
_MOST = 8  # rows of a listing that is shown whole
_NUMBER = re.compile(r"\d+")

T = TypeVar("T")


def folded(rows: Sequence[tuple[str, ...]], names: int) -> list[tuple[tuple[str, ...], int]]:
    """Rows, and how many rows each stands for; each stands where the first of its rows stood.

    Args:
        rows: cells.
        names: the number of leading cells that are names. In a row that stands for several, ``*`` stands for the
            numbers in them. The other cells of such rows are equal.
    """
    series: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        starred = tuple(_NUMBER.sub("*", name) for name in row[:names])
        series.setdefault((*starred, *row[names:]), []).append(row)
    found: list[tuple[tuple[str, ...], int]] = []
    for starred, members in series.items():
        if len(members) >= _FEWEST:
            found.append((starred, len(members)))
        else:
            found += [(member, 1) for member in members]
    return found


def first_of_many(rows: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The rows to show, and the others: of many rows, only the first ones are shown."""
    shown = len(rows) if len(rows) <= _MOST else _MOST // 2
    return rows[:shown], rows[shown:]
