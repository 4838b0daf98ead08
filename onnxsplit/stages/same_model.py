"""Whether two plans are cuts of one model: they have the same ops, and the same weights, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from onnxsplit.model.external_data import external_range, is_external
from onnxsplit.model.outline import open_outline
from onnxsplit.plan_files import load_plan
from onnxsplit.stages.merge import merged
from onnxsplit.tensors import Array

_CHUNK_BYTES = 16 << 20


def why_not_same(one: str | Path, other: str | Path) -> str | None:
    """How the models of two plans differ, in a few words; None if they are the same.

    The models are rebuilt from the stages, without what converts tensors at narrow borders. Names of ops, and texts
    that describe them, may differ.

    Args:
        one: a plan directory.
        other: another plan directory.

    Raises:
        PlanError, ModelError: a plan is damaged.
    """
    return next(_differences(Path(one), Path(other)), None)


def _differences(one: Path, other: Path) -> Iterator[str]:
    models = [_model(folder) for folder in (one, other)]
    ops = [_ops(model) for model in models]
    for outputs in [*ops[0], *(outputs for outputs in ops[1] if outputs not in ops[0])]:
        if ops[0].get(outputs) != ops[1].get(outputs):
            missing = outputs not in ops[0] or outputs not in ops[1]
            yield f"the op that writes {outputs[0]!r} " + ("is only in one of them" if missing else "differs")
    functions = [{(f.domain, f.name, f.overload): _bytes(f) for f in model.functions} for model in models]
    if functions[0] != functions[1]:
        yield "a function differs"
    opsets = [{(each.domain, each.version) for each in model.opset_import} for model in models]
    if opsets[0] != opsets[1]:
        yield "the versions of their operator sets differ"
    tensors = [_tensors(model) for model in models]
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        left, right = tensors[0].get(name), tensors[1].get(name)
        if left is None or right is None:
            yield f"the weight {name!r} is only in one of them"
        elif (left.data_type, tuple(left.dims)) != (right.data_type, tuple(right.dims)):
            yield f"the weight {name!r} has another type or shape"
        elif not _equal(_content(one, left), _content(other, right)):
            yield f"the weight {name!r} has other values"
    sparse = [{each.values.name: _bytes(each) for each in model.graph.sparse_initializer} for model in models]
    if sparse[0] != sparse[1]:
        yield "a sparse weight differs"


def _model(folder: Path) -> onnx.ModelProto:
    """The model of a plan, whose large weights stay in the plan's files."""
    plan = load_plan(folder, check_files=False)
    return merged(folder, plan, [open_outline(folder / stage.file).proto for stage in plan.stages])


def _ops(model: onnx.ModelProto) -> dict[tuple[str, ...], bytes]:
    found = {}
    for node in model.graph.node:
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        plain.ClearField("name")
        plain.ClearField("doc_string")
        plain.ClearField("metadata_props")
        found[tuple(filter(None, node.output))] = _bytes(plain)
    return found


def _tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _bytes(message: onnx.NodeProto | onnx.FunctionProto | onnx.SparseTensorProto) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _content(folder: Path, tensor: onnx.TensorProto) -> Array:
    """The bytes of a tensor; those in a file are mapped."""
    if is_external(tensor):
        file, offset, length = external_range(folder / "plan", tensor)
        return np.memmap(file, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)
    if tensor.data_type == onnx.TensorProto.STRING:
        return np.frombuffer(b"\0".join(tensor.string_data), np.uint8)
    if tensor.HasField("raw_data"):
        return np.frombuffer(tensor.raw_data, np.uint8)
    return np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)


def _equal(left: Array, right: Array) -> bool:
    return left.size == right.size and all(
        np.array_equal(left[at : at + _CHUNK_BYTES], right[at : at + _CHUNK_BYTES])
        for at in range(0, left.size, _CHUNK_BYTES)
    )
