"""Rows of a listing whose names differ only in their numbers are shown as one."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FEWEST = 4  # as many rows are read more easily as one
_NUMBER = re.compile(r"\d+")


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
