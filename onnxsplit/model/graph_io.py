"""The inputs and outputs that a model is cut with.

Leaving out an output also removes the ops and inputs that only this output needs. An input that is also an initializer
becomes a constant in the stages, unless it is kept: then a request may leave it out and gets the initializer's value.
Outputs that are not tensors are refused before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import onnx
from google.protobuf.message import Message

from onnxsplit.errors import InputError, PartitionError, shown
from onnxsplit.model.external_data import load_external
from onnxsplit.model.graph import Op, OpGraph, build_graph
from onnxsplit.model.shapes import declared_types, spec_of
from onnxsplit.model.source import IOChanges, SourceModel
from onnxsplit.tensors import TRAVELLING_TYPES, Array, dtype_name, type_name

_WRITERS = {
    "ZipMap": "a sequence of maps",
    "SequenceConstruct": "a sequence",
    "SequenceEmpty": "a sequence",
    "SequenceErase": "a sequence",
    "SequenceInsert": "a sequence",
    "SequenceMap": "a sequence",
    "SplitToSequence": "a sequence",
    "Optional": "an optional",
}
_KINDS = {
    "sequence_type": "a sequence",
    "map_type": "a map",
    "optional_type": "an optional",
    "sparse_tensor_type": "a sparse tensor",
    "opaque_type": "an opaque value",
}
_SHOWN_ELEMENTS = 4

_Proto = TypeVar("_Proto", bound=Message)


def select(
    source: SourceModel,
    *,
    outputs: Sequence[str] | None = None,
    drop_outputs: Sequence[str] = (),
    keep_inputs: Collection[str] = (),
) -> SourceModel:
    """The model with only some of its outputs, and with some inputs kept that would become constants.

    The protobuf of ``source`` is changed in place; use only the returned model afterwards.

    Args:
        source: the model.
        outputs: outputs to keep; all when None.
        drop_outputs: outputs to leave out.
        keep_inputs: inputs that are also initializers and must stay inputs.

    Raises:
        PartitionError: an output is unknown, or no output would be left.
        InputError: an input to keep has no default, or is unknown.
    """
    graph = source.proto.graph
    wanted = _wanted(source, outputs, drop_outputs)
    _check_kept(source, keep_inputs)
    dropped = tuple(dict.fromkeys(value.name for value in graph.output if value.name not in wanted))
    if not dropped and not keep_inputs:
        return source
    inputs, all_outputs = tuple(map(_copied, graph.input)), tuple(map(_copied, graph.output))
    dropped_inputs, dead = _drop(source, dropped) if dropped else ((), {})
    kept = {tensor.name: _copied(tensor) for tensor in graph.initializer if tensor.name in keep_inputs}
    _keep(graph, kept)
    io_changes = IOChanges(inputs, all_outputs, kept, dead, dropped, dropped_inputs)
    return replace(source, in_file=False, io_changes=io_changes)


def add_default_input(source: SourceModel, default: onnx.TensorProto) -> SourceModel:
    """The model with a further input, which a request may leave out.

    The protobuf of ``source`` is changed in place; use only the returned model afterwards.

    Args:
        source: the model.
        default: the input's name, type, shape and default.
    """
    graph = source.proto.graph
    unchanged = IOChanges(tuple(map(_copied, graph.input)), tuple(map(_copied, graph.output)), {}, {}, (), ())
    changes = source.io_changes or unchanged
    graph.input.append(onnx.helper.make_tensor_value_info(default.name, default.data_type, default.dims))
    defaults = {**changes.defaults, default.name: default}
    return replace(source, in_file=False, io_changes=replace(changes, defaults=defaults))


def restored(source: SourceModel) -> onnx.ModelProto:
    """A copy of the model with its original inputs, outputs, initializers and ops."""
    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    if source.io_changes is not None:
        del model.graph.input[:], model.graph.output[:]
        model.graph.input.extend(source.io_changes.inputs)
        model.graph.output.extend(source.io_changes.outputs)
        model.graph.initializer.extend(source.io_changes.defaults.values())
        for position, node in source.io_changes.dead_nodes.items():
            model.graph.node.insert(position, node)
    return model


def defaults(source: SourceModel) -> dict[str, Array]:
    """Default values of the kept inputs by name: a request that leaves one out gets this value."""
    kept = source.io_changes.defaults if source.io_changes is not None else {}
    return {name: stored_array(source, tensor) for name, tensor in kept.items()}


def stored_array(source: SourceModel, tensor: onnx.TensorProto) -> Array:
    """The value of an initializer, also of one with external data; strings as ``str``."""
    held = _copied(tensor)
    load_external(source.place, [held])
    array: Array = onnx.numpy_helper.to_array(held)
    return array.astype(str).astype(object) if array.dtype.kind in "OS" else array


def constant_text(source: SourceModel, name: str) -> str:
    """The value of an initializer as short text: its elements when they are few, else its type and shape."""
    tensor = next((t for t in source.proto.graph.initializer if t.name == name), None)
    if tensor is None:
        return "sparse"
    kind = f"{type_name(tensor.data_type) or '?'} {list(tensor.dims)}"
    if np.prod(tensor.dims, dtype=np.int64) > _SHOWN_ELEMENTS or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return kind
    values = stored_array(source, tensor)
    if dtype_name(values.dtype) is None:
        return kind
    texts = [shown(value, 40) for value in values.ravel().tolist()]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def check_outputs_are_tensors(graph: OpGraph) -> None:
    """Refuse outputs that are not tensors of NumPy's types, before anything runs.

    Raises:
        PartitionError: names each such output, what it is, and how to cut without it.
    """
    types = declared_types(graph)
    refused = {}
    for name in graph.outputs:
        what = _not_a_tensor(graph, name, types.get(name))
        if what is not None:
            refused[name] = what
    if not refused:
        return
    writers = {name: op for name in refused if (op := _writer(graph, name)) is not None}
    problems = [
        f"output {name!r} is {what}" + (f", written by {op.op_type} {op.name!r}" if (op := writers.get(name)) else "")
        for name, what in refused.items()
    ]
    left = [name for name in graph.outputs if name not in refused]
    advice = f"Leave {'it' if len(refused) == 1 else 'them'} out: " + " ".join(f"--drop-output {n}" for n in refused)
    if not left:
        advice = "The model has no other output; add such a tensor to its outputs"
    if any(op.op_type == "ZipMap" for op in writers.values()):
        advice += (
            ". scikit-learn's exporter adds ZipMap to classifiers; for the probabilities as a tensor, export again "
            "with skl2onnx's options={'zipmap': False}"
        )
    raise PartitionError(f"{'; '.join(problems)}; only tensors of NumPy's types can be returned to a caller. {advice}")


def _wanted(source: SourceModel, outputs: Sequence[str] | None, drop_outputs: Sequence[str]) -> set[str]:
    """The outputs that stay, by name."""
    known = tuple(dict.fromkeys(value.name for value in source.proto.graph.output))
    for option, names in (("--outputs", outputs or ()), ("--drop-output", drop_outputs)):
        if isinstance(names, str):
            raise PartitionError(f"{option} takes a list of names, as in [{names!r}], not the text {names!r}")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise PartitionError(
                f"{option}: {', '.join(map(shown, unknown))} is not an output of the model; it has {', '.join(known)}"
                f"{_nearest(unknown[0], known)}"
            )
    if outputs is not None and drop_outputs:
        raise PartitionError("--outputs says which outputs to keep; leave out --drop-output")
    wanted = set(known if outputs is None else outputs) - set(drop_outputs)
    if not wanted:
        raise PartitionError(f"no output would be left; keep at least one of {', '.join(known)}")
    return wanted


def _nearest(name: object, names: Sequence[str]) -> str:
    """A question about the most similar name; empty when none is similar."""
    close = difflib.get_close_matches(str(name), names, 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _check_kept(source: SourceModel, keep_inputs: Collection[str]) -> None:
    """Refuse inputs to keep that have no default."""
    if isinstance(keep_inputs, str):
        raise InputError(f"--keep-input takes a list of names, as in [{keep_inputs!r}], not the text {keep_inputs!r}")
    graph = source.proto.graph
    inputs = {value.name for value in graph.input}
    stored = {tensor.name for tensor in graph.initializer}
    sparse = {tensor.values.name for tensor in graph.sparse_initializer}
    for name in keep_inputs:
        if name in inputs & stored:
            continue
        if name in sparse:
            what = "is a sparse initializer, which cannot be an input"
        elif name in inputs:
            what = "has no default, so it stays an input in any case"
        elif name in stored:
            what = "is an initializer that the model does not list as an input"
        else:
            what = "is unknown"
        defaulted = ", ".join(sorted(inputs & stored)) or "none"
        raise InputError(f"--keep-input: {shown(name)} {what}; inputs with a default: {defaulted}")


def _copied(message: _Proto) -> _Proto:
    """A copy of a protobuf, which stays valid when the original is removed."""
    copied: _Proto = type(message)()
    copied.CopyFrom(message)
    return copied


def _keep(graph: onnx.GraphProto, kept: dict[str, onnx.TensorProto]) -> None:
    """Remove the initializers of kept inputs; an input without a declared shape gets its initializer's."""
    for position in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[position].name in kept:
            del graph.initializer[position]
    for value in graph.input:
        tensor = kept.get(value.name)
        if tensor is not None:
            declared = spec_of(value)
            if declared is None or declared.shape is None or len(declared.shape) != len(tensor.dims):
                value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, tensor.data_type, tensor.dims))


def _drop(source: SourceModel, dropped: Collection[str]) -> tuple[tuple[str, ...], dict[int, onnx.NodeProto]]:
    """Remove outputs, and the inputs and ops that only they need; returns those inputs, and the ops by position.

    Unneeded ops may not stay, because ONNX Runtime runs them.
    """
    graph = source.proto.graph
    before = build_graph(source)
    for position in range(len(graph.output) - 1, -1, -1):
        if graph.output[position].name in dropped:
            del graph.output[position]
    after = build_graph(source)
    used = [{name for name in g.inputs if name in g.readers or name in g.outputs} for g in (before, after)]
    dropped_inputs = tuple(name for name in before.inputs if name in used[0] - used[1])
    for position in range(len(graph.input) - 1, -1, -1):
        if graph.input[position].name in dropped_inputs:
            del graph.input[position]
    places = [place for place, node in enumerate(graph.node) if not any(o in after.producer for o in node.output)]
    dead = {place: _copied(graph.node[place]) for place in places}
    for place in reversed(places):
        del graph.node[place]
    return dropped_inputs, dead


def _not_a_tensor(graph: OpGraph, name: str, kind: onnx.TypeProto | None) -> str | None:
    """The kind of an output that cannot be returned to a caller; None if it can be, or its type is not known yet."""
    value: str | None = kind.WhichOneof("value") if kind is not None else None
    if kind is None or value is None:
        return _written(graph, name)
    if value == "tensor_type":
        dtype = type_name(kind.tensor_type.elem_type)
        if dtype is None:
            return _written(graph, name)
        return None if dtype in TRAVELLING_TYPES else f"a tensor of {dtype}"
    if value == "sequence_type" and kind.sequence_type.elem_type.WhichOneof("value") == "map_type":
        return "a sequence of maps"
    return _KINDS.get(value, value.removesuffix("_type"))


def _written(graph: OpGraph, name: str) -> str | None:
    """The kind of a value, if the type of the op that writes it determines the kind; else None."""
    op = _writer(graph, name)
    return _WRITERS.get(op.op_type) if op is not None else None


def _writer(graph: OpGraph, name: str) -> Op | None:
    """The op that writes a value; Identity ops are followed."""
    while name in graph.producer:
        op = graph.ops[graph.producer[name]]
        if op.op_type != "Identity":
            return op
        name = op.inputs[0]
    return None
