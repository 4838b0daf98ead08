"""Element types by their ONNX names, and tensors in ``.npz`` files.

ONNX's names for types (``float32``, ``bfloat16``, ``string``) are used everywhere: in plans, on the wire, in
messages. NumPy lacks some of them; ``ml_dtypes`` adds those that ONNX Runtime can carry.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.files import open_regular, replacing
from onnxsplit.memory import free_memory_bytes

Array = np.ndarray[Any, Any]

_NUMPY = {
    "float32": "f4", "float64": "f8", "float16": "f2",
    "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8",
    "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "bool": "?", "complex64": "c8", "complex128": "c16",
}  # fmt: skip
_ML_DTYPES = {
    "bfloat16": "bfloat16",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
# TensorProto.DataType of the ONNX specification.
ONNX_TYPE_NUMBER = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "complex64": 14, "complex128": 15, "bfloat16": 16,
    "float8e4m3fn": 17, "float8e4m3fnuz": 18, "float8e5m2": 19, "float8e5m2fnuz": 20, "uint4": 21, "int4": 22,
    "float4e2m1": 23, "float8e8m0": 24, "uint2": 25, "int2": 26,
}  # fmt: skip
_ONNX_TYPE_NAME = {number: name for name, number in ONNX_TYPE_NUMBER.items()}
_BITS = {"uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2, "float8e8m0": 8}

TRAVELLING_TYPES = frozenset([*_NUMPY, *_ML_DTYPES, "string"]) - {"complex64", "complex128"}
"""Types whose tensors can pass from one stage to another: those an ONNX Runtime session takes and gives."""

MAX_RANK = 32
"""Dimensions a tensor may have."""

_ADDRESSES = 1 << 62  # bytes that no tensor reaches, so that sizes can be added and multiplied without a second look
_MOST_PROBLEMS = 10  # that one message lists

_STRING_BYTES = 16  # a guess: the length of strings is not part of their type
_NOTE = "onnxsplit.dtypes.json"  # a member that is no .npy, so no tensor's name can meet it
_MOST_NOTE_BYTES = 1 << 20
_ENCRYPTED = 1  # of a member's flags
_STRING_OBJECT_BYTES = 64  # what Python needs for a short text and the reference to it


def type_name(number: int) -> str | None:
    """ONNX's name of a ``TensorProto.DataType`` number; None for an undefined or unknown one."""
    return _ONNX_TYPE_NAME.get(number)


@functools.cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type that holds an element; ``object`` for strings.

    Raises:
        InputError: the type cannot be held in a NumPy array.
    """
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])
    if dtype == "string":
        return np.dtype(object)
    if dtype in _ML_DTYPES:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[dtype]))
        return found
    raise InputError(f"type {dtype!r} cannot be held in an array; known: {', '.join(sorted(TRAVELLING_TYPES))}")


@functools.lru_cache(maxsize=256)  # callers may come with any number of structured types
def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """ONNX's name of a NumPy type; None when it has none."""
    if dtype.kind in "OUST":
        return "string"
    name = {"float8_" + t.split("float8", 1)[1]: t for t in _ML_DTYPES if "float8" in t}.get(dtype.name, dtype.name)
    return name if name in _NUMPY or name in _ML_DTYPES else None


def is_native(dtype: str) -> bool:
    """True where NumPy itself knows the type, so that a session takes the array as it is."""
    return dtype in _NUMPY or dtype == "string"


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; strings count 16 bytes each, since their length is not part of their type."""
    count = math.prod(shape)
    if dtype == "string":
        return count * _STRING_BYTES
    if dtype in _BITS:
        return -(-count * _BITS[dtype] // 8)
    return count * numpy_dtype(dtype).itemsize


def content_bytes(array: Array) -> int:
    """Bytes of an array with what its strings hold, which ``nbytes`` leaves out."""
    if array.dtype != object:
        return array.nbytes
    return array.nbytes + sum(map(len, array.ravel().tolist()))


def element_count(shape: Sequence[int], itemsize: int = 1) -> int | None:
    """The number of elements of a shape; None where no array can have it.

    A size may not be negative. The sizes other than 0 are bounded together, since NumPy computes strides of them too.
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
    """Hold tensors against what a model takes.

    Args:
        given: name -> array.
        specs: name -> (ONNX type, shape or None); symbolic names in a shape allow any size.
        optional: inputs that may be left out.
        refused: inputs that the model once had: name -> what to say when one is given.

    Raises:
        InputError: listing every name, type, rank and dimension that does not fit, with what is expected.
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
        found = dtype_name(array.dtype)
        if found != dtype:
            problems.append(f"{name!r} has type {found or shown(array.dtype)}, expected {dtype}")
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


def save_npz(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors to an ``.npz`` under any names, with nothing pickled; the file appears whole or not at all.

    Types that NumPy lacks are stored as their bits and noted in a member of the archive; strings are stored as
    fixed-width unicode.
    """
    notes: dict[str, str] = {}
    try:
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for name, tensor in tensors.items():
                dtype = dtype_name(tensor.dtype)
                if dtype in _ML_DTYPES:
                    notes[name] = dtype
                    tensor = tensor.view(np.dtype(f"u{tensor.dtype.itemsize}"))
                elif dtype == "string":
                    tensor = tensor.astype(str)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(tensor), allow_pickle=False)
            if notes:
                archive.writestr(_NOTE, json.dumps(notes))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def load_npz(path: Path) -> dict[str, Array]:
    """Read what :func:`save_npz` or ``numpy.savez`` wrote; strings come back as ``object`` arrays of ``str``.

    Arrays come back in this host's byte order. Nothing is unpacked before all members together are known to fit
    into half of the memory that is free.

    Raises:
        InputError: the file is missing, is no archive, holds pickled objects, types or texts that no model takes,
            claims another size than it has, or is too large.
    """
    most_bytes = free_memory_bytes() // 2
    try:
        with open_regular(path, most_bytes=most_bytes) as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            _check_members(members, most_bytes)
            notes = _read_notes(archive) if _NOTE in archive.namelist() else {}
            tensors = {}
            for member in members:
                if member.filename.endswith(".npy"):
                    name = member.filename.removesuffix(".npy")
                    tensors[name] = _restore(_read_array(archive, member, most_bytes), notes.get(name))
            return tensors
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except Exception as error:  # zipfile, zlib, struct, ast and NumPy raise whatever damaged bytes lead them to
        found = (error.strerror if isinstance(error, OSError) else None) or one_line(error, 300) or type(error).__name__
        raise InputError(
            f"cannot read {path}: {found}. Allowed is an .npz archive of plain arrays, nothing pickled"
        ) from error


def _check_members(members: Sequence[zipfile.ZipInfo], most_bytes: int) -> None:
    """Refuse an archive by its directory, before anything is unpacked."""
    for name, count in Counter(member.filename for member in members).items():
        if count > 1:
            raise ValueError(f"it holds {name!r} {count} times; every name may be there once")
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{member.filename!r} is encrypted; write the archive without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename!r} is compressed by another method than NumPy's (deflate)")
    total = sum(member.file_size for member in members)
    if total > most_bytes:
        raise ValueError(f"it unpacks to {total} bytes; at most {most_bytes}, half of the free memory, are allowed")


def _read_notes(archive: zipfile.ZipFile) -> dict[str, str]:
    if archive.getinfo(_NOTE).file_size > _MOST_NOTE_BYTES:
        raise ValueError(f"{_NOTE} has more than {_MOST_NOTE_BYTES} bytes")
    notes = json.loads(archive.read(_NOTE))
    if not isinstance(notes, dict) or not all(isinstance(kind, str) and kind in _ML_DTYPES for kind in notes.values()):
        raise ValueError(f"{_NOTE} does not give names of types; known: {', '.join(_ML_DTYPES)}")
    return notes


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most_bytes: int) -> Array:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled Python objects")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size - stream.tell():
            raise ValueError(f"{member.filename} claims the shape {shape} of {dtype} in {member.file_size} bytes")
        if dtype.kind in "US" and math.prod(shape) * _STRING_OBJECT_BYTES + 2 * size > most_bytes:
            raise ValueError(f"{member.filename} holds more texts than fit into half of the free memory")
        array: Array = np.empty(shape, dtype, order="F" if fortran else "C")
        _fill(array.reshape(-1, order="A"), stream, size)
    return array


def _fill(array: Array, stream: IO[bytes], size: int) -> None:
    """Read an array's bytes in parts, up to the stream's end, where the archive's checksum is compared."""
    into, done = array.view(np.uint8) if size else array, 0
    while done < size:
        part = stream.read(min(size - done, 1 << 20))
        if not part:
            raise ValueError("it is truncated")
        into[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)


def _restore(array: Array, note: str | None) -> Array:
    if note is not None:
        if array.dtype.kind != "u" or array.dtype.itemsize != numpy_dtype(note).itemsize:
            raise ValueError(f"{array.dtype} cannot hold the bits of {note}")
        return array.astype(array.dtype.newbyteorder("=")).view(numpy_dtype(note))
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "U":
        array = array.astype(object)
        for text in array.flat:
            text.encode()  # half of a surrogate pair is no text
        return array
    if dtype_name(array.dtype) is None:
        raise ValueError(f"type {array.dtype} is none of ONNX's; known: {', '.join(sorted(TRAVELLING_TYPES))}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
