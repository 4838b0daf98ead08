"""The results of ``onnxsplit load`` as tables, and as a file in the columns of perf_analyzer."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from onnxsplit.cli.output import Output
from onnxsplit.errors import InputError, without_controls
from onnxsplit.files import replacing
from runtime.load.point import LoadPoint
from runtime.load.sweep import LoadRow
from runtime.load.text import BETWEEN_TOKENS, FIRST_TOKEN, TOKENS

_MAY_GO = ("p90", "p99.9", "p95", "stable", "p50", "failed", "p99", "answers/s")
_TEXT_COLUMNS = ("tokens/s", "first p50", "first p99", "between p50", "between p99")
_TEXTS_MAY_GO = ("between p99", "first p99", "between p50", "first p50", "tokens/s")


def show(output: Output, rows: Sequence[LoadRow]) -> None:
    """Print the tables for people: rates and latencies, texts, where the time went, and what makes them doubtful."""
    if not rows:
        return
    points = [row.point for row in rows]
    head = "requests/s" if points[0].concurrency is None else "in flight"
    columns = (head, "answers/s", "p50", "p90", "p95", "p99", "p99.9", "failed", "stable")
    output.line("Latencies in ms:\n")
    output.table(columns, [_rate_cells(point) for point in points], may_go=_MAY_GO)
    if any(TOKENS in point.counts_per_s for point in points):
        output.line("\nTexts; times in ms until the first token, and between tokens:\n")
        output.table((head, *_TEXT_COLUMNS), [_text_cells(point) for point in points], may_go=_TEXTS_MAY_GO)
    if any(row.parts for row in rows):
        output.line("\nMean time of a request in ms; in each part, waiting + running:\n")
        names = [part.name for part in max((row.parts for row in rows), key=len)]
        output.table(
            (head, "all", "network", *names),
            [_part_cells(row, names) for row in rows],
            may_go=(*reversed(names), "network", "all"),
        )
    for point in points:
        for remark in _remarks(point):
            output.line(f"\n{_load(point)} {head}: {without_controls(remark)}")


def _load(point: LoadPoint) -> str:
    return f"{point.rate_per_s:g}" if point.concurrency is None else f"{point.concurrency}"


def _ms(time_ns: float, *, known: object = True) -> str:
    if not known:
        return "-"
    return f"{time_ns / 1e6:.{3 if abs(time_ns) < 1e6 else 2 if abs(time_ns) < 1e7 else 1}f}"


def _rate_cells(point: LoadPoint) -> tuple[str, ...]:
    times = point.latency
    percentiles = (times.p50_ns, times.p90_ns, times.p95_ns, times.p99_ns, times.p99_9_ns)
    return (
        _load(point),
        f"{point.answered_per_s:.1f}",
        *(_ms(time_ns, known=times.count) for time_ns in percentiles),
        f"{point.failed}",
        {None: "-", True: "yes", False: "no"}[point.stable],
    )


def _text_cells(point: LoadPoint) -> tuple[str, ...]:
    cells = [_load(point), f"{point.counts_per_s.get(TOKENS, 0):.1f}"]
    for name in (FIRST_TOKEN, BETWEEN_TOKENS):
        times = point.times.get(name)
        cells += ["-", "-"] if times is None else [_ms(times.p50_ns), _ms(times.p99_ns)]
    return tuple(cells)


def _part_cells(row: LoadRow, names: Sequence[str]) -> tuple[str, ...]:
    parts = {part.name: part for part in row.parts if part.count}
    mean_ns, elsewhere_ns = row.point.mean_of_all_ns, row.elsewhere_ns
    network = "-" if elsewhere_ns is None else _ms(elsewhere_ns)
    spent = (f"{_ms(parts[name].queue_ns)} + {_ms(parts[name].compute_ns)}" if name in parts else "-" for name in names)
    return (_load(row.point), _ms(mean_ns, known=mean_ns), network, *spent)


def _remarks(point: LoadPoint) -> list[str]:
    found = list(point.remarks)
    for kind, count in point.failures.items():
        message = point.messages.get(kind, "")
        found.append(f"{count} failed with {kind}{f': {message:.300}' if message else ''}")
    if point.unanswered:
        found.append(f"{point.unanswered} requests had no answer some time after the end of the load.")
    return found


def write_csv(file: Path, rows: Sequence[LoadRow], batch: int) -> None:
    """Write the results with perf_analyzer's names and units (microseconds) where the meaning is the same.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [part.name for part in max((row.parts for row in rows), key=len, default=())]
    head = "Request Rate" if rows and rows[0].point.concurrency is None else "Concurrency"
    percentiles = [f"{name} latency" for name in ("p50", "p90", "p95", "p99", "p99.9", "Avg")]
    parts = [f"{name} {what}" for name in names for what in ("Queue", "Compute")]
    writer.writerow([head, "Inferences/Second", "Network+Server Send/Recv", *percentiles, "Failed", "Stable", *parts])
    for row in rows:
        point, times = row.point, row.point.latency
        found = {part.name: part for part in row.parts}
        figures = (times.p50_ns, times.p90_ns, times.p95_ns, times.p99_ns, times.p99_9_ns, times.mean_ns)
        spent = [
            ns for name in names for ns in ((found[name].queue_ns, found[name].compute_ns) if name in found else (0, 0))
        ]
        writer.writerow(
            [
                _load(point),
                f"{point.answered_per_s * batch:.3f}",
                "" if row.elsewhere_ns is None else row.elsewhere_ns // 1000,
                *(figure // 1000 for figure in figures),
                point.failed,
                "" if point.stable is None else int(point.stable),
                *(ns // 1000 for ns in spent),
            ]
        )
    try:
        with replacing(file) as temporary:
            temporary.write_text(text.getvalue())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}. Choose another file with --csv") from error
