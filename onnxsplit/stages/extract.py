"""Extracting stages: each becomes a valid ONNX model of its own.

A stage keeps the source's IR version (at least 4), opsets, metadata, symbolic dimension names, and the names of ops and
tensors. It holds only the initializers and copied ops that it reads, and the functions that its ops call, directly or
through other functions. Initializers that the source lists as inputs are constants in the stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from onnxsplit.errors import PartitionError
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.graph_io import stored_array
from onnxsplit.model.protobuf import called_functions, functions_of
from onnxsplit.model.shapes import Shapes, spec_of, value_info
from onnxsplit.npz import save_npz
from onnxsplit.plan_base import FileEntry
from onnxsplit.stages.model_file import copy_external, file_entry, ignore, serialized
from onnxsplit.stages.parts import StageParts

CONSTANTS_IR_VERSION = 4
"""The first IR version in which an initializer need not be an input; the initializers of stages are not inputs."""


def write_stage(
    graph: OpGraph,
    shapes: Shapes,
    parts: StageParts,
    folder: Path,
    name: str,
    *,
    wrote: Callable[[int], None] = ignore,
) -> tuple[FileEntry, ...]:
    """Write one stage, and its external data if it has any.

    Args:
        graph: the source model.
        shapes: types and shapes of the tensors on the stage's border.
        parts: the parts of the stage.
        folder: the folder to write to.
        name: file name of the model, ``NAME.onnx``; external data goes to ``NAME.data``.
        wrote: called with the number of bytes after each part of the external data that was written.

    Returns:
        The entries of the files that were written, the model first.

    Raises:
        PartitionError: the disk is full, the folder cannot be written, or the model is above 2 GB.
    """
    model = stage_model(graph, shapes, parts)
    try:
        data = copy_external(graph.source, model, folder / Path(name).with_suffix(".data"), wrote)
        content = serialized(model)
        (folder / name).write_bytes(content)
    except OSError as error:
        raise PartitionError(f"cannot write {folder / name}: {error.strerror}") from error
    entry = FileEntry(name=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    return (entry, *data)


def stage_model(graph: OpGraph, shapes: Shapes, parts: StageParts) -> onnx.ModelProto:
    """A stage as a protobuf. Its external data still refers to the source's files."""
    source = graph.source.proto
    model = model_like(source)
    nodes = [_reading(graph.ops[index].node, parts.renamed) for index in parts.ops]
    called = called_functions(nodes, functions_of(source))
    model.functions.extend(f for f in source.functions if (f.domain, f.name, f.overload) in called)
    target = model.graph
    target.name = source.graph.name
    target.metadata_props.extend(source.graph.metadata_props)
    target.node.extend(nodes)
    held = set(parts.constants)
    target.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in held)
    target.sparse_initializer.extend(s for s in source.graph.sparse_initializer if s.values.name in held)
    declared = {value.name: value for value in (*source.graph.input, *source.graph.output)}
    for names, values in ((parts.inputs, target.input), (parts.outputs, target.output)):
        values.extend(_border(name, shapes, declared) for name in names)
    present = {name for index in parts.ops for name in (*graph.ops[index].reads, *graph.ops[index].outputs)}
    target.quantization_annotation.extend(a for a in source.graph.quantization_annotation if a.tensor_name in present)
    return model


def model_like(source: onnx.ModelProto) -> onnx.ModelProto:
    """A model without a graph and functions, and otherwise as another one: versions, opsets, producer, metadata."""
    model = onnx.ModelProto()
    for descriptor, value in source.ListFields():
        if descriptor.name == "graph" or descriptor.name in ("functions", "training_info"):
            continue
        if isinstance(value, int | str):
            setattr(model, descriptor.name, value)
        else:  # a repeated field; protobuf below 6.31 has no is_repeated to ask
            getattr(model, descriptor.name).extend(value)
    model.ir_version = max(source.ir_version, CONSTANTS_IR_VERSION)
    return model


def _reading(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    """An op that reads other inputs in the place of some."""
    if not any(name in renamed for name in node.input):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for position, name in enumerate(copy.input):
        copy.input[position] = renamed.get(name, name)
    return copy


def _border(name: str, shapes: Shapes, declared: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    """The declaration of an input or output of a stage."""
    spec = shapes.specs.get(name)
    if spec is None:  # an output of the model whose type only ONNX Runtime knows
        return declared.get(name) or onnx.ValueInfoProto(name=name)
    if name in declared and spec_of(declared[name]) == spec:
        return declared[name]
    return value_info(name, spec)


def write_constant(graph: OpGraph, output: str, folder: Path, name: str) -> FileEntry:
    """Write an initializer that is an output of the model to an ``.npz`` file.

    Raises:
        PartitionError: the initializer is sparse.
    """
    tensor = next((t for t in graph.source.proto.graph.initializer if t.name == output), None)
    if tensor is None:
        raise PartitionError(f"output {output!r} is a sparse initializer; a stage cannot return it")
    save_npz(folder / name, {output: stored_array(graph.source, tensor)})
    return file_entry(folder / name)
