"""The Open Inference Protocol's words, whatever carries them: types, tensors, requests. Pure.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extensions of it (binary tensors,
classification, statistics, model configuration, system shared memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Struct

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import MAX_RANK, Array, element_count, numpy_dtype

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "string": "BYTES",
}  # fmt: skip
"""The protocol's name of each ONNX type that it has."""
_ONNX = {datatype: dtype for dtype, datatype in DATATYPES.items()}

_STRINGS = 1 << 22  # of one tensor
_JSON_STRINGS = 1 << 20  # of one tensor; more take too long to decode at once
_STEP_BYTES = 256 << 10  # of numbers in JSON that are decoded at once: other threads run in between
_STEP = 16 << 10  # elements that are converted at once, likewise
_WORDS = 200
_WRAPS = int(np.__version__.split(".")[0]) < 2


class RegionSlice(Struct, frozen=True):
    """Where in a region of shared memory a tensor is."""

    region: str
    offset: int
    size_bytes: int


class RequestedOutput(Struct, frozen=True):
    """An output that a client asks for.

    Attributes:
        name: of the output.
        binary: as bytes behind the JSON.
        region_slice: written there instead.
        classes: as so many best entries, ``value:index``, instead of the values; 0 for the values.
    """

    name: str
    binary: bool = False
    region_slice: RegionSlice | None = None
    classes: int = 0


class InferRequest(Struct, frozen=True):
    """What a client asks.

    Attributes:
        id: the client's own, given back.
        inputs: name -> array.
        wanted: the outputs, in this order; none means all.
        all_binary: outputs that are not named are wanted as bytes.
        timeout_ns: it wants the answer in; None for any time.
        parameters: that are not of the protocol.
    """

    id: str
    inputs: dict[str, Array]
    wanted: tuple[RequestedOutput, ...] = ()
    all_binary: bool = False
    timeout_ns: int | None = None
    parameters: dict[str, Any] = {}


Read = Callable[[RegionSlice], bytes | bytearray]
"""Gives the bytes of a place in shared memory."""


def dtype_of(name: str, datatype: str) -> str:
    """ONNX's name of a type of the protocol.

    Raises:
        InputError: there is none such.
    """
    if datatype not in _ONNX:
        raise InputError(f"tensor {shown(name)} has datatype {shown(datatype)}; allowed: {', '.join(_ONNX)}")
    return _ONNX[datatype]


def check_rank(name: str, rank: int) -> None:
    """Refuse more dimensions than a tensor can have.

    Raises:
        InputError: there are too many.
    """
    if rank > MAX_RANK:
        raise InputError(f"tensor {shown(name)} has {rank} dimensions; at most {MAX_RANK} are allowed")


def check_shape(name: str, shape: Sequence[int], dtype: str) -> int:
    """The number of elements.

    Raises:
        InputError: no tensor has such a shape: a size is negative, there are too many dimensions, or too many elements.
    """
    check_rank(name, len(shape))
    count = element_count(shape, numpy_dtype(dtype).itemsize)
    if count is None:
        raise InputError(
            f"tensor {shown(name)} has shape {shown(list(shape))}; sizes are 0 or more, and fit into memory together"
        )
    return count


def bytes_of(name: str, datatype: str, shape: Sequence[int]) -> int | None:
    """The bytes of a tensor; None for strings, whose length the shape does not say. Raises as :func:`from_bytes`."""
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    return None if dtype == "string" else count * numpy_dtype(dtype).itemsize


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | bytearray | memoryview) -> Array:
    """A tensor of little-endian bytes, without a copy; each string is its length in four bytes, and itself.

    Raises:
        InputError: the bytes are not those of such a tensor.
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
    if count > _STRINGS:
        raise InputError(f"tensor {shown(name)} has {count} strings; at most {_STRINGS} are allowed")


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
    """The tensor as :func:`from_bytes` takes it; without a copy where it lies in order."""
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
    """A tensor of JSON: its elements in row-major order, flat or nested as the shape is.

    The number of elements, and how lists of numbers are nested, are held against the shape before they are decoded.

    Raises:
        InputError: they are not those of such a tensor.
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
        raise InputError(f"the data of tensor {shown(name)} are not {datatype}: {one_line(error, _WORDS)}") from error


def _json_numbers(name: str, text: bytes, dtype: str, shape: Sequence[int]) -> Array:
    count = math.prod(shape)
    found = text.count(b",") + 1
    flat = text.translate(None, b"[]") if found == count or count == 0 else text
    if not flat.strip(b", \t\r\n"):
        found = 0
    if found != count:
        raise InputError(f"tensor {shown(name)} has {found} elements; shape {list(shape)} has {count}")
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
        OverflowError: a whole number is too large for the type. NumPy 1 would wrap it round to another one.
    """
    if _WRAPS and kind.kind in "iu" and values:
        bounds = np.iinfo(kind)
        if min(values) < bounds.min or max(values) > bounds.max:
            raise OverflowError(f"whole numbers of {kind} lie from {bounds.min} to {bounds.max}")
    return np.array(values, kind)


def _check_nesting(name: str, text: bytes, shape: Sequence[int]) -> None:
    """Refuse lists in JSON that are neither flat nor nested as the shape is.

    The text must have as many elements as the shape, none of them a string.
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
    """A list of numbers in pieces that end at a comma."""
    start = 0
    while start < len(flat):
        end = flat.find(b",", start + _STEP_BYTES)
        end = end if end >= 0 else len(flat)
        yield flat[start:end]
        start = end + 1


def _json_strings(name: str, text: bytes, shape: Sequence[int], count: int) -> list[str]:
    at_least = (text.count(b'"') - text.count(b'\\"')) // 2  # a quote within a string is escaped
    if at_least > count or count > _JSON_STRINGS:
        raise InputError(
            f"tensor {shown(name)} has {max(at_least, count)} strings; its shape has {count}, and as JSON at most "
            f"{_JSON_STRINGS} are allowed: send more as binary data"
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
    found: list[str] = values
    return found


def _nested_strings(text: bytes, shape: Sequence[int]) -> list[Any]:
    """The strings of lists that are nested as a shape is, which has no size of 0.

    The decoder stops at the first list of another length, so that it never holds more lists than strings.
    """
    kind: Any = str
    for size in reversed(shape):
        kind = Annotated[list[kind], msgspec.Meta(min_length=size, max_length=size)]
    values: list[Any] = msgspec.json.decode(text, type=kind)
    for _ in shape[1:]:
        values = [item for value in values for item in value]
    return values


def check_count(name: str, datatype: str, shape: Sequence[int], found: int) -> None:
    """Hold the number of elements that came against the shape.

    Raises:
        InputError: there are not so many, or there are more strings than are allowed.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape, dtype)
    if found != count:
        raise InputError(f"tensor {shown(name)} has {found} elements; shape {list(shape)} has {count}")
    if dtype == "string":
        _check_strings(name, count)


def from_items(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """A tensor of its elements, in row-major order.

    Raises:
        InputError: as :func:`check_count`, or one is too large for the type.
    """
    count = len(values)
    check_count(name, datatype, shape, count)
    kind = numpy_dtype(dtype_of(name, datatype))
    result = np.empty(count, kind)
    try:
        for start in range(0, count, _STEP):
            result[start : start + _STEP] = _numbers(values[start : start + _STEP], kind)
    except (OverflowError, ValueError) as error:
        raise InputError(f"the data of tensor {shown(name)} are not {datatype}: {one_line(error, _WORDS)}") from error
    return result.reshape(shape)


def to_json(name: str, array: Array) -> msgspec.Raw:
    """The elements of a tensor, in row-major order, as a list in JSON.

    Raises:
        InputError: there are some that JSON has no word for.
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
    """The greatest entries, ``value:index``, of each row of a batch, or of the whole tensor.

    Returns:
        strings of shape ``[rows, classes]``, or ``[classes]``; fewer classes where there are fewer entries.
    """
    if array.dtype == object:
        raise InputError("a classification is of numbers, and the output has strings")
    count = array.shape[0] if batched and array.ndim else 1
    rows = array.reshape(count, array.size // count if count else math.prod(array.shape[1:]))
    classes = min(classes, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    found = np.empty(order.shape, object)
    for place, index in np.ndenumerate(order):
        found[place] = f"{float(rows[place[0], index]):f}:{index}"
    return found if batched else found[0]
