"""Arrays of other libraries, tables and Python's numbers as NumPy arrays of the type that a model expects. Pure.

    torch.Tensor           on any device, with a gradient, of any type that ONNX has (bfloat16, float8)
    __dlpack__, __array__  JAX, CuPy, TensorFlow and others; copied to the host where they are elsewhere
    frame, series          pandas and polars; numbers are converted to the expected type where they fit
    int, float, list       numbers are converted to the expected type where they fit

An array that has a type of its own keeps it: whether it is the expected one is checked later. No library is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.ma  # imported here, because an interrupted import in a request would break all later ones
from numpy.typing import ArrayLike

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import ML_DTYPES, Array, numpy_dtype

Specs = Mapping[str, tuple[str, Sequence[int | str] | None]]
"""By name, the ONNX type and the shape of the inputs of a model."""


class SupportsDLPack(Protocol):
    """An array of a library that speaks DLPack."""

    def __dlpack_device__(self) -> tuple[Any, int]: ...

    def __dlpack__(self) -> Any: ...


InputsLike: TypeAlias = Mapping[str, ArrayLike | SupportsDLPack] | ArrayLike | SupportsDLPack
"""The inputs of a request: arrays by name, one array, or a table."""

_MOST_CHARACTERS = 200  # characters of a caller's value in a message
_MASKED = "masked entries, which a model cannot represent; fill them with filled()"
_TEXT_KINDS = "OUST"  # objects, fixed-width unicode and bytes, and NumPy's own strings
_HOST_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost of DLPack
_PYTHON = (bool, int, float, list, tuple, range, np.generic)
_EXACT = 2.0**63  # a larger whole number is compared with itself after rounding
_PLAIN = frozenset({bool, int, float, complex, str, bytes})


def by_name(inputs: object, specs: Specs, required: Sequence[str]) -> Mapping[Any, object]:
    """The inputs of a request by name, from a mapping, from a table, or from one array for a model of one input.

    Args:
        inputs: what the caller gave.
        specs: the inputs of the model.
        required: those of them without a default.

    Raises:
        InputError: the model has several inputs, and they are not given by name.
    """
    if isinstance(inputs, Mapping):
        return inputs
    if is_frame(inputs):
        columns = list(inputs.columns)  # type: ignore[attr-defined]
        if required and set(required) <= set(columns):
            return {name: inputs[name] for name in columns}  # type: ignore[index]
    alone = list(required) if len(required) == 1 else list(specs)
    if len(alone) == 1:
        return {alone[0]: inputs}
    takes = ", ".join(map(repr, specs)) or "no inputs"
    raise InputError(f"inputs must map names to arrays, but they are {kind_of(inputs)}; the model takes {takes}")


def is_frame(value: object) -> bool:
    """Whether a value is a table with named columns, as those of pandas and polars."""
    return hasattr(value, "columns") and hasattr(value, "to_numpy") and not isinstance(value, Mapping)


def to_array(name: str, value: object, expected: str | None, rank: int | None) -> Array:
    """A value as an array.

    Args:
        name: the input, for messages.
        value: what the caller gave.
        expected: the ONNX type that the model declares; None when it is not known.
        rank: the number of dimensions that it declares; None when it is not known.

    Raises:
        InputError: the value cannot be made an array, or its numbers do not fit the type.
    """
    try:
        if is_frame(value):
            return _table(name, value, expected)
        if expected == "string":
            texts = value.to_list() if hasattr(value, "to_list") else value
            array = np.array(texts, object) if isinstance(texts, str | bytes | list | tuple) else _on_host(texts)
        else:
            array = _on_host(_of_plain_values(value) if isinstance(value, list | tuple) else value)
    except InputError:
        raise
    except Exception as error:  # a value's own conversion may raise anything
        raise InputError(f"input {shown(name)} cannot be made an array: {one_line(error, _MOST_CHARACTERS)}") from error
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(f"input {shown(name)} has {_MASKED}")
    if expected is None:
        return array
    if hasattr(value, "to_numpy"):
        array = _fitted(name, array, expected, value)
        return array.reshape(-1, 1) if rank == 2 and array.ndim == 1 else array
    if isinstance(value, _PYTHON):
        return _fitted(name, array, expected, value)
    if array.dtype.kind in _TEXT_KINDS and expected != "string":
        raise InputError(_unlike(name, value, array, expected))
    return array


def kind_of(value: Any) -> str:
    """The name of a value's type, with its article."""
    name = type(value).__name__[:_MOST_CHARACTERS] or "nameless object"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _on_host(value: Any) -> Array:
    """A value as an array in memory of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(value)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        elsewhere = value.__dlpack_device__()[0] not in _HOST_DEVICES
        if elsewhere or not hasattr(value, "__array__"):
            try:
                return np.from_dlpack(value, device="cpu")
            except TypeError:  # an older NumPy, or a producer that copies nothing
                if not hasattr(value, "__array__"):
                    return np.from_dlpack(value)
    return np.asarray(value)


def _of_plain_values(values: list[Any] | tuple[Any, ...]) -> object:
    """A list whose tensors are arrays of NumPy, which NumPy could not convert within a list.

    Raises:
        InputError: entries are masked, which NumPy would not notice.
    """
    if set(map(type, values)) <= _PLAIN:
        return values
    plain: list[object] = []
    for value in values:
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise InputError(f"an entry of the input has {_MASKED}")
        within = isinstance(value, list | tuple)
        plain.append(_of_plain_values(value) if within else value if type(value) in _PLAIN else _on_host(value))
    return plain


def _of_torch(tensor: Any) -> Array:
    """A tensor of PyTorch. NumPy lacks some of its types, whose bits are taken instead."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    narrow = str(plain.dtype).removeprefix("torch.")
    if narrow not in ML_DTYPES.values():
        array: Array = plain.numpy()
        return array
    onnx_type = next(onnx for onnx, known in ML_DTYPES.items() if known == narrow)
    bits = plain.view(sys.modules["torch"].int16 if plain.element_size() == 2 else sys.modules["torch"].uint8)
    viewed: Array = bits.numpy().view(numpy_dtype(onnx_type))
    return viewed


def _table(name: str, frame: Any, expected: str | None) -> Array:
    """All columns of a table, as an array of two dimensions."""
    columns = list(frame.columns)
    if len(set(columns)) < len(columns):
        raise InputError(f"the table for input {shown(name)} has several columns of the same name; rename them")
    if expected is None:
        return np.asarray(frame.to_numpy())
    arrays = [_fitted(f"{name}, column {column}", _on_host(frame[column]), expected, frame) for column in columns]
    return np.stack(arrays, axis=1) if arrays else np.empty((len(frame), 0), numpy_dtype(expected))


def _fitted(name: str, array: Array, expected: str, value: object) -> Array:
    """Numbers in the expected type. Fractions are rounded to it; nothing else may change."""
    wanted = numpy_dtype(expected)
    if wanted == np.uint64 and array.dtype.kind in "fO" and isinstance(value, list | tuple | int):
        whole = np.array(value, object)
        if all(type(one) is int and 0 <= one < 1 << 64 for one in whole.ravel().tolist()):
            return whole.astype(np.uint64)
    if array.dtype == wanted or expected == "string":
        return array
    if array.dtype.kind in _TEXT_KINDS or array.dtype.kind not in "biuf":
        raise InputError(_unlike(name, value, array, expected))
    if not array.size:
        return array.astype(wanted)
    takes_fractions = wanted.kind not in "biu"
    if takes_fractions:
        with np.errstate(over="ignore", invalid="ignore"):
            fitted = array.astype(wanted)
            back = fitted.astype(np.float64)
            same = (np.isnan(back) == np.isnan(array)) & (np.isinf(back) == np.isinf(array))
            if array.dtype.kind in "iu":
                same &= (np.abs(back) < _EXACT) & (back.astype(array.dtype) == array)
        fits = bool(same.all())
    else:
        if array.dtype.kind == "f" or (wanted.kind == "b" and array.dtype.kind != "b"):
            raise InputError(_unlike(name, value, array, expected))
        limits = np.iinfo(wanted) if wanted.kind != "b" else None
        fits = limits is None or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
        fitted = array.astype(wanted) if fits else array
    if not fits:
        raise InputError(f"input {shown(name)} has numbers that {expected} cannot hold: {shown(value)}")
    return fitted


def _unlike(name: str, value: object, array: Array, expected: str) -> str:
    return f"input {shown(name)} is {kind_of(value)} of {str(array.dtype)[:_MOST_CHARACTERS]}, expected {expected}"
