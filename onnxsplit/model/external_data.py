"""External data: files beside a model that hold its weights.

A model names such a file by a *location*, a path relative to the model's folder. This module follows ONNX Runtime's
rule: the file must lie in the model's folder or, when the model itself is a link, in the folder of the file that the
link leads to. Hugging Face lays out its cache like this: ``snapshots/REV/model.onnx`` and its data are links to files
in ``blobs``. Every function here returns paths without links, so that no later open follows a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import onnx

from onnxsplit.errors import ModelError, shown
from onnxsplit.files import check_name, check_regular
from onnxsplit.tensors import size_bytes, type_name


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data lies in a file of its own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def location_of(tensor: onnx.TensorProto) -> str:
    """The path of a tensor's external data, relative to the model's folder; empty when the tensor names none."""
    return next((entry.value for entry in reversed(tensor.external_data) if entry.key == "location"), "")


def external_range(model: Path, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    """Where a tensor's external data lies: its file (without links), offset and length in bytes.

    Args:
        model: the path of the model that holds the tensor.
        tensor: the tensor.

    Raises:
        ModelError: the file is missing, not a regular file, outside the folders that are allowed, or too short.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, what = location_of(tensor), f"external data of {tensor.name!r} in {model}"
    path = _resolved(model, location, what)
    expected = size_bytes(type_name(tensor.data_type) or "uint8", tuple(tensor.dims))
    offset = _number(entries.get("offset"), f"{what}: offset")
    length = _number(entries.get("length"), f"{what}: length") or expected
    if length < expected:
        raise ModelError(f"{what}: it declares {length} bytes, but its type and shape need {expected}")
    available = path.stat().st_size
    if offset + length > available:
        raise ModelError(
            f"{what}: it needs {length} bytes at offset {offset}, but {location!r} has {available}: "
            "the file is truncated or belongs to another model"
        )
    return path, offset, length


def _number(text: str | None, what: str) -> int:
    """Parse a number of bytes as ONNX writes it; 0 when it is missing."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS:
        raise ModelError(f"{what} {shown(text)} is not a number of bytes")
    return int(text)


_MOST_DIGITS = 19


def _resolved(model: Path, location: str, what: str) -> Path:
    """The regular file that a location leads to."""
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{what}: location {location!r} is not a path inside the model's folder")
    path = model.parent / location
    try:
        check_name(path)
        real = Path(os.path.realpath(path, strict=True))
        _check_folder(model, path, real, what)
        check_regular(real)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ModelError(
                f"{what}: {path} is a link to {path.readlink()}, which does not exist; fetch the data again"
            ) from error
        raise ModelError(f"{what}: {path} is missing; keep it beside the model") from error
    except OSError as error:
        raise ModelError(f"{what}: {shown(str(path))} cannot be used: {error.strerror}") from error
    return real


def _check_folder(model: Path, path: Path, real: Path, what: str) -> None:
    """Refuse a file outside the folder of the model's path and outside the folder of the model's real path."""
    folders = dict.fromkeys(
        Path(os.path.realpath(place)) for place in (model.parent, Path(os.path.realpath(model)).parent)
    )
    if not any(real.is_relative_to(folder) for folder in folders):
        raise ModelError(
            f"{what}: {path} is a link to {real}, outside the folders allowed: {' and '.join(map(str, folders))}. Put "
            "the file itself in the model's folder"
        )


def open_external(file: Path) -> FileIO:
    """Open a file that :func:`external_range` returned; a link that has replaced it since then is refused.

    Raises:
        OSError: the file cannot be opened.
    """
    return os.fdopen(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0)


def load_external(model: Path, tensors: Iterable[onnx.TensorProto]) -> None:
    """Read external data into the tensors themselves, which then are no longer external.

    Raises:
        ModelError: as :func:`external_range`, or the data cannot be read.
    """
    for tensor, (file, offset, length) in _ranges(model, tensors):
        try:
            with open_external(file) as stream:
                stream.seek(offset)
                content = stream.read(length)
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror}") from error
        if len(content) != length:
            raise ModelError(f"{file} became shorter while it was read")
        tensor.raw_data = content
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def point_from_one_folder(model: Path, tensors: Iterable[onnx.TensorProto]) -> Path:
    """Give the tensors locations relative to one common folder, without links; return that folder.

    A session on the bytes of a model looks for external data in one folder only, and does not know the model's path.
    """
    ranges = list(_ranges(model, tensors))
    parents = {file.parent for _, (file, _, _) in ranges}
    folder = Path(os.path.commonpath(parents) if parents else os.path.realpath(model.parent))
    for tensor, (file, _, _) in ranges:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(file.relative_to(folder))
    return folder


def _ranges(
    model: Path, tensors: Iterable[onnx.TensorProto]
) -> Iterator[tuple[onnx.TensorProto, tuple[Path, int, int]]]:
    return ((tensor, external_range(model, tensor)) for tensor in tensors if is_external(tensor))
