"""The report of a cut: one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from onnxsplit.views.decoder import decoder_lines


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
    """The data that the page shows.

    Attributes:
        model: the model's name.
        plan: the plan.
        ops: its ops.
        sweep: other numbers of stages.
        decoder: what is known of a decoder, in sentences.
    """

    model: str
    plan: Plan
    ops: tuple[OpRow, ...]
    sweep: tuple[SweepRow, ...]
    decoder: tuple[str, ...] = ()


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
    plan = result.plan
    return Content(
        model=graph.source.path.name, plan=plan, ops=rows, sweep=tuple(sweep), decoder=tuple(_decoder(result))
    )


def _decoder(result: PlanningResult) -> Iterator[str]:
    """What is known of a decoder, in sentences."""
    plan, decoding = result.plan, result.subject.decoding
    if plan.decoder is None:
        return
    yield from decoder_lines(plan, plan.decoder)
    if decoding is None:
        return
    yield from (f"Beside the model: {note}." for note in decoding.decoder.claim.notes)
    if (prefill := decoding.prefill) is not None:
        yield f"The whole model takes {prefill.time_ns / 1e6:.3g} ms for a prompt of {prefill.tokens} tokens."


def page(shown: Content) -> str:
    """The HTML page for some data."""
    assets = files(__name__) / "assets"

    def text(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    data = msgspec.json.encode(shown).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return drawing.fill(
        text("report.html"),
        styles=drawing.styles(charts=True) + text("report.css"),
        licences=drawing.licences(charts=True),
        libraries=drawing.libraries(charts=True),
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
