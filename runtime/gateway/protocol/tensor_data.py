"""Tensors of the Open Inference Protocol as bytes, as JSON and as lists of elements. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import MAX_RANK, Array, element_count, numpy_dtype
from runtime.gateway.protocol.inference import dtype_of

_MOST_STRINGS = 1 << 22  # in one tensor
_MOST_JSON_STRINGS = 1 << 20  # in one tensor; decoding more would block other threads for too long
_STEP_BYTES = 256 << 10  # JSON numbers are decoded in steps of this size; other threads run in between
_STEP = 16 << 10  # elements that are converted at once, for the same reason
_MESSAGE_CHARACTERS = 200
_NUMPY_WRAPS = int(np.__version__.split(".")[0]) < 2


def check_rank(name: str, rank: int) -> None:
    """Refuse more dimensions than a tensor can have.

    Raises:
        InputError: There are more than ``MAX_RANK``.
    """
    if rank > MAX_RANK:
        raise InputError(f"tensor {shown(name)} has {rank} dimensions; at most {MAX_RANK} are allowed")


def check_shape(name: str, shape: Sequence[int], dtype: str) -> int:
    """The number of elements of a tensor of ``shape`` and the ONNX type ``dtype``.

    Raises:
        InputError: A size is negative, or there are too many dimensions or elements.
    """
    check_rank(name, len(shape))
    count = element_count(shape, numpy_dtype(dtype).itemsize)
    if count is None:
        raise InputError(
            f"tensor {shown(name)} has shape {shown(list(shape))}; sizes must be 0 or more and fit into memory together"
        )
    return count


def bytes_of(name: str, datatype: str, shape: Sequence[int]) -> int | None:
    """The size of a tensor in bytes; None for strings, whose length does not follow from the shape.

    Raises:
        InputError: The type or the shape is not valid.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    return None if dtype == "string" else count * numpy_dtype(dtype).itemsize


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | bytearray | memoryview) -> Array:
    """A tensor from its little-endian bytes, without a copy. Each string is its length in four bytes, then its UTF-8.

    Raises:
        InputError: The type or the shape is not valid, or the bytes are not those of such a tensor.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    if dtype == "string":
        return _strings(name, data, count).reshape(shape)
    kind = numpy_dtype(dtype)
    if len(data) != count * kind.itemsize:
        raise InputError(
            f"tensor {shown(name)} has {len(data)} bytes; {datatype} of shape {list(shape)} has {count * kind.itemsize}"
        )
    if dtype == "bool":
        return np.frombuffer(data, np.uint8).astype(bool).reshape(shape)
    return np.frombuffer(data, kind).reshape(shape)


def _check_strings(name: str, count: int) -> None:
    if count > _MOST_STRINGS:
        raise InputError(f"tensor {shown(name)} has {count} strings; at most {_MOST_STRINGS} are allowed")


def _strings(name: str, data: bytes | bytearray | memoryview, count: int) -> Array:
    _check_strings(name, count)
    if count > len(data) // 4:
        raise InputError(f"tensor {shown(name)} has {len(data)} bytes, too few for {count} strings")
    result = np.empty(count, object)
    view, start = memoryview(data), 0
    for position in range(count):
        size = int.from_bytes(view[start : start + 4], "little")
        end = start + 4 + size
        if start + 4 > len(view) or end > len(view):
            raise InputError(f"tensor {shown(name)} ends within string {position} of {count}")
        try:
            result[position] = str(view[start + 4 : end], "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"string {position} of tensor {shown(name)} is not UTF-8: {error.reason}") from error
        start = end
    if start != len(view):
        raise InputError(f"tensor {shown(name)} has {len(view) - start} bytes more than its {count} strings")
    return result


def to_bytes(array: Array) -> bytes | memoryview:
    """The bytes of a tensor, as :func:`from_bytes` takes them; no copy where the array is contiguous."""
    if array.dtype == object:
        pieces = []
        for text in array.ravel():
            encoded = str(text).encode()
            pieces += [len(encoded).to_bytes(4, "little"), encoded]
        return b"".join(pieces)
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


_ITEMS: dict[str, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(item)
    for kind, item in (("b", list[bool]), ("i", list[int]), ("u", list[int]), ("f", list[float]), ("O", list[str]))
}
_OPENING = b"[ \t\r\n"
_NOT_STRUCTURE = bytes(sorted(set(range(256)) - set(b"[],")))


def from_json(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """A tensor from JSON: its elements in row-major order, as one list or nested as the shape is.

    The number of elements and the nesting of lists are checked against the shape before anything is decoded.

    Raises:
        InputError: The type or the shape is not valid, or the elements are not those of such a tensor.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    text = bytes(data)
    depth = text[: len(text) - len(text.lstrip(_OPENING))].count(b"[")
    if depth not in (1, len(shape)) and not (depth and count == 0):
        raise InputError(
            f"the data of tensor {shown(name)} are {depth} lists deep; shape {list(shape)} takes one list, or "
            f"{len(shape)} inside each other"
        )
    try:
        if dtype == "string":
            return from_items(name, datatype, shape, _json_strings(name, text, shape, count))
        return _json_numbers(name, text, dtype, shape)
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise InputError(_not_of(name, datatype, error)) from error


def _not_of(name: str, datatype: str, error: Exception) -> str:
    return f"the data of tensor {shown(name)} are not {datatype}: {one_line(error, _MESSAGE_CHARACTERS)}"


def _check_elements(name: str, shape: Sequence[int], given: int, count: int) -> None:
    if given != count:
        raise InputError(f"tensor {shown(name)} has {given} elements; shape {list(shape)} has {count}")


def _json_numbers(name: str, text: bytes, dtype: str, shape: Sequence[int]) -> Array:
    count = math.prod(shape)
    given = text.count(b",") + 1
    flat = text.translate(None, b"[]") if given == count or count == 0 else text
    if not flat.strip(b", \t\r\n"):
        given = 0
    _check_elements(name, shape, given, count)
    _check_nesting(name, text, shape)
    kind = numpy_dtype(dtype)
    decoder = _ITEMS["f" if dtype == "bfloat16" else kind.kind]
    result = np.empty(count, kind)
    start = 0
    with np.errstate(over="ignore"):
        for piece in _pieces(flat) if count else ():
            values = decoder.decode(b"[" + piece + b"]")
            result[start : start + len(values)] = _numbers(values, kind)
            start += len(values)
    if decoder is _ITEMS["f"] and not np.isfinite(result).all():
        raise InputError(f"the data of tensor {shown(name)} hold a number that is too large for {dtype}")
    return result.reshape(shape)


def _numbers(values: Sequence[Any], kind: np.dtype[Any]) -> Array:
    """Values as an array.

    Raises:
        OverflowError: A whole number is too large for the type. NumPy 1 would silently make another number of it.
    """
    if _NUMPY_WRAPS and kind.kind in "iu" and values:
        bounds = np.iinfo(kind)
        if min(values) < bounds.min or max(values) > bounds.max:
            raise OverflowError(f"whole numbers of {kind} lie from {bounds.min} to {bounds.max}")
    return np.array(values, kind)


def _check_nesting(name: str, text: bytes, shape: Sequence[int]) -> None:
    """Refuse JSON that is neither one list nor nested as the shape is.

    The text must have as many elements as the shape has, and no strings.
    """
    lists = text.count(b"[")
    if lists == 1:
        return
    if lists == sum(math.prod(shape[:level]) for level in range(len(shape))):
        nested = b""
        for size in reversed(shape):
            nested = b"[" + ((nested + b",") * size)[:-1] + b"]"
        if text.translate(None, _NOT_STRUCTURE) == nested:
            return
    raise InputError(
        f"the data of tensor {shown(name)} are not nested as shape {list(shape)} is; each list needs as many entries "
        "as its dimension has, or give all elements in one list"
    )


def _pieces(flat: bytes) -> Iterator[bytes]:
    """The text of a list of numbers, in pieces that end at a comma."""
    start = 0
    while start < len(flat):
        end = flat.find(b",", start + _STEP_BYTES)
        end = end if end >= 0 else len(flat)
        yield flat[start:end]
        start = end + 1


def _json_strings(name: str, text: bytes, shape: Sequence[int], count: int) -> list[str]:
    at_least = (text.count(b'"') - text.count(b'\\"')) // 2  # a quote within a string is escaped
    if at_least > count or count > _MOST_JSON_STRINGS:
        raise InputError(
            f"tensor {shown(name)} has {max(at_least, count)} strings; its shape has {count}, and as JSON at most "
            f"{_MOST_JSON_STRINGS} are allowed: send more as binary data"
        )
    if count == 0:
        _check_nesting(name, text, shape)
        return []
    try:
        values = _ITEMS["O"].decode(text)
    except msgspec.ValidationError:
        if len(shape) < 2:
            raise
        values = _nested_strings(text, shape)
    strings: list[str] = values
    return strings


def _nested_strings(text: bytes, shape: Sequence[int]) -> list[Any]:
    """The strings of lists that are nested as a shape without zeros is.

    The decoder stops at the first list of a wrong length, so it never holds more lists than strings.
    """
    kind: Any = str
    for size in reversed(shape):
        kind = Annotated[list[kind], msgspec.Meta(min_length=size, max_length=size)]
    values: list[Any] = msgspec.json.decode(text, type=kind)
    for _ in shape[1:]:
        values = [item for value in values for item in value]
    return values


def check_count(name: str, datatype: str, shape: Sequence[int], given: int) -> None:
    """Check the number of given elements against the shape.

    Raises:
        InputError: The type or the shape is not valid, the numbers differ, or there are too many strings.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    _check_elements(name, shape, given, count)
    if dtype == "string":
        _check_strings(name, count)


def from_items(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """A tensor from its elements in row-major order.

    Raises:
        InputError: As for :func:`check_count`, or an element does not fit the type.
    """
    count = len(values)
    check_count(name, datatype, shape, count)
    kind = numpy_dtype(dtype_of(name, datatype))
    result = np.empty(count, kind)
    try:
        for start in range(0, count, _STEP):
            result[start : start + _STEP] = _numbers(values[start : start + _STEP], kind)
    except (OverflowError, ValueError) as error:
        raise InputError(_not_of(name, datatype, error)) from error
    return result.reshape(shape)


def to_json(name: str, array: Array) -> msgspec.Raw:
    """The elements of a tensor in row-major order, as one JSON list.

    Raises:
        InputError: An element is infinite or NaN, which JSON cannot express.
    """
    if array.dtype.kind not in "biuOf":  # bfloat16
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"output {shown(name)} holds infinities or NaN, which JSON cannot carry; ask for it as binary data "
            '("parameters": {"binary_data": true})'
        )
    flat = array.ravel()
    pieces = [msgspec.json.encode(flat[start : start + _STEP].tolist())[1:-1] for start in range(0, len(flat), _STEP)]
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def classify(array: Array, classes: int, *, batched: bool) -> Array:
    """The greatest entries of each row of a batch, or of the whole tensor, as ``value:index``.

    Returns:
        Strings of shape ``[rows, classes]``, or ``[classes]`` when not batched; fewer where there are fewer entries.

    Raises:
        InputError: The tensor holds strings.
    """
    if array.dtype == object:
        raise InputError("only numbers can be classified, and the output has strings")
    count = array.shape[0] if batched and array.ndim else 1
    rows = array.reshape(count, array.size // count if count else math.prod(array.shape[1:]))
    classes = min(classes, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    entries = np.empty(order.shape, object)
    for position, index in np.ndenumerate(order):
        entries[position] = f"{float(rows[position[0], index]):f}:{index}"
    return entries if batched else entries[0]
