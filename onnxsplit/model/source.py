"""The model that is cut: read from its file, and checked so that it can be walked through safely."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnxsplit.errors import ModelError, shown
from onnxsplit.files import is_text, read_regular
from onnxsplit.model.external_data import external_range, is_external, load_external
from onnxsplit.model.file_kinds import what_is
from onnxsplit.model.ort_optimised import is_ort_optimised, rename_initializers
from onnxsplit.model.protobuf import (
    FunctionKey,
    all_nodes,
    function_key,
    functions_of,
    graph_tensors,
    nested_graphs,
    node_tensors,
)

MOST_UNFOLDED_OPS = 50_000
"""Most ops that the calls of model-local functions may unfold to: ONNX Runtime unfolds all, in quadratic time."""

MOST_RANK = 64 if int(np.__version__.split(".")[0]) >= 2 else 32
"""Most dimensions that an array of the installed NumPy can have."""

_MOST_MODEL_BYTES = 2**31 - 1  # protobuf's own limit
_MOST_CALL_DEPTH = 100  # the limit of ONNX's shape inference


@dataclass(frozen=True)
class IOChanges:
    """Changes to the inputs and outputs of a model, made before it is cut.

    Attributes:
        inputs: inputs that the original model declares.
        outputs: outputs that the original model declares.
        defaults: removed initializers, whose inputs of the same names are kept as inputs; by name.
        dead_nodes: removed ops, which no remaining output needs; by position in the original graph.
        dropped_outputs: names of the outputs that were left out.
        dropped_inputs: names of the inputs that only those outputs need.
    """

    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    defaults: Mapping[str, onnx.TensorProto]
    dead_nodes: Mapping[int, onnx.NodeProto]
    dropped_outputs: tuple[str, ...]
    dropped_inputs: tuple[str, ...]


@dataclass(frozen=True)
class SourceModel:
    """An opened model: its protobuf without the external data, and where that data lies.

    Attributes:
        path: file that the model was read from; for a model in memory, only a file name.
        proto: the model as it is cut; its inputs and outputs may differ from the file's, see ``io_changes``.
        sha256: SHA-256 of the bytes that were given.
        in_file: whether the file at ``path`` holds this protobuf.
        data_folder: folder of the external data; None when that lies beside ``path``.
        io_changes: changes to inputs and outputs; None when there are none.
    """

    path: Path
    proto: onnx.ModelProto = field(repr=False)
    sha256: str
    in_file: bool = True
    data_folder: Path | None = None
    io_changes: IOChanges | None = field(default=None, repr=False)

    @property
    def place(self) -> Path:
        """Path of the model for finding external data: locations are relative to its folder."""
        return self.path if self.data_folder is None else self.data_folder / self.path.name


def open_model(path: str | Path, *, data_folder: Path | None = None, hashed: bool = True) -> SourceModel:
    """Read a model without its external data.

    If ONNX Runtime's optimiser saved the model, its initializers get other names, so that it can be optimised again.

    Args:
        path: the model file.
        data_folder: folder of its external data; None when that lies beside the file.
        hashed: False leaves the hash empty, for a process that does not need it.

    Raises:
        ModelError: the file is missing, not regular, empty, too large, damaged, or not ONNX; the model has functions
            that call themselves or unfold to too many ops; or external data is missing, too short, not in a regular
            file, or outside the folders that are allowed.
    """
    path = Path(path)
    if not is_text(path):
        raise ModelError(f"the path of the model, {str(path)!r}, is not UTF-8 text; give the file another name")
    try:
        content = read_regular(path, most_bytes=_MOST_MODEL_BYTES)
    except FileNotFoundError as error:
        raise ModelError(f"no such model file: {path}") from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is {what_is(path) or 'a folder; name the .onnx file in it'}") from error
    except OSError as error:
        what = what_is(path) if error.errno == errno.EFBIG else None
        raise _refusal(path, what, f"cannot read {path}: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path} is empty; expected an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        why = (
            f"{path} is not an ONNX model, it is truncated ({len(content)} bytes), or it nests bodies deeper than the "
            "100 levels of messages that protobuf reads"
        )
        raise _refusal(path, what_is(path), why) from error
    digest = hashlib.sha256(content).hexdigest() if hashed else ""
    source = SourceModel(path=path, proto=proto, sha256=digest, data_folder=data_folder)
    check_source(source, len(content))
    return source


def check_source(source: SourceModel, size_bytes: int) -> None:
    """Refuse a protobuf that is not a model, or that cannot be walked through safely.

    Args:
        source: the opened model.
        size_bytes: size of the model, for messages.

    Raises:
        ModelError: as :func:`open_model`.
    """
    path, proto = source.path, source.proto
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        why = f"{path} holds no ONNX graph ({size_bytes} bytes); expected an ONNX model"
        raise _refusal(path, what_is(path) if source.in_file else None, why)
    if not proto.graph.output:
        raise ModelError(f"{path} has no outputs; a model must have at least one")
    _check_text(path, proto)
    _check_ranks(path, proto)
    _check_functions(path, proto)
    for tensor in graph_tensors(proto.graph):
        if is_external(tensor):
            external_range(source.place, tensor)
    # Constants of functions are small. Their data is loaded, since calls are unfolded in models in other folders, too.
    load_external(source.place, [tensor for function in proto.functions for tensor in node_tensors(function.node)])
    if is_ort_optimised(proto):
        rename_initializers(proto)


def _refusal(path: Path, what: str | None, otherwise: str) -> ModelError:
    """An error that says what the file is instead of a model, or otherwise another message."""
    return ModelError(f"{path} is not an ONNX model: it is {what}" if what else otherwise)


def _check_text(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse names that are not UTF-8 text; protobuf returns these as bytes."""
    graphs = [proto.graph, *(g for n in all_nodes(proto.graph.node) for g in nested_graphs(n))]
    texts: list[object] = [entry.domain for entry in proto.opset_import]
    for graph in graphs:
        texts += [value.name for value in (*graph.input, *graph.output, *graph.value_info)]
        texts += [d.dim_param for v in (*graph.input, *graph.output) for d in v.type.tensor_type.shape.dim]
    for node in all_nodes((*proto.graph.node, *(n for f in proto.functions for n in f.node))):
        texts += [node.name, node.op_type, node.domain, node.overload, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    for function in proto.functions:
        texts += [function.domain, function.name, function.overload, *function.input, *function.output]
    for tensor in graph_tensors(proto.graph):
        texts += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    if not all(isinstance(text, str) for text in texts):
        raise ModelError(f"{path} is damaged: it holds names that are not UTF-8 text")


def _check_ranks(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse stored tensors, inputs and outputs with more dimensions than an array can have."""
    values = (*proto.graph.input, *proto.graph.output)
    ranks = [(f"the tensor {shown(value.name)}", len(value.type.tensor_type.shape.dim)) for value in values]
    ranks += [(f"the tensor {shown(tensor.name)}", len(tensor.dims)) for tensor in graph_tensors(proto.graph)]
    for what, rank in ranks:
        if rank > MOST_RANK:
            raise ModelError(f"{path}: {what} has {rank} dimensions; at most {MOST_RANK} are allowed")


def _check_functions(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, and calls that unfold to too many ops, in linear time."""
    functions = functions_of(proto)
    unfolded: dict[FunctionKey, int] = {}
    for key in functions:
        _unfold(path, key, functions, unfolded, ())
    calls = [key for node in all_nodes(proto.graph.node) if (key := function_key(node)) in functions]
    total = sum(unfolded[key] for key in calls)
    if total > MOST_UNFOLDED_OPS:
        largest = max(calls, key=lambda key: unfolded[key])
        raise ModelError(
            f"{path}: its calls of functions unfold to {_number(total)} ops, the function {largest[1]!r} alone to "
            f"{_number(unfolded[largest])}; at most {MOST_UNFOLDED_OPS} are allowed. Export it with functions that "
            "call each other less often"
        )


def _unfold(
    path: Path,
    key: FunctionKey,
    functions: dict[FunctionKey, onnx.FunctionProto],
    unfolded: dict[FunctionKey, int],
    callers: tuple[FunctionKey, ...],
) -> None:
    """Count the ops that a call of a function unfolds to, also for all functions that it calls."""
    if key in unfolded:
        return
    if key in callers:
        raise ModelError(
            f"{path}: its function {key[1]!r} calls itself, directly or through others; functions may not be recursive"
        )
    if len(callers) >= _MOST_CALL_DEPTH:
        raise ModelError(f"{path}: its function {key[1]!r} is called at a depth of over {_MOST_CALL_DEPTH} functions")
    count = 0
    for node in all_nodes(functions[key].node):
        called = function_key(node)
        if called in functions:
            _unfold(path, called, functions, unfolded, (*callers, key))
            count += unfolded[called]
        else:
            count += 1
    unfolded[key] = count


def _number(count: int) -> str:
    """A count as text; a huge one by its power of ten."""
    return str(count) if count < 10**12 else f"over 10^{len(str(count)) - 1}"
