"""Models in memory: given as bytes, as a protobuf or as an onnx_ir model; and a temporary file to run one from.

A model in memory is named after its graph. Its hash is that of the bytes that ``onnx.save`` would write.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
from google.protobuf.message import DecodeError, EncodeError

from onnxsplit.errors import ModelError, shown
from onnxsplit.model.external_data import is_external, location_of, point_from_one_folder
from onnxsplit.model.protobuf import graph_tensors, node_tensors
from onnxsplit.model.source import SourceModel, check_source, open_model

if TYPE_CHECKING:
    import onnx_ir

ModelLike: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto | onnx_ir.Model"
"""The forms in which a model may be given: the path of a file, its bytes, a protobuf, or an ``onnx_ir.Model``."""

_MOST_BYTES = 2**31 - 1  # protobuf's own limit
_MOST_NAME = 100
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_ADVICE = (
    "allowed: the path of an ONNX file, its bytes, an onnx.ModelProto or an onnx_ir.Model. "
    "Export other models first: onnxsplit export SOURCE -o model.onnx"
)


@dataclass(frozen=True)
class ModelFile:
    """A file that ONNX Runtime can run.

    Attributes:
        path: the file.
        data_folder: folder of its external data; None when that lies beside ``path``.
    """

    path: Path
    data_folder: Path | None = None


def open_any(model: ModelLike) -> SourceModel:
    """Read a model, given in any form, without its external data.

    Raises:
        ModelError: the model has a form that is not allowed, or cannot be used.
    """
    if isinstance(model, str | os.PathLike):
        path: object = os.fspath(model)
        if not isinstance(path, str) or not path:
            raise ModelError(f"the path of the model is {path!r}; {_ADVICE}")
        return open_model(Path(path))
    if isinstance(model, bytes | bytearray | memoryview):
        return _from_bytes(bytes(model), None)
    if isinstance(model, onnx.ModelProto):
        return _from_proto(model, None)
    ir = sys.modules.get("onnx_ir")  # a caller that has such a model has imported the package
    if ir is not None and isinstance(model, ir.Model):
        return _from_ir(ir, model)
    raise ModelError(f"{_what(model)} cannot be cut directly; {_ADVICE}")


@contextmanager
def runnable(source: SourceModel, *, as_in_stages: bool = False) -> Iterator[ModelFile]:
    """A file that other processes can run: the model's own file, or a temporary copy without its external data.

    Args:
        source: the model.
        as_in_stages: make constants of initializers that the model also lists as inputs, as in the stages. ONNX Runtime
            folds and fuses constants only, so a session of the model's own file may be many times slower.

    Raises:
        ModelError: the copy cannot be written.
    """
    if as_in_stages:
        source = _with_constants(source)
    if source.in_file:
        yield ModelFile(source.path)
        return
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        path = Path(folder) / source.path.name
        try:
            data_folder = _write(source, path)
        except OSError as error:
            raise ModelError(f"cannot write {source.path.name} to {folder} to run it: {error.strerror}") from error
        yield ModelFile(path, data_folder)


def _with_constants(source: SourceModel) -> SourceModel:
    """The model without the inputs that are also initializers."""
    held = {tensor.name for tensor in source.proto.graph.initializer}
    asked = [value for value in source.proto.graph.input if value.name not in held]
    if len(asked) == len(source.proto.graph.input):
        return source
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    del proto.graph.input[:]
    proto.graph.input.extend(asked)
    proto.ir_version = max(proto.ir_version, 4)  # below, every initializer is an input
    return replace(source, proto=proto, in_file=False, data_folder=source.place.parent)


def _write(source: SourceModel, path: Path) -> Path | None:
    """Write a model; returns the folder of its external data, or None when it has none."""
    proto = source.proto
    if not any(is_external(tensor) for tensor in graph_tensors(proto.graph)):
        path.write_bytes(proto.SerializeToString())
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    folder = point_from_one_folder(source.place, graph_tensors(proto.graph))
    path.write_bytes(proto.SerializeToString())
    return folder


def _from_proto(proto: onnx.ModelProto, data_folder: Path | None) -> SourceModel:
    try:
        content: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(_too_large("more")) from error
    return _from_bytes(content, data_folder)


def _from_bytes(content: bytes, data_folder: Path | None) -> SourceModel:
    """Read a model from bytes; a given protobuf is not changed."""
    if len(content) > _MOST_BYTES:
        raise ModelError(_too_large(f"{len(content)}"))
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(
            f"the {len(content)} bytes given are not an ONNX model, are truncated, or nest bodies deeper than the 100 "
            f"levels of messages that protobuf reads; {_ADVICE}"
        ) from error
    name = proto.graph.name if isinstance(proto.graph.name, str) else ""
    path = Path(_NOT_IN_NAMES.sub("_", name).strip("._")[:_MOST_NAME] or "model")
    if data_folder is None:
        inside = [tensor for function in proto.functions for tensor in node_tensors(function.node)]
        for tensor in (*graph_tensors(proto.graph), *inside):
            if is_external(tensor):
                raise ModelError(_no_folder(path, tensor))
    digest = hashlib.sha256(content).hexdigest()
    source = SourceModel(path=path, proto=proto, sha256=digest, in_file=False, data_folder=data_folder)
    check_source(source, len(content))
    return source


def _from_ir(ir: Any, model: Any) -> SourceModel:
    """Turn an onnx_ir model into a protobuf; tensors in files stay there, and all files must be in one folder."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    tensors += [
        attribute.value
        for graph in model.graphs()
        for node in graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
    ]
    folders = {Path(t.base_dir or ".").absolute() for t in tensors if isinstance(t, ir.ExternalTensor)}
    if len(folders) > 1:
        raise ModelError(
            f"the weights of the onnx_ir model lie in {len(folders)} folders ({', '.join(sorted(map(str, folders)))}); "
            "save it with its weights in one file, and give its path: "
            "onnx_ir.save(model, 'model.onnx', external_data='model.data')"
        )
    try:
        proto = ir.to_proto(model)
    except (EncodeError, ValueError, TypeError) as error:
        raise ModelError(f"the onnx_ir model cannot be converted to a protobuf: {error}") from error
    return _from_proto(proto, next(iter(folders), None))


def _no_folder(path: Path, tensor: onnx.TensorProto) -> str:
    return (
        f"the model {str(path)!r} was given in memory, and its tensor {shown(tensor.name)} lies in the file "
        f"{shown(location_of(tensor))}, whose folder is not known. Give the path of the model's file, or load the data "
        "first: onnx.external_data_helper.load_external_data_for_model(model, folder)"
    )


def _too_large(size: str) -> str:
    return (
        f"a model in memory may have {_MOST_BYTES} bytes (2 GB, the limit of protobuf), and this has {size}; save it "
        "with its weights beside it, and give its path: onnx.save(model, 'model.onnx', save_as_external_data=True)"
    )


def _what(model: object) -> str:
    """A description of an object that was given instead of a model."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "torch.nn.modules.module.Module" in kinds or "torch.export.exported_program.ExportedProgram" in kinds:
        return "a PyTorch model"
    if any(kind.startswith("torch.onnx.") and kind.endswith(".ONNXProgram") for kind in kinds):
        return "a torch.onnx.ONNXProgram (give its model, or its model_proto)"
    if any(kind.startswith("onnxruntime.") and kind.endswith("Session") for kind in kinds):
        return "an onnxruntime session (it cannot return its model; give the file that it was made from)"
    if hasattr(model, "read"):
        return "an open file (give its path, or the bytes that its read() returns)"
    if isinstance(model, onnx.GraphProto):
        return "an onnx.GraphProto (a model also has opsets; make one with onnx.helper.make_model)"
    return f"an object of type {type(model).__name__}"
