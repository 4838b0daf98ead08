"""A small drawing of stages and the tensors between them, for notebooks: HTML that needs no script. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LINE, _PADDING = 190, 16, 10  # of a box, in pixels
_BETWEEN_X, _BETWEEN_Y = 90, 18
_MARGIN = 8


@dataclass(frozen=True)
class StageBox:
    """A stage of the drawing.

    Attributes:
        title: its name.
        lines: what is said of it, at most about 30 characters each.
        good: False marks a stage that cannot run.
    """

    title: str
    lines: tuple[str, ...]
    good: bool = True


def drawing_of(caption: str, boxes: Sequence[StageBox], edges: Mapping[tuple[int, int], int]) -> str:
    """Draw stages from left to right, each to the right of those that it reads from.

    Args:
        caption: a line above the drawing.
        boxes: the stages, in topological order.
        edges: the bytes that one request moves from one stage to another, by their positions.
    """
    columns = _columns(len(boxes), edges)
    height = 2 * _PADDING + _LINE * (1 + max((len(box.lines) for box in boxes), default=0))
    rows: dict[int, int] = {}
    places = []
    for column in columns:
        row = rows.get(column, 0)
        rows[column] = row + 1
        places.append((_MARGIN + column * (_WIDTH + _BETWEEN_X), _MARGIN + row * (height + _BETWEEN_Y)))
    width = max((x for x, _ in places), default=0) + _WIDTH + _MARGIN
    whole_height = max((y for _, y in places), default=0) + height + _MARGIN
    parts = [_arrow(places[one], places[other], height, size_text(size)) for (one, other), size in edges.items()]
    parts += [_box(box, place, height) for box, place in zip(boxes, places, strict=True)]
    return (
        f'<div style="overflow-x:auto"><div style="font:13px sans-serif">{escape(caption)}</div>'
        f'<svg role="img" aria-label="{escape(caption)}" width="{width}" height="{whole_height}" '
        f'style="font:12px sans-serif;color:inherit" fill="currentColor">{"".join(parts)}</svg></div>'
    )


def size_text(size_bytes: float) -> str:
    """A number of bytes, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.3g} GiB"


def time_text(time_ns: float) -> str:
    """A time in milliseconds, such as ``1.25 ms``."""
    return f"{time_ns / 1e6:.3g} ms"


def _columns(count: int, edges: Mapping[tuple[int, int], int]) -> list[int]:
    """The column of each stage: the length of the longest way to it."""
    columns = [0] * count
    for one, other in sorted(edges):
        columns[other] = max(columns[other], columns[one] + 1)
    return columns


def _box(box: StageBox, place: tuple[int, int], height: int) -> str:
    x, y = place
    stroke = "#3b7dd8" if box.good else "#c0392b"
    lines = "".join(
        f'<text x="{x + _PADDING}" y="{y + _PADDING + _LINE * (number + 1) - 4}" '
        f'font-weight="{"normal" if number else "bold"}">{escape(text)}</text>'
        for number, text in enumerate((box.title, *box.lines))
    )
    return (
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{height}" rx="5" fill="{stroke}" fill-opacity="0.12" '
        f'stroke="{stroke}"/>{lines}'
    )


def _arrow(start: tuple[int, int], end: tuple[int, int], height: int, label: str) -> str:
    x1, y1, x2, y2 = start[0] + _WIDTH, start[1] + height // 2, end[0] - 6, end[1] + height // 2
    middle = (x1 + x2) // 2
    return (
        f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}" fill="none" stroke="currentColor" '
        f'stroke-opacity="0.5"/><path d="M{x2} {y2 - 4} l7 4 l-7 4 z" fill-opacity="0.6"/>'
        f'<text x="{x1 + _BETWEEN_X // 2}" y="{(y1 + y2) // 2 - 5}" text-anchor="middle" font-size="11">{label}</text>'
    )
