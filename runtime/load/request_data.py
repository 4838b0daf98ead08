"""The inputs of a load's requests: from files, or made up from what the server says of the model."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from onnxsplit.errors import InputError, shown
from onnxsplit.files import read_regular
from onnxsplit.memory import free_memory_bytes
from onnxsplit.npz import load_npz
from onnxsplit.numbers import is_whole
from onnxsplit.tensors import Array, dtype_name, numpy_dtype
from runtime.gateway.protocol.documents import TensorMetadata
from runtime.gateway.protocol.inference import dtype_of
from runtime.gateway.protocol.tensor_data import check_shape, from_bytes, from_items
from runtime.load.served_model import ServedModel

MOST_JSON_BYTES = 256 << 20
"""The largest size of a JSON file with input data."""

_BYTES_OF_ELEMENT = 24  # while a request is made: in a list or as float64, in its own type, and in messages
_WORD = "word"  # what every string that is made up says


def request_inputs(
    model: ServedModel, data: Sequence[str], *, shapes: Mapping[str, tuple[int, ...]], batch: int | None
) -> list[dict[str, Array]]:
    """The inputs of each request that is sent in turn.

    Args:
        model: the model.
        data: ``random`` or ``zero``, or files: ``.npz`` with one request each, ``.json`` with any number of them, as
            Triton's perf_analyzer reads them. Empty for ``random``.
        shapes: sizes of inputs that have free dimensions, by name; with or without the batch axis.
        batch: number of rows of each request; None for one, where the model has a batch axis.

    Raises:
        InputError: a file cannot be used, an input is missing, unknown or of another type or shape, or the size of a
            free dimension is not known.
    """
    unknown = set(shapes) - {spec.name for spec in model.inputs}
    if unknown:
        raise InputError(f"--shape names {_names(unknown)}, and the inputs of {model.name} are {_inputs(model)}")
    if list(data) in ([], ["random"], ["zero"]):
        zero = list(data) == ["zero"]
        return [{spec.name: _made(spec, _shape(model, spec, shapes, batch), zero=zero) for spec in model.inputs}]
    entries: list[dict[str, Array]] = []
    for name in data:
        path = Path(name)
        found = _read_json(path, model, shapes, batch) if path.suffix == ".json" else [load_npz(path)]
        for entry in found:
            _check(path, model, entry)
        entries += found
    if not entries:
        raise InputError(f"{', '.join(data)} holds no request; its list 'data' is empty")
    return entries


def _made(spec: TensorMetadata, shape: tuple[int, ...], *, zero: bool) -> Array:
    """Values that models accept: numbers from 0 to 1, and 0 or 1 for integers, which may index a table."""
    dtype = dtype_of(spec.name, spec.datatype)
    _check_size(spec, shape)
    kind = numpy_dtype(dtype)
    if dtype == "string":
        return np.full(shape, "" if zero else _WORD, object)
    if zero:
        return np.zeros(shape, kind)
    source = np.random.default_rng(0)
    values = source.random(shape) if kind.kind not in "iub" else source.integers(0, 2, shape)
    return np.asarray(values).astype(kind)


def _check_size(spec: TensorMetadata, shape: Sequence[int]) -> None:
    """Raise InputError unless a tensor of this shape fits into memory, where a request has several copies of it."""
    needed = check_shape(spec.name, shape, dtype_of(spec.name, spec.datatype)) * _BYTES_OF_ELEMENT
    if needed > (free := free_memory_bytes()):
        raise InputError(
            f"input {spec.name!r} of shape {list(shape)} needs {needed >> 20:,} MiB of memory in a request, and "
            f"{free >> 20:,} MiB are free; choose smaller sizes"
        )


def _shape(
    model: ServedModel, spec: TensorMetadata, shapes: Mapping[str, tuple[int, ...]], batch: int | None
) -> tuple[int, ...]:
    """The shape of an input of each request.

    Raises:
        InputError: it has free dimensions whose sizes are not known, or the given shape does not fit.
    """
    given = shapes.get(spec.name)
    if given is not None:
        return _fitted(spec, given, batch)
    sizes = list(spec.shape)
    if sizes and sizes[0] == -1 and (batch is not None or model.batched):
        sizes[0] = batch or 1
    if -1 in sizes:
        example = ",".join(str(1 if size == -1 else size) for size in sizes)
        raise InputError(
            f"input {spec.name!r} of {model.name} has shape {spec.shape}, where -1 is a size that may vary; choose it "
            f"with --shape {spec.name}:{example}, or give inputs with --input-data FILE"
        )
    if batch is not None and spec.shape and spec.shape[0] not in (-1, batch):
        raise InputError(f"input {spec.name!r} of {model.name} has shape {spec.shape}, so -b {batch} does not fit")
    return tuple(sizes)


def _fitted(spec: TensorMetadata, given: Sequence[int], batch: int | None) -> tuple[int, ...]:
    """A given shape, with the batch axis before it where that is missing.

    Raises:
        InputError: it does not fit the declared shape.
    """
    declared = spec.shape
    shape = tuple(given)
    if len(shape) == len(declared) - 1 and declared[0] == -1:
        shape = (batch or 1, *shape)
    elif batch is not None and declared and declared[0] == -1 and len(shape) == len(declared) and shape[0] == 1:
        shape = (batch, *shape[1:])
    unranked = declared == [-1]  # how a server says that any number of dimensions is allowed, and also one free one
    fits = len(shape) == len(declared) and all(d in (-1, s) for d, s in zip(declared, shape, strict=True))
    if not fits and not unranked:
        raise InputError(f"the shape {list(given)} does not fit input {spec.name!r}, whose shape is {declared}")
    return shape


def _read_json(
    path: Path, model: ServedModel, shapes: Mapping[str, tuple[int, ...]], batch: int | None
) -> list[dict[str, Array]]:
    """Read the requests of a file that perf_analyzer reads, too."""
    entries = read_entries(path)
    specs = {spec.name: spec for spec in model.inputs}
    found = []
    for number, entry in enumerate(entries):
        arrays = {}
        for name, value in entry.items():
            if name not in specs:
                raise InputError(
                    f"{path}: request {number} has {name!r}; the inputs of {model.name} are {_inputs(model)}"
                )
            try:
                arrays[name] = _tensor(model, specs[name], value, shapes, batch)
            except InputError as error:
                raise InputError(f"{path}: request {number}: {error}") from error
        found.append(arrays)
    return found


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file ``{"data": [{NAME: VALUE, ...}, ...]}``; lists of lists, for sequences, are joined.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        document = json.loads(read_regular(path, most_bytes=MOST_JSON_BYTES))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    data = document.get("data") if isinstance(document, dict) else None
    flat = (
        [one for part in data for one in (part if isinstance(part, list) else [part])]
        if isinstance(data, list)
        else None
    )
    if flat is None or not all(isinstance(one, dict) for one in flat):
        raise InputError(f'{path} must be {{"data": [{{"INPUT": VALUES, ...}}, ...]}}, as perf_analyzer reads it')
    return flat


def _tensor(
    model: ServedModel, spec: TensorMetadata, value: Any, shapes: Mapping[str, tuple[int, ...]], batch: int | None
) -> Array:
    """A tensor from its list of values, its content and shape, or its bytes in base64."""
    content, shape = value, None
    if isinstance(value, dict):
        content, given = value.get("content", value.get("b64")), value.get("shape")
        if given is not None:
            if not isinstance(given, list) or not all(is_whole(size) and size >= 0 for size in given):
                raise InputError(f"the shape {shown(given)} of {spec.name!r} is not a list of sizes")
            shape = _fitted(spec, given, batch)
    shape = shape or _shape(model, spec, shapes, batch)
    _check_size(spec, shape)
    if isinstance(value, dict) and "b64" in value:
        try:
            raw = base64.b64decode(content, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise InputError(f"the base64 of {spec.name!r} cannot be decoded") from None
        return from_bytes(spec.name, spec.datatype, shape, raw)
    items = _flat(content if isinstance(content, list) else [content])
    rows = shape[0] if shape and spec.shape and spec.shape[0] == -1 else 1
    if rows > 1 and len(items) * rows == math.prod(shape):
        items = items * rows  # one row is given; every row of the batch is the same
    return from_items(spec.name, spec.datatype, shape, items)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _flat(values: list[Any]) -> list[Any]:
    while values and isinstance(values[0], list):
        values = [item for part in values for item in (part if isinstance(part, list) else [part])]
    return values


def _check(path: Path, model: ServedModel, entry: Mapping[str, Array]) -> None:
    """Raise InputError unless the arrays are those that the model takes."""
    specs = {spec.name: spec for spec in model.inputs}
    if missing := set(specs) - set(entry):
        raise InputError(f"{path} lacks {_names(missing)}; the inputs of {model.name} are {_inputs(model)}")
    for name, array in entry.items():
        spec = specs.get(name)
        if spec is None:
            raise InputError(f"{path} has {name!r}; the inputs of {model.name} are {_inputs(model)}")
        if dtype_name(array.dtype) != dtype_of(name, spec.datatype):
            raise InputError(f"{path}: {name!r} has type {array.dtype}; {model.name} takes {spec.datatype}")
        _fitted(spec, array.shape, None)


def _names(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _inputs(model: ServedModel) -> str:
    return ", ".join(f"{spec.name!r} ({spec.datatype}, {spec.shape})" for spec in model.inputs)
