"""Plans of the small decoders, cut and described by hand, so that tests of the runtime need no measuring."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import onnx
from decoder_runs import FAMILIES, Reference
from onnx import helper

from onnxsplit.plan import Costs, CreatedWith, Cut, ModelInfo, Plan, Prediction, Stage, TensorSpec
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_decoder import Control, Decoder, State
from onnxsplit.tensors import ONNX_TYPE_NUMBER, size_bytes, type_name

ROLES = {
    "input_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "write_indices": "past-length",
    "valid_lengths": "total-length",
}
_POSITIONS = {"past_sequence_length", "capacity"}


def specs(model: onnx.ModelProto) -> dict[str, TensorSpec]:
    """The types and shapes of a model's inputs and outputs."""
    found = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
        found[value.name] = TensorSpec(dtype=type_name(tensor.elem_type), shape=shape)
    return found


def describe(
    name: str,
    model: onnx.ModelProto,
    *,
    kind: str,
    rows: str,
    chunk: str,
    length: int = 48,
    capacity: int | None = None,
) -> Decoder:
    """The decoder block of a family; all states have one kind, but those without positions are recurrent."""
    pairs = Reference(FAMILIES[name], model).pairs
    known = specs(model)
    states = []
    for past in (value.name for value in model.graph.input if value.name in pairs):
        declared = known[past].shape
        batch = declared.index("batch_size")
        axis = next((at for at, size in enumerate(declared) if size in _POSITIONS), None)
        if axis is None and kind == "in-place":
            axis = 2
        shape = [size if isinstance(size, int) else 0 for size in declared]
        shape[batch] = 1
        room = None
        if axis is not None:
            room = capacity or shape[axis] or None
            shape[axis] = 0
        one = kind if axis is not None else "recurrent"
        grows = one in ("in-place", "append")
        unit = [size for at, size in enumerate(shape) if at != axis]
        unit_bytes = size_bytes(known[past].dtype, tuple(unit))
        states.append(
            State(
                past=past,
                present=pairs[past],
                kind=one,
                batch_axis=batch,
                axis=axis,
                shape=tuple(shape),
                capacity=room if one != "append" else None,
                stage=0,
                token_bytes=unit_bytes if grows else 0,
                fixed_bytes=0 if grows else unit_bytes * (room or 1),
            )
        )
    return Decoder(
        states=tuple(states),
        controls=tuple(Control(input=name, role=ROLES[name]) for name in known if name in ROLES),
        scores="logits",
        vocabulary=100,
        rows=rows,
        chunk=chunk,
        rollback=all(state.kind in ("in-place", "append") for state in states),
        max_length=length,
    )


def cut(model: onnx.ModelProto, decoder: Decoder, folder: Path, *, stages: int = 2) -> Plan:
    """Cut a decoder where few tensors cross and every stage has states; ops that follow from controls are copied."""
    ops = list(model.graph.node)
    ends = {name for state in decoder.states for name in (state.past, state.present)}
    local = _local(ops, {value.name for value in model.graph.input} - ends, model)
    bounds = [0, *_bounds(ops, local, ends, stages), len(ops)]
    parts = [[op for op in ops[a:b] if id(op) not in local] for a, b in pairwise(bounds)]
    known = specs(model)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    writer = {name: at for at, part in enumerate(parts) for op in part for name in op.output}
    written: list[list[str]] = [[] for _ in parts]
    built = []
    for part in parts:
        needed = _with_local(part, local, ops)
        inside = {name for op in needed for name in op.output}
        reads = dict.fromkeys(name for op in needed for name in op.input if name and name not in inside)
        for name in reads:
            if name in writer and name not in written[writer[name]]:
                written[writer[name]].append(name)
                known.setdefault(name, TensorSpec(dtype=type_name(types.get(name, 1)), shape=None))
        built.append((needed, [name for name in reads if name in known]))
    for value in model.graph.output:
        written[writer[value.name]].append(value.name)
    folder.mkdir(parents=True)
    files = [
        _write(model, folder / f"stage-{at}.onnx", needed, reads, written[at], known)
        for at, (needed, reads) in enumerate(built)
    ]
    placed = tuple(_placed(state, built) for state in decoder.states)
    plan = _plan(model, known, [reads for _, reads in built], written, files, writer)
    plan = _replaced(plan, decoder=_replaced(decoder, states=placed))
    (folder / "plan.json").write_bytes(plan.to_json())
    return plan


def _replaced(record, **changes):
    import msgspec

    return msgspec.structs.replace(record, **changes)


def _placed(state: State, built) -> State:
    (stage,) = (at for at, (_, reads) in enumerate(built) if state.past in reads)
    return _replaced(state, stage=stage)


def _local(ops, controls: set[str], model: onnx.ModelProto) -> set[int]:
    """The ops that follow from controls and constants alone; the embedding is none of them."""
    free = controls | {tensor.name for tensor in model.graph.initializer} | {""}
    local = set()
    for op in ops:
        if all(name in free for name in op.input) and not (op.op_type == "Gather" and op.input[1] == "input_ids"):
            local.add(id(op))
            free |= set(op.output)
    return local


def _bounds(ops, local: set[int], ends: set[str], stages: int) -> list[int]:
    """Where the later stages begin."""
    if stages == 1:
        return []
    own = [op for op in ops if id(op) not in local]

    def crossing(at: int) -> int:
        before = {name for op in ops[:at] if id(op) not in local for name in op.output}
        return len({name for op in ops[at:] if id(op) not in local for name in op.input if name in before})

    def holds(part) -> bool:
        pasts = {name for op in part for name in op.input if name in ends}
        return bool(pasts)

    good = [at for at in range(1, len(ops)) if holds(ops[:at]) and holds(ops[at:]) and _whole(ops, at, ends)]
    least = min(crossing(at) for at in good)
    return [min((at for at in good if crossing(at) == least), key=lambda at: abs(at - len(own) // 2))]


def _whole(ops, at: int, ends: set[str]) -> bool:
    """Whether no state is read on one side and read or written on the other."""

    def layers(part) -> set[str]:
        names = {name for op in part for name in (*op.input, *op.output) if name in ends}
        return {re.findall(r"\d+", name)[-1] for name in names}

    return not layers(ops[:at]) & layers(ops[at:])


def _with_local(part, local: set[int], ops) -> list:
    """A stage's ops and the local ones that they need, in the model's order."""
    needed = {name for op in part for name in op.input}
    chosen = {id(op) for op in part}
    for op in reversed(ops):
        if id(op) in local and needed & set(op.output):
            chosen.add(id(op))
            needed |= set(op.input)
    return [op for op in ops if id(op) in chosen]


def _write(model, path: Path, ops, reads: Sequence[str], writes: Sequence[str], known) -> FileEntry:
    def value(name: str):
        return helper.make_tensor_value_info(name, ONNX_TYPE_NUMBER[known[name].dtype], known[name].shape)

    constants = model.graph.initializer  # all of them, as bodies of loops read some too
    graph = helper.make_graph(ops, path.stem, [value(n) for n in reads], [value(n) for n in writes], constants)
    proto = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    data = proto.SerializeToString()
    path.write_bytes(data)
    return FileEntry(name=path.name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _plan(model, known, reads, written, files, writer) -> Plan:
    stages = tuple(
        Stage(
            index=at, file=entry.name, files=(entry,), inputs=tuple(reads[at]), outputs=tuple(written[at]),
            weight_bytes=0, peak_memory_bytes=0, provider="cpu", optimization_level="all", threads=1,
            predicted_time_ns=1,
        )
        for at, entry in enumerate(files)
    )  # fmt: skip
    outputs = tuple(value.name for value in model.graph.output)
    crossing = {name: at for at, names in enumerate(written) for name in names if name not in outputs}
    cuts = tuple(
        Cut(tensor=name, from_stage=at, to_stages=tuple(o for o in range(len(files)) if name in reads[o]), bytes=0)
        for name, at in crossing.items()
    )
    return Plan(
        format_version=1,
        created_with=CreatedWith(onnxsplit="0", onnxruntime=None),
        model=ModelInfo(name="m", sha256="0" * 64, ir_version=model.ir_version, opsets={"": 1}),
        strategy="network", parallel="model", objective="throughput", dims={}, stages=stages, tensors=known,
        cuts=cuts, inputs=tuple(v.name for v in model.graph.input), outputs=outputs, passthrough={},
        outputs_need={name: tuple(range(writer[name] + 1)) for name in outputs},
        prediction=Prediction(
            bottleneck_ns=1, throughput_per_s=1.0, latency_ns=1, lower_bound_ns=1, gap=0.0, op_lower_bound_ns=1
        ),
        costs=Costs(
            source="analytic", whole_time_ns=1, whole_weight_bytes=1, whole_peak_memory_bytes=1,
            whole_optimization_level="all",
        ),
    )  # fmt: skip
