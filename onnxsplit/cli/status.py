"""The command ``onnxsplit status``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxsplit.cli.help import option
from onnxsplit.cli.output import Output, binary, make_command, milliseconds
from onnxsplit.cli.values import NumberParam

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from onnxsplit.cli.tables import Cell
    from runtime.coordinator.status import Snapshot

_BETWEEN_S = 0.5
_COLUMNS = (
    *("node", "stage", "replicas", "host", "process", "device", "state"),
    *("requests/s", "p99", "queue", "failures", "restarts"),
)
_LEFT = ("host", "process", "device", "state")
_MAY_GO = (  # node names the stage, too
    *("stage", "process", "queue", "host", "device"),
    *("replicas", "restarts", "p99", "failures", "requests/s", "state"),
)


@make_command
@option("--pid", type=click.IntRange(1, 1 << 22), metavar="PID", help="Show only the pipeline of this process.")
@option("--once", is_flag=True, help="Show the pipelines once, even on a terminal.")
@option("--every", type=NumberParam(0.1, 86_400), default=1.0, metavar="SECONDS", help="Time between two updates.")
def command(output: Output, *, pid: int | None, once: bool, every: float) -> None:
    """Show the pipelines that run on this host: the first failure, then one row for each node. Stop with Ctrl-C."""
    live = sys.stdout.isatty() and not once and not output.as_json
    if live:
        from rich.live import Live

        from onnxsplit.cli.tables import table_console

        before = _snapshots(pid)
        time.sleep(_BETWEEN_S)
        now = _snapshots(pid)
        console = table_console()
        with Live(_tables(before, now, room=console.width), console=console, auto_refresh=False, screen=True) as screen:
            while True:
                time.sleep(every)
                before, now = now, _snapshots(pid)
                screen.update(_tables(before, now, room=console.width), refresh=True)
    before = _snapshots(pid)
    if before:
        time.sleep(_BETWEEN_S)
    now = _snapshots(pid)
    if not now:
        output.line("No pipeline is running on this host. Start one with: onnxsplit run DIR, or onnxsplit.Pipeline.")
    elif not output.as_json:
        from onnxsplit.cli.tables import table_console

        console = table_console()
        console.print(_tables(before, now, room=console.width if sys.stdout.isatty() else None))
    output.result({"pipelines": list(now.values())})


def _snapshots(pid: int | None) -> dict[Path, Snapshot]:
    """Snapshots of the pipelines on this host by the addresses of their status; a process may have several."""
    from runtime.coordinator.status import ask
    from runtime.home import running

    found = {address: snapshot for address in running() if (snapshot := ask(address)) is not None}
    return {address: snapshot for address, snapshot in found.items() if pid in (None, snapshot.pid)}


def _cause(snapshot: Snapshot) -> str:
    """The first failure, in one line."""
    which = f"first of {snapshot.losses} failures: " if snapshot.losses else ""
    return which + snapshot.cause.splitlines()[0]


def _summary(snapshot: Snapshot) -> list[str]:
    """A line about requests, and one about sequences if the plan has a decoder."""
    does = f"; {snapshot.role}" if snapshot.role else ""
    lines = [
        f"{snapshot.plan}  (process {snapshot.pid}, {snapshot.state}{does}): {snapshot.requests} requests, "
        f"{snapshot.in_flight} in flight, {snapshot.waiting} waiting for a node, {snapshot.retries} retried"
    ]
    if snapshot.sequences is not None:
        counts = snapshot.sequences
        lines.append(
            f"{counts.running} sequences running, {counts.waiting} waiting for room, {counts.tokens} tokens, "
            f"{counts.replays} read again after a loss; {binary(sum(node.state_bytes for node in snapshot.nodes))} of "
            "caches"
        )
    return lines


def _rows(before: Snapshot | None, now: Snapshot) -> list[tuple[Cell, ...]]:
    """A row for each node; rates are taken between two snapshots."""
    from rich.text import Text

    earlier = {(n.stage, n.replica): n for n in before.nodes} if before is not None else {}
    seconds = max(1e-9, (now.taken_ns - before.taken_ns) / 1e9) if before is not None else 1.0
    replicas = {each.stage: str(each) for each in now.stages}
    rows: list[tuple[Cell, ...]] = []
    for node in now.nodes:
        old = earlier.get((node.stage, node.replica))
        rate = (node.requests - old.requests) / seconds if old is not None else 0.0
        left = sum(node.left_to_cpu.values())
        rows.append(
            (
                f"{node.stage}.{node.replica}",
                f"{node.stage}",
                replicas.get(node.stage, "-"),
                node.host or "-",
                f"{node.pid or '-'}",
                node.provider + (f" ({left} ops on the CPU)" if left else ""),
                Text(node.state, style="green" if node.state == "ready" else "red"),
                f"{rate:,.1f}",
                milliseconds(node.p99_ns),
                f"{node.queue:.1f}",
                f"{node.failures}",
                f"{node.restarts}",
            )
        )
    return rows


def _tables(before: dict[Path, Snapshot], now: dict[Path, Snapshot], *, room: int | None) -> Group:
    """One table for each pipeline, as wide as the terminal has room; None for any width."""
    from rich.console import Group
    from rich.text import Text

    from onnxsplit.cli.tables import fitted, not_shown

    parts: list[RenderableType] = []
    for address, snapshot in now.items():
        if snapshot.cause:
            parts.append(Text(_cause(snapshot), style="red"))
        parts += map(Text, _summary(snapshot))
        rows = _rows(before.get(address), snapshot)
        table, dropped = fitted(_COLUMNS, rows, room=room, may_go=_MAY_GO, left=_LEFT)
        parts.append(table)
        if dropped:
            parts.append(Text(not_shown(dropped), style="dim"))
    return Group(*(parts or [Text("No pipeline is running on this host.")]))
