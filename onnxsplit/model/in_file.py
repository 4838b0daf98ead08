"""Weights that stay in the model's file: a model made from it refers to them, and is small itself."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from onnxsplit.model.external_data import is_external

_LARGE_BYTES = 64 * 1024  # smaller tensors may be shapes, which ONNX Runtime infers with
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of the fields in ModelProto, GraphProto and TensorProto

Span = tuple[int, int]
"""Offsets of the first byte and of the byte after the last."""


def leave_weights_in_file(model: Path, initializers: Sequence[onnx.TensorProto]) -> None:
    """Turn large initializers into external data that lies in the model's own file.

    Nothing changes where the file cannot be followed, such as one with several graphs that protobuf joins.

    Args:
        model: the file that the initializers were read from.
        initializers: all of them, in the order of the file.

    Raises:
        OSError: the file cannot be read.
    """
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            spans = _raw_data(content)
        except (ValueError, IndexError):  # groups, or a file that has changed
            return
    if len(spans) != len(initializers):
        return
    for tensor, span in zip(initializers, spans, strict=True):
        if span is None or span[1] - span[0] < _LARGE_BYTES or is_external(tensor):
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", model.name), ("offset", span[0]), ("length", span[1] - span[0])):
            tensor.external_data.add(key=key, value=str(value))


def _raw_data(content: mmap.mmap) -> list[Span | None]:
    """Where the raw data of each initializer of the graph lies; None for one without."""
    graphs = [span for number, span in _messages(content, (0, len(content))) if number == _GRAPH]
    if len(graphs) != 1:
        return []
    tensors = [span for number, span in _messages(content, graphs[0]) if number == _INITIALIZER]
    return [dict(_messages(content, span)).get(_RAW_DATA) for span in tensors]


def _messages(content: mmap.mmap, within: Span) -> Iterator[tuple[int, Span]]:
    """The fields with a length in a message: the number of each, and where its content lies."""
    at, end = within
    while at < end:
        key, at = _varint(content, at)
        match key & 7:
            case 0:
                _, at = _varint(content, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(content, at)
                if length > end - at:
                    raise ValueError("a field is longer than its message")
                yield key >> 3, (at, at + length)
                at += length
            case 5:
                at += 4
            case other:
                raise ValueError(f"fields of the kind {other} are not followed")


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    """An integer, and the offset behind it."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("an integer has more than 64 bits")
