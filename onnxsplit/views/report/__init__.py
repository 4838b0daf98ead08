"""The report of a cut: one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from onnxsplit import drawing
from onnxsplit.errors import PartitionError
from onnxsplit.files import replacing
from onnxsplit.plan import Plan
from onnxsplit.plan_base import PlanStruct
from onnxsplit.planning.result import PlanningResult
from onnxsplit.planning.sweep import SweepRow


class OpRow(PlanStruct, frozen=True, kw_only=True):
    """One op in the report.

    Attributes:
        name: name of the op.
        type: its op type.
        stage: its stage.
        atom: its atom; -1 for an op that is copied.
        time_ns: its time in nanoseconds.
        bytes: bytes that it writes.
        readers: positions, among the rows, of the ops that read from it.
    """

    name: str
    type: str
    stage: int
    atom: int
    time_ns: int
    bytes: int
    readers: tuple[int, ...]


class Content(PlanStruct, frozen=True, kw_only=True):
    """The data that the page shows: the model's name, the plan, its ops, and other numbers of stages."""

    model: str
    plan: Plan
    ops: tuple[OpRow, ...]
    sweep: tuple[SweepRow, ...]


def content(result: PlanningResult, sweep: Sequence[SweepRow] = ()) -> Content:
    """Collect the data that the page shows."""
    graph, shapes = result.subject.graph, result.subject.shapes
    stage_of = result.stage_of_ops()
    atom_of = {op: atom for atom, ops in enumerate(result.subject.atoms.ops) for op in ops}
    shown = sorted(stage_of)
    position = {op: place for place, op in enumerate(shown)}
    rows = tuple(
        OpRow(
            name=graph.ops[op].name,
            type=graph.ops[op].op_type,
            stage=stage_of[op],
            atom=atom_of.get(op, -1),
            time_ns=result.op_ns[op],
            bytes=sum(shapes.bytes(name) for name in graph.ops[op].outputs),
            readers=tuple(position[reader] for reader in graph.digraph.successors(op) if reader in position),
        )
        for op in shown
    )
    return Content(model=graph.source.path.name, plan=result.plan, ops=rows, sweep=tuple(sweep))


def page(shown: Content) -> str:
    """The HTML page for some data."""
    assets = files(__name__) / "assets"

    def text(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    data = msgspec.json.encode(shown).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return drawing.fill(
        text("report.html"),
        styles=drawing.styles() + text("uPlot.min.css") + text("report.css"),
        licences=drawing.licences(("uPlot", text("uPlot.LICENSE"))),
        libraries=drawing.libraries() + "\n" + drawing.script(text("uPlot.iife.min.js")),
        data=data,
        script=text("report.js"),
    )


def write_report(result: PlanningResult, target: str | Path, sweep: Sequence[SweepRow] = ()) -> None:
    """Write the report as an HTML page. The file appears as a whole or not at all.

    Args:
        result: the plan and the model that it was made from.
        target: the file to write.
        sweep: other numbers of stages to show.

    Raises:
        PartitionError: the file cannot be written.
    """
    target = Path(target)
    text = page(content(result, sweep))
    try:
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PartitionError(f"cannot write {target}: {error.strerror}") from error
