"""Chooses the rows of a step and their slots. Pure.

The rows of a step lie in neighbouring slots. A row whose slot does not fit is given another one, and the nodes move its
states there: that costs one copy, so as few rows as possible are moved.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnxsplit.plan_decoder import RowLayout


def taken_together(layout: RowLayout, lengths: Sequence[int]) -> list[int]:
    """The rows of the next step of a group.

    Args:
        layout: which rows may share a run.
        lengths: the length of each row; the row that has waited longest comes first.

    Returns:
        their indices. The first row is always among them, so every row has its turn.
    """
    if layout == "one":
        return [0]
    if layout == "equal":
        return [row for row, length in enumerate(lengths) if length == lengths[0]]
    return list(range(len(lengths)))


def neighbouring(slots: Sequence[int], free: Collection[int], start: int, stop: int) -> list[int]:
    """Neighbouring slots for rows, such that as few rows as possible move.

    Args:
        slots: the slot of each row now, all different. The row that has waited longest comes first.
        free: the slots that rows may move to.
        start: the first slot of the group.
        stop: the slot after its last one.

    Returns:
        the slot of each row in the step. When not all rows find neighbouring slots, the list is shorter, and the
        rows that have waited longest step alone. A single row always stays where it is.
    """
    for count in range(len(slots), 1, -1):
        rows = slots[:count]
        low, high = min(rows), max(rows)
        if high - low + 1 == count:
            return list(rows)
        own = set(rows)
        windows = [
            range(first, first + count)
            for first in range(start, stop - count + 1)
            if all(slot in own or slot in free for slot in range(first, first + count))
        ]
        if windows:
            window = max(windows, key=lambda window: (sum(slot in own for slot in window), -window[0]))
            spare = (slot for slot in window if slot not in own)
            return [slot if slot in window else next(spare) for slot in rows]
    return list(slots[:1])
