"""The Open Inference Protocol's words, whatever carries them: types, tensors, requests. Pure.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extensions of it (binary tensors,
classification, statistics, model configuration, system shared memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from onnxsplit.errors import InputError
from onnxsplit.tensors import Array, numpy_dtype

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "string": "BYTES",
}  # fmt: skip
"""The protocol's name of each ONNX type that it has."""
_ONNX = {datatype: dtype for dtype, datatype in DATATYPES.items()}

RANK = 32
"""Dimensions a tensor may have."""

_LENGTH = np.dtype("<u4")


class Place(Struct, frozen=True):
    """Where in a region of shared memory a tensor is."""

    region: str
    offset: int
    size_bytes: int


class Wanted(Struct, frozen=True):
    """An output that a client asks for.

    Attributes:
        name: of the output.
        binary: as bytes behind the JSON.
        place: written there instead.
        classes: as so many best entries, ``value:index``, instead of the values; 0 for the values.
    """

    name: str
    binary: bool = False
    place: Place | None = None
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
    wanted: tuple[Wanted, ...] = ()
    all_binary: bool = False
    timeout_ns: int | None = None
    parameters: dict[str, Any] = {}


Read = Callable[[Place], bytes]
"""Gives the bytes of a place in shared memory."""


def dtype_of(name: str, datatype: str) -> str:
    """ONNX's name of a type of the protocol.

    Raises:
        InputError: there is none such.
    """
    if datatype not in _ONNX:
        raise InputError(f"tensor {name!r} has datatype {datatype!r}; allowed: {', '.join(_ONNX)}")
    return _ONNX[datatype]


def check_shape(name: str, shape: Sequence[int]) -> int:
    """The number of elements.

    Raises:
        InputError: a size is negative, or there are too many dimensions.
    """
    if len(shape) > RANK:
        raise InputError(f"tensor {name!r} has {len(shape)} dimensions; at most {RANK} are allowed")
    if any(size < 0 for size in shape):
        raise InputError(f"tensor {name!r} has shape {list(shape)}; sizes are 0 or more")
    return math.prod(shape)


def from_bytes(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """A tensor of little-endian bytes, without a copy; each string is its length in four bytes, and itself.

    Raises:
        InputError: the bytes are not those of such a tensor.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape)
    if dtype == "string":
        return _strings(name, data, count).reshape(shape)
    kind = numpy_dtype(dtype)
    if len(data) != count * kind.itemsize:
        raise InputError(
            f"tensor {name!r} has {len(data)} bytes; {datatype} of shape {list(shape)} has {count * kind.itemsize}"
        )
    if dtype == "bool":
        return np.frombuffer(data, np.uint8).astype(bool).reshape(shape)
    return np.frombuffer(data, kind).reshape(shape)


def _strings(name: str, data: bytes | memoryview, count: int) -> Array:
    if count > len(data) // 4:
        raise InputError(f"tensor {name!r} has {len(data)} bytes, too few for {count} strings")
    result = np.empty(count, object)
    view, start = memoryview(data), 0
    for position in range(count):
        size = int.from_bytes(view[start : start + 4], "little")
        end = start + 4 + size
        if start + 4 > len(view) or end > len(view):
            raise InputError(f"tensor {name!r} ends within string {position} of {count}")
        try:
            result[position] = str(view[start + 4 : end], "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"string {position} of tensor {name!r} is not UTF-8: {error.reason}") from error
        start = end
    if start != len(view):
        raise InputError(f"tensor {name!r} has {len(view) - start} bytes more than its {count} strings")
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
_NESTED = msgspec.json.Decoder(list[Any])


def from_json(name: str, datatype: str, shape: Sequence[int], data: msgspec.Raw) -> Array:
    """A tensor of JSON: its elements in row-major order, flat or nested.

    Raises:
        InputError: they are not those of such a tensor.
    """
    dtype = dtype_of(name, datatype)
    decoder = _ITEMS["f" if dtype == "bfloat16" else numpy_dtype(dtype).kind]
    try:
        try:
            values = decoder.decode(data)
        except msgspec.ValidationError:
            values = msgspec.convert(_flat(_NESTED.decode(data), len(shape)), decoder.type)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"the data of tensor {name!r} are not {datatype}: {error}") from error
    return from_items(name, datatype, shape, values)


def from_items(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """A tensor of its elements, in row-major order.

    Raises:
        InputError: there are not so many, or one is too large for the type.
    """
    dtype = dtype_of(name, datatype)
    count = check_shape(name, shape)
    if len(values) != count:
        raise InputError(f"tensor {name!r} has {len(values)} elements; shape {list(shape)} has {count}")
    try:
        return np.array(values, numpy_dtype(dtype)).reshape(shape)
    except OverflowError as error:
        raise InputError(f"the data of tensor {name!r} are not {datatype}: {error}") from error


def _flat(values: list[Any], rank: int) -> list[Any]:
    for _ in range(rank - 1):
        if not values or not all(isinstance(value, list) for value in values):
            break
        values = [item for value in values for item in value]
    return values


def to_json(name: str, array: Array) -> list[Any]:
    """The elements of a tensor, in row-major order.

    Raises:
        InputError: there are some that JSON has no word for.
    """
    if array.dtype.kind not in "biuOf":  # bfloat16
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"output {name!r} holds infinities or NaN, which JSON cannot carry; ask for it as binary data "
            '("parameters": {"binary_data": true})'
        )
    found: list[Any] = array.ravel().tolist()
    return found


def classify(array: Array, classes: int, *, batched: bool) -> Array:
    """The greatest entries, ``value:index``, of each row of a batch, or of the whole tensor.

    Returns:
        strings of shape ``[rows, classes]``, or ``[classes]``; fewer classes where there are fewer entries.
    """
    if array.dtype == object:
        raise InputError("a classification is of numbers, and the output has strings")
    rows = array.reshape(array.shape[0] if batched and array.ndim else 1, -1)
    classes = min(classes, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    found = np.empty(order.shape, object)
    for place, index in np.ndenumerate(order):
        found[place] = f"{float(rows[place[0], index]):f}:{index}"
    return found if batched else found[0]
