"""Tables that fit a terminal: whole columns are left out, the least important first. Heads and cells stay whole.

Only two kinds of cells are broken into lines: prose, and a first column that alone leaves no room for another.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text

_UNBOUNDED = 1 << 16  # characters of a line
_BETWEEN = 3  # characters between two columns
_LEAST_PROSE = 24  # characters of a line of prose


def fitted(
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    room: int | None,
    may_go: Sequence[str] = (),
    left: Collection[str] = (),
    prose: Collection[str] = (),
) -> tuple[Table, int]:
    """Lay out a table.

    Args:
        columns: the heads. The first column is aligned to the left and is never left out.
        rows: the cells.
        room: the width of the terminal; None where a table may have any width.
        may_go: heads of columns in the order in which they are left out. Of columns with the same head, the last one
            goes first. Columns that are not named go after these, from the right.
        left: heads of further columns that are aligned to the left.
        prose: heads of columns with sentences, which are broken into lines and never left out.

    Returns:
        The table, and the number of columns that were left out.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [max([Text(head).cell_len, *(row[n].cell_len for row in cells)]) for n, head in enumerate(columns)]
    fixed = {n for n, head in enumerate(columns) if head in prose} | {0}
    order = _order(columns, may_go, fixed)
    shown, first = list(range(len(columns))), None
    if room is not None:
        least = [min(width, _LEAST_PROSE) if n in fixed - {0} else width for n, width in enumerate(widths)]
        shown = _shown(least, order, room)
        if set(shown) == fixed and (order or _width(least, shown) > room):
            first = least[0] = min(least[0], room // 2 if len(columns) > 1 else room)
            shown = _shown(least, order, room)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for n in shown:
        table.add_column(
            Text(columns[n]),
            justify="left" if not n or columns[n] in {*left, *prose} else "right",
            overflow="fold",
            no_wrap=not (n and n in fixed) and (n > 0 or first is None),
            max_width=first if not n else None,
        )
    for row in cells:
        table.add_row(*(row[n] for n in shown))
    return table, len(columns) - len(shown)


def table_console() -> Console:
    """Where tables are printed: standard output, without a limit for lines if it is not a terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False)


def not_shown(count: int) -> str:
    """The line below a table of which columns were left out."""
    are = "column is" if count == 1 else "columns are"
    return f"{count} {are} not shown; widen the terminal, or use --json"


def _order(columns: Sequence[str], may_go: Sequence[str], fixed: Collection[int]) -> list[int]:
    """The positions of the columns that may be left out, the first to go first."""
    left = [n for n in reversed(range(len(columns))) if n not in fixed]
    named = []
    for head in may_go:
        place = next((n for n in left if columns[n] == head), None)
        if place is not None:
            left.remove(place)
            named.append(place)
    return named + left


def _shown(widths: Sequence[int], order: Sequence[int], room: int) -> list[int]:
    """The positions of the columns that fit."""
    shown = list(range(len(widths)))
    for place in order:
        if _width(widths, shown) <= room:
            break
        shown.remove(place)
    return shown


def _width(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[n] for n in shown) + _BETWEEN * (len(shown) - 1)
