"""The figures of all nodes as a table, for terminals and notebooks."""

from __future__ import annotations

from html import escape

from onnxsplit.drawing.stages import time_text
from runtime.coordinator.status import NodeStats

_HEAD = ("node", "state", "provider", "requests", "waited", "ran", "p99", "queue", "failures", "restarts")
_TEXTS = 3  # the first columns hold text, which is aligned to the left


class NodeTable(tuple[NodeStats, ...]):
    """The figures of all nodes: a tuple that prints as a table, also in notebooks."""

    def __repr__(self) -> str:
        rows = [_HEAD, *map(_row, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if number < _TEXTS else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<table>{_html_row('th', _HEAD)}{''.join(_html_row('td', _row(node)) for node in self)}</table>"


def _row(node: NodeStats) -> tuple[str, ...]:
    return (
        f"{node.stage}.{node.replica}",
        node.state,
        node.provider,
        f"{node.requests}",
        time_text(node.wait_ns),
        time_text(node.run_ns),
        time_text(node.p99_ns),
        f"{node.queue:.1f}",
        f"{node.failures}",
        f"{node.restarts}",
    )


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    sides = ["left" if number < _TEXTS else "right" for number in range(len(cells))]
    return "<tr>{}</tr>".format(
        "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )
    )
