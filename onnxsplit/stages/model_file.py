"""Writing model files: the protobuf, and the external data that it points to."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import onnx
from google.protobuf.message import EncodeError

from onnxsplit.errors import PartitionError
from onnxsplit.files import written_file
from onnxsplit.model.external_data import external_range, is_external, open_external
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.shared_weights import Extent, blocks, extents
from onnxsplit.model.source import SourceModel
from onnxsplit.plan_base import FileEntry

_CHUNK = 1 << 20  # bytes that are hashed at once, few enough to be in the processor's cache
_ALIGNMENT = 4096  # external data starts at a page, so that ONNX Runtime can map it


def ignore(_: int) -> None:
    """Report no progress; the default of functions that write."""


def write_model(
    source: SourceModel, model: onnx.ModelProto, out: Path, beside: Mapping[str, str], *, by_content: bool = False
) -> tuple[Path, ...]:
    """Write a model, its external data to ``OUT.data``, and texts to ``OUT.NAME``. The model appears last.

    Args:
        source: the model that the external data belongs to.
        model: the model to write.
        out: the model's file.
        beside: texts to write beside the model, by NAME.
        by_content: as for :func:`copy_external`.

    Returns:
        The files, the model first.

    Raises:
        OSError: a file cannot be written, or something other than a regular file is in its place.
        PartitionError: the model is above the 2 GB that protobuf allows.
    """
    out = written_file(out)
    folder = out.parent
    with tempfile.TemporaryDirectory(prefix=".onnxsplit-", dir=folder) as scratch:
        copy_external(source, model, Path(scratch) / f"{out.name}.data", by_content=by_content)
        (Path(scratch) / out.name).write_bytes(serialized(model))
        for name, text in beside.items():
            (Path(scratch) / f"{out.name}.{name}").write_text(text)
        written = sorted(Path(scratch).iterdir(), key=lambda file: file.name == out.name)
        targets = [written_file(folder / file.name) for file in written]
        return tuple(Path(shutil.move(*pair)) for pair in zip(written, targets, strict=True))[::-1]


def serialized(model: onnx.ModelProto) -> bytes:
    """The bytes of a model.

    Raises:
        PartitionError: the model is above the 2 GB that protobuf allows.
    """
    try:
        content: bytes = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise PartitionError(
            f"a part of the model is above the 2 GB a protobuf can hold ({error}); store the model with external data"
        ) from error
    return content


def copy_external(
    source: SourceModel,
    model: onnx.ModelProto,
    path: Path,
    wrote: Callable[[int], None] = ignore,
    *,
    by_content: bool = False,
) -> tuple[FileEntry, ...]:
    """Copy the external data that a model needs into its own file, and let the model refer to it.

    Bytes that several tensors share are written once. Large initializers within the model file that are equal are moved
    to the data file too.

    Args:
        source: the model that the external data belongs to.
        model: the model whose tensors refer to the data; it is changed.
        path: the data file to write.
        wrote: called with the number of bytes after each part that was written.
        by_content: True also finds equal bytes in different places.

    Returns:
        The entry of the data file; empty if there is no external data.

    Raises:
        PartitionError: an external data file became shorter meanwhile.
        OSError: a file cannot be read or written.
    """
    inside = _tensors_by_block(source, model, by_content)
    if not inside:
        return ()
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as target, ThreadPoolExecutor(1) as copier:
        for block, held in inside.items():
            digest.update(bytes(-end % _ALIGNMENT))
            end += -end % _ALIGNMENT
            tensor, place = held[0]
            if is_external(tensor):
                file, offset, _ = external_range(source.place, tensor)
                start = offset - (place.offset - block.offset)
                with open_external(file) as origin:
                    copied = copier.submit(_copy_range, origin.fileno(), target.fileno(), start, end, block.length)
                    _hash_range(digest, origin, start, block.length, wrote)
                    copied.result()
            else:
                target.seek(end)
                target.write(tensor.raw_data)
                digest.update(tensor.raw_data)
                wrote(block.length)
            for tensor, place in held:
                _point(tensor, path.name, end + place.offset - block.offset, place.length)
            end += block.length
    return (FileEntry(name=path.name, sha256=digest.hexdigest(), size_bytes=end),)


def _tensors_by_block(
    source: SourceModel, model: onnx.ModelProto, by_content: bool
) -> dict[Extent, list[tuple[onnx.TensorProto, Extent]]]:
    """The blocks of bytes to copy, each with its tensors and their places in it."""
    count = len(model.graph.initializer)
    tensors = [t for position, t in enumerate(graph_tensors(model.graph)) if position < count or is_external(t)]
    places = extents(source.place, tensors, by_content=by_content)
    block_of = blocks(place for place in places if place is not None and place.length)
    inside: dict[Extent, list[tuple[onnx.TensorProto, Extent]]] = {}
    for tensor, place in zip(tensors, places, strict=True):
        if place is not None and not place.length:  # ONNX Runtime does not accept external data of no bytes
            _keep_inside(tensor)
        elif place is not None:
            inside.setdefault(block_of[place], []).append((tensor, place))
    return inside


def _keep_inside(tensor: onnx.TensorProto) -> None:
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = b""


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _copy_range(origin: int, target: int, offset: int, target_offset: int, length: int) -> None:
    """Copy bytes from file to file within the kernel, or through this process if the file systems cannot."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(origin, target, length - done, offset + done, target_offset + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            count = os.pwrite(target, os.pread(origin, min(_CHUNK, length - done), offset + done), target_offset + done)
        if not count:
            raise PartitionError("an external data file became shorter while it was read")
        done += count


def _hash_range(digest: hashlib._Hash, origin: FileIO, offset: int, length: int, done: Callable[[int], None]) -> None:
    buffer = bytearray(_CHUNK)
    origin.seek(offset)
    while length:
        count = origin.readinto(memoryview(buffer)[: min(length, _CHUNK)])
        if not count:
            raise PartitionError("an external data file became shorter while it was read")
        digest.update(memoryview(buffer)[:count])
        length -= count
        done(count)


def file_entry(path: Path) -> FileEntry:
    """The entry of a file that was written: name, size and SHA-256."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(name=path.name, sha256=digest, size_bytes=path.stat().st_size)
