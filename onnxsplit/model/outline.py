"""Reading a model file without its large weights, which then count as external data in the model file itself.

In a protobuf, a message is a row of fields, each with a number, a wire type, and its content. Only the fields on the
way to the weights are taken apart: the graph in the model, the initializers in the graph, and ``raw_data`` in those. A
large ``raw_data`` is skipped, and its place is noted as ``external_data``. So a model of any size is read in the time
and the memory that its ops take, and its weights can be copied from file to file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxsplit.errors import ModelError
from onnxsplit.files import open_regular
from onnxsplit.model.external_data import is_external
from onnxsplit.model.shared_weights import extents
from onnxsplit.model.source import SourceModel, check_source

_LARGE_BYTES = 64 << 10  # smaller weights are read, because some are shapes
_GRAPH, _INITIALIZER, _RAW_DATA = (
    kind.DESCRIPTOR.fields_by_name[name].number
    for kind, name in ((onnx.ModelProto, "graph"), (onnx.GraphProto, "initializer"), (onnx.TensorProto, "raw_data"))
)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MOST_VARINT_BYTES = 10

_Part = Callable[[BufferedReader, int], bytes]
"""Reads a part of a message up to a position in the file, and returns what replaces it."""


def open_outline(path: Path) -> SourceModel:
    """Read a model without its large weights. Its file must stay where it is as long as they are needed.

    Raises:
        ModelError: the file is missing, damaged, or not ONNX; or as :func:`~onnxsplit.model.source.open_model`.
    """
    proto = onnx.ModelProto()
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            proto.ParseFromString(_model(stream, size, path.name))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, DecodeError) as error:
        raise ModelError(f"{path} is damaged: it is not a protobuf of ONNX") from error
    source = SourceModel(path=path, proto=proto, sha256="")
    check_source(source, size)
    return source


def share_equal_data(place: Path, tensors: list[onnx.TensorProto]) -> None:
    """Let tensors whose external data is equal refer to one place, so that it counts once and is copied once.

    Args:
        place: the path of the model for finding external data.
        tensors: the tensors, which are changed.
    """
    outside = [tensor for tensor in tensors if is_external(tensor)]
    first: dict[object, onnx.TensorProto] = {}
    for tensor, extent in zip(outside, extents(place, outside, by_content=True), strict=True):
        same = first.setdefault(extent, tensor)
        if same is not tensor:
            del tensor.external_data[:]
            tensor.external_data.extend(same.external_data)


def _model(stream: BufferedReader, end: int, location: str) -> bytes:
    def initializer(stream: BufferedReader, end: int) -> bytes:
        return _tensor(stream, end, location)

    def graph(stream: BufferedReader, end: int) -> bytes:
        return _message(stream, end, {_INITIALIZER: initializer})

    return _message(stream, end, {_GRAPH: graph})


def _tensor(stream: BufferedReader, end: int, location: str) -> bytes:
    """A tensor; its data, if it is large, becomes a reference to the place in this file."""
    places: list[tuple[int, int]] = []

    def raw_data(stream: BufferedReader, end: int) -> bytes:
        start = stream.tell()
        if end - start < _LARGE_BYTES:
            return _read(stream, end - start)
        places.append((start, end - start))
        stream.seek(end)
        return b""

    content = _message(stream, end, {_RAW_DATA: raw_data})
    if not places:
        return content
    offset, length = places[-1]
    added = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        added.external_data.add(key=key, value=str(value))
    tensor = onnx.TensorProto.FromString(content)
    tensor.ClearField("raw_data")
    tensor.MergeFrom(added)
    outlined: bytes = tensor.SerializeToString()
    return outlined


def _message(stream: BufferedReader, end: int, parts: Mapping[int, _Part]) -> bytes:
    """A message up to a position in the file, with some of its fields replaced.

    Raises:
        ValueError: it is damaged.
    """
    content = bytearray()
    while stream.tell() < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        content += _encoded(tag)
        if kind == _BYTES:
            length = _varint(stream)
            if stream.tell() + length > end:
                raise ValueError("a field is longer than the message that it is in")
            part = parts.get(number)
            field = part(stream, stream.tell() + length) if part is not None else _read(stream, length)
            content += _encoded(len(field)) + field
        elif kind == _VARINT:
            content += _encoded(_varint(stream))
        elif kind in (_FIXED64, _FIXED32):
            content += _read(stream, 8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"the wire type {kind} is not used")
    if stream.tell() != end:
        raise ValueError("a message does not end where it should")
    return bytes(content)


def _read(stream: BufferedReader, length: int) -> bytes:
    content = stream.read(length)
    if len(content) != length:
        raise ValueError("the file is truncated")
    return content


def _varint(stream: BufferedReader) -> int:
    """A number in groups of 7 bits, the lowest first; the high bit of a byte says that another follows."""
    value = 0
    for position in range(_MOST_VARINT_BYTES):
        byte = _read(stream, 1)[0]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value
    raise ValueError("a number has too many bytes")


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
