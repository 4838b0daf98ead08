"""Element types by their ONNX names, sizes of tensors, and checks of a model's inputs.

ONNX's names for types (``float32``, ``bfloat16``, ``string``) are used everywhere: in plans, on the wire, and in
messages. NumPy lacks some of these types; ``ml_dtypes`` adds those that ONNX Runtime can pass on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from onnxsplit.errors import InputError, shown

Array = np.ndarray[Any, Any]

_NUMPY = {
    "float32": "f4", "float64": "f8", "float16": "f2",
    "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8",
    "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "bool": "?", "complex64": "c8", "complex128": "c16",
}  # fmt: skip
ML_DTYPES = {
    "bfloat16": "bfloat16",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
# The numbers of TensorProto.DataType in the ONNX specification.
ONNX_TYPE_NUMBER = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "complex64": 14, "complex128": 15, "bfloat16": 16,
    "float8e4m3fn": 17, "float8e4m3fnuz": 18, "float8e5m2": 19, "float8e5m2fnuz": 20, "uint4": 21, "int4": 22,
    "float4e2m1": 23, "float8e8m0": 24, "uint2": 25, "int2": 26,
}  # fmt: skip
_ONNX_TYPE_NAME = {number: name for name, number in ONNX_TYPE_NUMBER.items()}
_BITS = {"uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2, "float8e8m0": 8}

TRAVELLING_TYPES = frozenset([*_NUMPY, *ML_DTYPES, "string"]) - {"complex64", "complex128"}
"""Types whose tensors can go from one stage to another: those that an ONNX Runtime session takes and returns."""

MAX_RANK = 32
"""The largest number of dimensions of a tensor."""

_MOST_PROBLEMS = 10  # the most problems that one message lists
_ADDRESSES = 1 << 62  # a size in bytes that no tensor reaches; sums and products of real sizes stay below 64 bits
_STRING_BYTES = 16  # an assumed size, because the length of strings is not part of their type


def type_name(number: int) -> str | None:
    """ONNX's name of a ``TensorProto.DataType`` number; None for an undefined or unknown number."""
    return _ONNX_TYPE_NAME.get(number)


@functools.cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type for an ONNX type; ``object`` for strings.

    Raises:
        InputError: no NumPy array can hold the type.
    """
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])
    if dtype == "string":
        return np.dtype(object)
    if dtype in ML_DTYPES:
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, ML_DTYPES[dtype]))
        return narrow
    raise InputError(f"type {dtype!r} cannot be held in an array; known: {', '.join(sorted(TRAVELLING_TYPES))}")


@functools.lru_cache(maxsize=256)  # callers may pass any number of structured types
def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """ONNX's name of a NumPy type; None if it has none."""
    if dtype.kind in "OUST":
        return "string"
    name = {"float8_" + t.split("float8", 1)[1]: t for t in ML_DTYPES if "float8" in t}.get(dtype.name, dtype.name)
    return name if name in _NUMPY or name in ML_DTYPES else None


def is_native(dtype: str) -> bool:
    """Whether NumPy itself has the type, so that a session takes its arrays directly."""
    return dtype in _NUMPY or dtype == "string"


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type and shape; each string counts 16 bytes, because its length is not known."""
    count = math.prod(shape)
    if dtype == "string":
        return count * _STRING_BYTES
    if dtype in _BITS:
        return -(-count * _BITS[dtype] // 8)
    return count * numpy_dtype(dtype).itemsize


def content_bytes(array: Array) -> int:
    """Bytes of an array, with the lengths of its strings, which ``nbytes`` leaves out."""
    if array.dtype != object:
        return array.nbytes
    return array.nbytes + sum(map(len, array.ravel().tolist()))


def element_count(shape: Sequence[int], itemsize: int = 1) -> int | None:
    """The number of elements of a shape; None if no array can have the shape.

    Args:
        shape: sizes; none may be negative. The product of those other than 0 is bounded, because NumPy computes
            strides from them even if the array has no elements.
        itemsize: bytes of an element.
    """
    if len(shape) > MAX_RANK:
        return None
    count, extent = 1, itemsize
    for size in shape:
        if size < 0:
            return None
        count *= size
        extent *= size or 1
    return count if extent <= _ADDRESSES else None


def check_inputs(
    given: Mapping[str, Array],
    specs: Mapping[str, tuple[str, Sequence[int | str] | None]],
    optional: Collection[str] = frozenset(),
    *,
    refused: Mapping[str, str] | None = None,
) -> None:
    """Check that tensors fit the inputs of a model.

    Args:
        given: the tensors by name.
        specs: ONNX type and shape of each input by name. A symbolic name allows any size; None allows any shape.
        optional: inputs that may be left out.
        refused: messages for inputs that the model no longer has, by name.

    Raises:
        InputError: lists every name, type, rank and size that does not fit, and what the model takes.
    """
    explained = refused or {}
    problems = [explained.get(name, f"{shown(name)} is unknown") for name in given if name not in specs]
    problems += [
        f"{name!r} is missing ({dtype}{_shape_text(shape)})"
        for name, (dtype, shape) in specs.items()
        if name not in given and name not in optional
    ]
    for name, array in given.items():
        if name not in specs:
            continue
        dtype, shape = specs[name]
        dtype_given = dtype_name(array.dtype)
        if dtype_given != dtype:
            problems.append(f"{name!r} has type {dtype_given or shown(array.dtype)}, expected {dtype}")
        if shape is None:
            continue
        if len(shape) != array.ndim:
            problems.append(
                f"{name!r} has {array.ndim} dimensions {list(array.shape)}, expected {len(shape)}: {_shape_text(shape)}"
            )
            continue
        for axis, (size, want) in enumerate(zip(array.shape, shape, strict=True)):
            if isinstance(want, int) and size != want:
                problems.append(f"{name!r} has size {size} on axis {axis}, expected {want}: {_shape_text(shape)}")
    if problems:
        expected = "; ".join(f"{name}: {dtype}{_shape_text(shape)}" for name, (dtype, shape) in specs.items())
        listed = problems[:_MOST_PROBLEMS]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise InputError("the inputs do not fit the model: " + "; ".join(listed) + f". The model takes {expected}")


def _shape_text(shape: Sequence[int | str] | None) -> str:
    return "[?]" if shape is None else "[" + ", ".join(str(size) for size in shape) + "]"
