"""Tensors in ``.npz`` files."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from onnxsplit.errors import InputError, one_line
from onnxsplit.files import open_regular, replacing
from onnxsplit.memory import free_memory_bytes
from onnxsplit.tensors import ML_DTYPES, TRAVELLING_TYPES, Array, dtype_name, numpy_dtype

_NOTE = "onnxsplit.dtypes.json"  # not an .npy, so no tensor can have this name
_MOST_NOTE_BYTES = 1 << 20
_ENCRYPTED = 1  # a bit of a member's flags
_OTHERS = {".onnx": "a model", ".plan": "a plan", ".npy": "one array without a name: write it with numpy.savez"}
_STRING_OBJECT_BYTES = 64  # memory that Python needs for a short text and the reference to it


def save_npz(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors to an ``.npz`` under any names, without pickling; the file appears as a whole or not at all.

    Types that NumPy lacks are stored as their bits, and a member of the archive notes the type. Strings are stored as
    fixed-width unicode.

    Raises:
        InputError: the file cannot be written.
    """
    notes: dict[str, str] = {}
    try:
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for name, tensor in tensors.items():
                dtype = dtype_name(tensor.dtype)
                if dtype in ML_DTYPES:
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
    """Read a file that :func:`save_npz` or ``numpy.savez`` wrote.

    Strings are returned as ``object`` arrays of ``str``, all arrays in this host's byte order. Nothing is unpacked
    before it is known that all members together fit into half of the free memory.

    Raises:
        InputError: the file is missing, is not an archive, holds pickled objects, types or texts that no model takes,
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
    except Exception as error:  # zipfile, zlib, struct, ast and NumPy raise many kinds of errors on damaged bytes
        reason = (
            (error.strerror if isinstance(error, OSError) else None) or one_line(error, 300) or type(error).__name__
        )
        kind = _OTHERS.get(path.suffix.lower())
        raise InputError(
            f"cannot read {path}{f' ({kind})' if kind else ''}: {reason}. It must be an .npz archive of plain arrays, "
            "not of pickled objects"
        ) from error


def _check_members(members: Sequence[zipfile.ZipInfo], most_bytes: int) -> None:
    """Check the archive's directory before anything is unpacked."""
    for name, count in Counter(member.filename for member in members).items():
        if count > 1:
            raise ValueError(f"it holds {name!r} {count} times; every name may occur only once")
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
    if not isinstance(notes, dict) or not all(isinstance(kind, str) and kind in ML_DTYPES for kind in notes.values()):
        raise ValueError(f"{_NOTE} does not give names of types; known: {', '.join(ML_DTYPES)}")
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
    """Read the bytes of an array in parts up to the end of the stream, where the archive's checksum is compared."""
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
            text.encode()  # half of a surrogate pair is not text
        return array
    if dtype_name(array.dtype) is None:
        raise ValueError(f"type {array.dtype} is not one of ONNX's; known: {', '.join(sorted(TRAVELLING_TYPES))}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
