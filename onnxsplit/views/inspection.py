"""Figures of a model: ops, types, costs, memory, and where it can be cut in two."""

from __future__ import annotations

from collections import Counter

from onnxsplit.model.multi_device import check_multi_device
from onnxsplit.plan import CALLER, Shape
from onnxsplit.plan_base import PlanStruct
from onnxsplit.planning.subject import Subject
from onnxsplit.stages.parts import peak_memory_bytes, weight_bytes, whole_parts


class TypeRow(PlanStruct, frozen=True, kw_only=True):
    """All ops of one type: their number, and their total time in nanoseconds."""

    op_type: str
    count: int
    time_ns: int


class CutRow(PlanStruct, frozen=True, kw_only=True):
    """One way to cut the model in two along the order of its ops.

    Attributes:
        tensors: names of the tensors that cross.
        bytes: bytes of these tensors.
        before_ns: compute time of the ops before the cut, in nanoseconds.
        after_ns: compute time of the ops after the cut, in nanoseconds.
    """

    tensors: tuple[str, ...]
    bytes: int
    before_ns: int
    after_ns: int


class StateRow(PlanStruct, frozen=True, kw_only=True):
    """A state of a decoder: its two ends, its kind, and its size in bytes."""

    past: str
    present: str
    kind: str
    bytes: int


class Inspection(PlanStruct, frozen=True, kw_only=True):
    """Figures of a model.

    Attributes:
        ir_version: the model's IR version.
        opsets: version by domain.
        ops: number of ops.
        atoms: number of atoms, the parts that can be separated.
        weight_bytes: bytes of the constants.
        peak_memory_bytes: estimated memory of the model in one session.
        time_ns: time of one run in nanoseconds.
        source: source of the times: ``measured`` or ``analytic``.
        note: why costs are analytic although they were not asked for; else None.
        dims: sizes of free dimensions that the figures hold for.
        inputs: type and shape of each input, as text.
        outputs: type and shape of each output, as text.
        op_types: the ops by type, the most time first.
        cuts: ways to cut the model in two, the best balanced first.
        multi_device: violations in the model's multi-device fields.
        states: for a decoder, its states: kind, and the bytes of one position or, where the length does not matter, of
            one sequence.
        rows: for a decoder, how rows of unequal length share a run; else None.
        chunk: for a decoder, which runs have more than one new token on an existing past; else None.
        no_decoder: why a model that looks like a decoder is none; else None.
    """

    ir_version: int
    opsets: dict[str, int]
    ops: int
    atoms: int
    weight_bytes: int
    peak_memory_bytes: int
    time_ns: int
    source: str
    note: str | None
    dims: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    op_types: tuple[TypeRow, ...]
    cuts: tuple[CutRow, ...]
    multi_device: tuple[str, ...]
    states: tuple[StateRow, ...] = ()
    rows: str | None = None
    chunk: str | None = None
    no_decoder: str | None = None


def inspect_subject(subject: Subject, *, cuts: int = 5) -> Inspection:
    """The figures of an examined model, with up to ``cuts`` ways to cut it in two."""
    graph, shapes = subject.graph, subject.shapes
    whole = whole_parts(graph)
    counts, times = Counter[str](), Counter[str]()
    for op, time_ns in zip(graph.ops, subject.costs.time_ns, strict=True):
        counts[op.op_type] += 1
        times[op.op_type] += time_ns
    described = {name: f"{spec.dtype} {_shape_text(spec.shape)}" for name, spec in shapes.specs.items()}
    return Inspection(
        ir_version=graph.source.proto.ir_version,
        opsets={entry.domain: entry.version for entry in graph.source.proto.opset_import},
        ops=len(graph.ops),
        atoms=len(subject.atoms.ops),
        weight_bytes=weight_bytes(graph, whole),
        peak_memory_bytes=peak_memory_bytes(graph, shapes, whole),
        time_ns=subject.costs.whole_ns,
        source=subject.costs.source,
        note=subject.note,
        dims=dict(subject.dims),
        inputs={name: described.get(name, "?") for name in graph.inputs},
        outputs={name: described.get(name, "?") for name in graph.outputs},
        op_types=tuple(
            TypeRow(op_type=kind, count=counts[kind], time_ns=time_ns)
            for kind, time_ns in sorted(times.items(), key=lambda item: (-item[1], item[0]))
        ),
        cuts=_best_cuts(subject, cuts),
        multi_device=tuple(check_multi_device(graph.source.proto)),
        states=_states(subject),
        rows=subject.decoding.decoder.rows if subject.decoding is not None else None,
        chunk=subject.decoding.decoder.chunk if subject.decoding is not None else None,
        no_decoder=subject.no_decoder or None,
    )


def _states(subject: Subject) -> tuple[StateRow, ...]:
    decoding = subject.decoding
    if decoding is None:
        return ()
    return tuple(
        StateRow(
            past=state.past,
            present=state.present,
            kind=state.kind,
            bytes=decoding.token_bytes(state) or decoding.fixed_bytes(state),
        )
        for state in decoding.decoder.claim.states
    )


def _shape_text(shape: Shape | None) -> str:
    return "of unknown rank" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def _best_cuts(subject: Subject, count: int) -> tuple[CutRow, ...]:
    problem = subject.problem(subject.costs.time_ns)
    times = problem.kinds[0].time_ns
    total, before, rows = sum(times), 0, []
    for last in range(len(times) - 1):
        before += times[last]
        crossing = [
            (edge, transfer)
            for edge, transfer in zip(subject.crossing, problem.transfers, strict=True)
            if edge.writer != CALLER and edge.writer <= last and any(reader > last for reader in edge.readers)
        ]
        paid = sum(problem.link.transfer_ns(transfer.size_bytes) for _, transfer in crossing)
        names = tuple(edge.tensor for edge, _ in crossing)
        row = CutRow(
            tensors=names,
            bytes=sum(subject.shapes.bytes(name) for name in names),
            before_ns=before,
            after_ns=total - before,
        )
        rows.append((max(before, total - before) + paid, last, row))
    return tuple(row for _, _, row in sorted(rows, key=lambda entry: entry[:2])[:count])
