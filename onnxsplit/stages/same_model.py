"""Whether two plans are cuts of one model: they have the same ops, and the same weights, byte for byte."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxsplit.model.external_data import external_range, is_external
from onnxsplit.model.outline import open_outline
from onnxsplit.model.protobuf import FunctionKey, functions_of, node_tensors
from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.stages.merge import add_defaults, merged
from onnxsplit.tensors import Array, size_bytes, type_name

_CHUNK_BYTES = 16 << 20
_ASKS_SHAPE = ("Shape", "Size")

OpBytes = dict[tuple[str, ...], bytes]
"""Ops by the tensors that they write."""


def why_not_same(one: str | Path, other: str | Path) -> str | None:
    """How the models of two plans differ, in a few words; None if they are the same.

    The models are rebuilt from the stages, without what converts tensors at narrow borders. Names of ops, texts that
    describe them, and where weights are stored may differ. Defaults of inputs count as weights.

    Args:
        one: a plan directory.
        other: another plan directory.

    Raises:
        PlanError, ModelError: a plan is damaged, or its files have changed since it was made.
    """
    return next(_differences(_Cut.of(Path(one)), _Cut.of(Path(other))), None)


@dataclass(frozen=True)
class _Cut:
    """The model of a plan. Large weights stay in the plan's files.

    Attributes:
        folder: the plan directory.
        model: the model, rebuilt from the stages.
        stages: the models of the stages.
        ops: the ops of the model.
        functions: its functions.
        shapes_of: for each input of which copied ops may read only the shape, the input that they may read instead.
        is_narrow: whether ops of the stages convert tensors that cross.
    """

    folder: Path
    model: onnx.ModelProto
    stages: list[onnx.ModelProto]
    ops: OpBytes
    functions: dict[FunctionKey, bytes]
    shapes_of: Mapping[str, str]
    is_narrow: bool

    @classmethod
    def of(cls, folder: Path) -> _Cut:
        """Read a plan, and compare its files with what it says of them."""
        plan = load_plan(folder)
        stages = [open_outline(folder / stage.file).proto for stage in plan.stages]
        model = merged(folder, plan, stages)
        add_defaults(model.graph, folder, plan)
        shapes_of = _first_alike(plan)
        return cls(
            folder=folder,
            model=model,
            stages=stages,
            ops=_ops(folder, model, shapes_of),
            functions=_functions(folder, model),
            shapes_of=shapes_of,
            is_narrow=plan.borders is not None,
        )

    @property
    def opsets(self) -> set[tuple[str, int]]:
        """Domain and version of all operator sets."""
        return {(each.domain, each.version) for model in (self.model, *self.stages) for each in model.opset_import}

    @property
    def sparse(self) -> dict[str, bytes]:
        """The sparse weights."""
        return {each.values.name: _bytes(each) for each in self.model.graph.sparse_initializer}

    @property
    def tensors(self) -> dict[str, list[onnx.TensorProto]]:
        """The weights, each with all copies of it."""
        found: dict[str, list[onnx.TensorProto]] = defaultdict(list)
        for model in (self.model, *self.stages):
            for tensor in model.graph.initializer:
                found[tensor.name].append(tensor)
        return found

    def contradictions(self) -> Iterator[str]:
        """What the stages hold in several copies that differ, except weights."""
        for stage in self.stages:
            for outputs, op in _ops(self.folder, stage, self.shapes_of).items():
                if op != self.ops.get(outputs, op) and not self._converts(op, self.ops[outputs]):
                    yield f"the stages of {self.folder} have different ops that write {outputs[0]!r}"
            if any(function != self.functions[key] for key, function in _functions(self.folder, stage).items()):
                yield f"the stages of {self.folder} have different functions of one name"

    def _converts(self, op: bytes, first: bytes) -> bool:
        """Whether an op makes a tensor of those that have crossed instead of it."""
        inputs = [onnx.NodeProto.FromString(each).input for each in (op, first)]
        return self.is_narrow and list(inputs[0]) != list(inputs[1])


def _differences(one: _Cut, other: _Cut) -> Iterator[str]:
    yield from one.contradictions()
    yield from other.contradictions()
    for outputs in [*one.ops, *(outputs for outputs in other.ops if outputs not in one.ops)]:
        if one.ops.get(outputs) != other.ops.get(outputs):
            missing = outputs not in one.ops or outputs not in other.ops
            yield f"the op that writes {outputs[0]!r} " + ("is only in one of them" if missing else "differs")
    if one.functions != other.functions:
        yield "a function differs"
    if one.opsets != other.opsets:
        yield "the versions of their operator sets differ"
    left, right = one.tensors, other.tensors
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield f"the weight {name!r} is only in one of them"
            continue
        copies = [(cut.folder, tensor) for cut, tensors in ((one, left), (other, right)) for tensor in tensors[name]]
        if len({(tensor.data_type, tuple(tensor.dims)) for _, tensor in copies}) > 1:
            yield f"the weight {name!r} has another type or shape"
        elif not _all_equal(copies):
            yield f"the weight {name!r} has other values"
    if one.sparse != other.sparse:
        yield "a sparse weight differs"


def _first_alike(plan: Plan) -> dict[str, str]:
    """For each state of a decoder, the first one of which copied ops may ask the same sizes."""
    first: dict[object, str] = {}
    states = plan.decoder.states if plan.decoder is not None else ()
    return {
        state.past: first.setdefault(
            (state.kind, state.batch_axis, state.axis, state.capacity, len(state.shape)), state.past
        )
        for state in states
    }


def _ops(folder: Path, model: onnx.ModelProto, shapes_of: Mapping[str, str]) -> OpBytes:
    found = {}
    for node in model.graph.node:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        plain.ClearField("name")
        plain.ClearField("doc_string")
        plain.ClearField("metadata_props")
        if plain.op_type in _ASKS_SHAPE and not plain.domain:
            plain.input[0] = shapes_of.get(plain.input[0], plain.input[0])
        _stand_in(folder, node_tensors([plain]))
        found[tuple(filter(None, node.output))] = _bytes(plain)
    return found


def _functions(folder: Path, model: onnx.ModelProto) -> dict[FunctionKey, bytes]:
    found = {}
    for key, function in functions_of(model).items():
        plain = onnx.FunctionProto()
        plain.CopyFrom(function)
        _stand_in(folder, node_tensors(plain.node))
        found[key] = _bytes(plain)
    return found


def _stand_in(folder: Path, tensors: Iterator[onnx.TensorProto]) -> None:
    """Put a hash of the content of tensors in its place, so that it does not matter where and how they are stored."""
    for tensor in tensors:
        digest = hashlib.sha256(_content(folder, tensor).data).digest()
        plain = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=digest)
        tensor.CopyFrom(plain)


def _bytes(message: onnx.NodeProto | onnx.FunctionProto | onnx.SparseTensorProto | onnx.TensorProto) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _content(folder: Path, tensor: onnx.TensorProto) -> Array:
    """The bytes of a tensor as raw data has them; those in a file are mapped."""
    if is_external(tensor):
        file, offset, length = external_range(folder / "plan", tensor)
        return np.memmap(file, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)
    if tensor.data_type == onnx.TensorProto.STRING:
        return np.frombuffer(b"".join(b"%d:%b" % (len(text), text) for text in tensor.string_data), np.uint8)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, np.uint8)
    name = type_name(tensor.data_type)
    if name is not None and len(tensor.int32_data) == size_bytes(name, tuple(tensor.dims)):
        return np.array(tensor.int32_data, np.int32).astype(np.uint8)  # a byte each: types of 8 bits and less
    return np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)


def _all_equal(copies: list[tuple[Path, onnx.TensorProto]]) -> bool:
    """Whether the copies of a weight, each with the folder of its file, have the same bytes."""
    first, *others = (_content(*copy) for copy in _distinct(copies))
    return all(_equal(first, other) for other in others)


def _distinct(copies: list[tuple[Path, onnx.TensorProto]]) -> list[tuple[Path, onnx.TensorProto]]:
    """The copies without those that refer to the same place."""
    return list({(folder, _bytes(tensor)): (folder, tensor) for folder, tensor in copies}.values())


def _equal(left: Array, right: Array) -> bool:
    return left.size == right.size and all(
        np.array_equal(left[at : at + _CHUNK_BYTES], right[at : at + _CHUNK_BYTES])
        for at in range(0, left.size, _CHUNK_BYTES)
    )
