"""Tables on narrow terminals: whole columns are left out, and a line says so; cells and heads stay whole."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from onnxsplit.cli import bench, cluster, status
from onnxsplit.cli.load_table import show as show_load
from onnxsplit.cli.output import Output
from onnxsplit.cli.plan_table import show_plan
from onnxsplit.cli.tables import fitted
from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.plan_files import load_plan
from runtime.bench import BenchReport
from runtime.bench_load import LoadLatency
from runtime.bench_rates import Row
from runtime.coordinator.status import NodeStats, Snapshot
from runtime.load.point import LoadPoint, Percentiles
from runtime.load.sweep import LoadRow

HOST = "rack-17-unit-42.example.org.it"  # 30 characters
WIDTHS = [60, 80, 120]
HIDDEN = re.compile(r"(\d+) columns? (is|are) not shown; widen the terminal, or use --json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def output() -> Output:
    return Output(as_json=False)


@pytest.fixture(params=WIDTHS)
def terminal(request, monkeypatch):
    """A width, and a function that makes standard output a terminal of this width."""

    def begin() -> Terminal:  # in the test itself, because pytest replaces the stream after fixtures
        for name, value in (("COLUMNS", request.param), ("LINES", 50), ("TERM", "xterm")):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "stdout", shown := Terminal())
        return shown

    return request.param, begin


def lines_of(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def parts(line: str) -> list[str]:
    return [part for part in re.split(r"\s{3,}", line.strip()) if part]


def tables_of(text: str) -> list[tuple[list[str], list[str], int]]:
    """Return the heads, the lines of the body, and the number of left out columns of each table."""
    lines, found = lines_of(text), []
    for at, line in enumerate(lines):
        if line and set(line) == {"─"}:
            body = []
            for row in lines[at + 1 :]:
                if not row.strip() or HIDDEN.match(row) or set(row) == {"─"}:
                    break
                body.append(row)
            end = lines[at + 1 + len(body)] if at + 1 + len(body) < len(lines) else ""
            hidden = HIDDEN.match(end)
            head = lines[at - 1]
            heads = [""] * head.startswith("   ") + parts(head)  # the first column may have no head
            found.append((heads, body, int(hidden[1]) if hidden else 0))
    return found


def node(replica: int) -> NodeStats:
    numbers = dict.fromkeys(
        ("retries", "wait_ns", "run_ns", "waited_ns", "ran_ns", "p50_ns", "output_bytes", "shared_bytes"), 0
    )
    return NodeStats(
        stage=12, replica=replica, pid=4_194_304, host=HOST, state="ready", provider="cuda:0", requests=9_999_999,
        failures=1_234_567, restarts=1234, queue=1234.5, p99_ns=12_345_678_900, run_buckets=(),
        left_to_cpu={"NonZero": 123}, **numbers,
    )  # fmt: skip


def snapshot() -> dict[int, Snapshot]:
    one = Snapshot("m.plan", 4_194_304, "running", 10**9, 1, 0, 0, 0, 0, "", (node(0), node(10)))
    return {one.pid: one}


@pytest.mark.parametrize("room", [*WIDTHS, 200])
def test_status_leaves_columns_out_and_cuts_none(room):
    console = Console(file=io.StringIO(), width=room)
    console.print(status._tables({}, snapshot(), room=room))
    ((heads, body, hidden),) = tables_of(console.file.getvalue())
    assert set(heads) <= set(status._COLUMNS)
    assert len(heads) + hidden == len(status._COLUMNS)
    assert heads[0] == "node"
    assert [parts(row)[0] for row in body] == ["12.0", "12.10"]
    assert all(len(parts(row)) == len(heads) and len(row) <= room for row in body)
    assert (HOST in body[0]) == ("host" in heads)
    assert {"state", "requests/s"} <= set(heads)
    assert (hidden == 0) == (room == 200)


def rate_row(name: str) -> Row:
    return Row(
        name=name, per_s=123_456.7, low=123_456.7, high=123_456.7, ratio=12.345, ratio_low=12.345, ratio_high=12.345,
        rates_per_s=(),
    )  # fmt: skip


def bench_report() -> BenchReport:
    names = ("pipeline", "ceiling of the stages", "one session, 128 threads")
    figures = {"rate_per_s": 123_456.7, "p50_ns": 10**9, "p99_ns": 10**10, "requests": 9, "keeps_up": False}
    loads = tuple(LoadLatency(name=name, share=share, **figures) for share in (0.5, 0.8) for name in names[::2])
    return BenchReport(
        rows=tuple(map(rate_row, names)), basis=names[2], loads=loads, latency_p50_ns=1, stages_ns=1, whole_ns=1,
        without_whole="", slices=20, threads=1,
    )  # fmt: skip


def load_rows() -> list[LoadRow]:
    times = Percentiles(**dict.fromkeys(Percentiles.__struct_fields__, 12_345_678_900))
    numbers = dict.fromkeys(LoadPoint.__struct_fields__, 1)
    fields = {
        "concurrency": 1024, "answered_per_s": 123_456.7, "latency": times, "failures": {"late": 1_234_567},
        "messages": {}, "counts_per_s": {}, "times": {}, "remarks": (), "stable": True,
    }  # fmt: skip
    return [LoadRow(point=LoadPoint(**{**numbers, **fields}), parts=(), elsewhere_ns=None)]


def show_cluster(output: Output) -> None:
    devices = tuple(Device(f"{HOST}-gpu{number}", host=HOST, not_ops=("NonZero", "Resize")) for number in range(2))
    cluster._show(output, Cluster(devices, {(HOST, HOST[::-1]): Link(latency_ns=10**8, bytes_per_s=10**10)}))


SHOWN = {
    "bench": lambda output, _: bench._show(output, bench_report(), 0.5),
    "load": lambda output, _: show_load(output, load_rows()),
    "partition": lambda output, plan: show_plan(output, load_plan(plan)),
    "cluster": lambda output, _: show_cluster(output),
}


@pytest.mark.parametrize("command", SHOWN)
def test_tables_leave_columns_out_and_cut_none(command, terminal, output, chain_plan, monkeypatch):
    room, begin = terminal
    shown = begin()
    SHOWN[command](output, chain_plan)
    narrow = tables_of(shown.getvalue())
    monkeypatch.setattr(sys, "stdout", piped := io.StringIO())
    SHOWN[command](output, chain_plan)
    assert not HIDDEN.search(piped.getvalue())
    whole = tables_of(piped.getvalue())
    assert len(narrow) == len(whole) > 0
    for (heads, body, hidden), (all_heads, all_body, _) in zip(narrow, whole, strict=True):
        assert all(len(row) <= room for row in body)
        assert set(heads) <= set(all_heads)
        assert len(heads) + hidden == len(all_heads)
        assert len(heads) > 1
        if parts(all_body[0])[0] not in body[0]:
            continue  # the first column leaves no room, so its cells have several lines
        assert len(body) == len(all_body)
        for row, all_row in zip(body, all_body, strict=True):
            assert set(parts(row)) <= set(parts(all_row))


ROW = ("a" * 10, "b" * 10, "c" * 10, "d" * 10)


@pytest.mark.parametrize(
    ("room", "may_go", "left"),
    [
        (None, (), "wxyx"),
        (49, (), "wxyx"),
        (48, (), "wxy"),
        (48, ("y",), "wxx"),
        (48, ("x",), "wxy"),
        (35, ("x", "x"), "wy"),
        (35, ("x", "y"), "wx"),
        (23, (), "wx"),
    ],
)
def test_columns_go_in_the_order_of_the_table(room, may_go, left):
    table, hidden = fitted("wxyx", [ROW], room=room, may_go=may_go)
    assert "".join(str(column.header) for column in table.columns) == left
    assert hidden == 4 - len(left)


def printed(table, room: int) -> list[str]:
    console = Console(file=io.StringIO(), width=room)
    console.print(table)
    return lines_of(console.file.getvalue())


def test_a_first_column_that_leaves_no_room_has_several_lines():
    table, hidden = fitted(("name", "x", "y"), [("n" * 70, "1" * 20, "2" * 20)], room=60)
    assert hidden == 1
    body = printed(table, 60)[2:]
    assert "".join(parts(row)[0] for row in body) == "n" * 70
    assert "1" * 20 in body[0]
    assert max(map(len, body)) <= 60


def test_a_table_of_one_column_has_cells_of_several_lines():
    table, hidden = fitted(("name",), [("n" * 70,)], room=60)
    assert hidden == 0
    assert [row.strip() for row in printed(table, 60)[2:]] == ["n" * 60, "n" * 10]


def test_sentences_are_broken_between_words_and_never_left_out():
    why = "it cannot be used here because a library is missing on this host"
    table, hidden = fitted(("name", "x", "state"), [("n" * 20, "1" * 30, why)], room=60, prose=("state",))
    assert hidden == 1
    body = printed(table, 60)[2:]
    assert " ".join(parts(row)[-1] for row in body) == why


def test_one_column_is_one_column(terminal, output):
    room, begin = terminal
    shown = begin()
    output.table(("name", "x", "y"), [("n" * (room - 20), "x" * 10, "y" * 30)])
    assert lines_of(shown.getvalue())[-1] == "1 column is not shown; widen the terminal, or use --json"


def test_names_that_look_like_markup_are_printed_as_they_are(output, capsys):
    output.table(("output", "type"), [("[red]x[/red]:smile:", "float32")])
    assert "[red]x[/red]:smile:" in capsys.readouterr().out
