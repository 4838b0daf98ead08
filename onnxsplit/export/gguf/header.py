"""The header of a GGUF file: its fields, and the table of its tensors.

    "GGUF"  version u32  tensors u64  fields u64
    fields:   name, kind u32, value                             a text is its length u64 and UTF-8
    tensors:  name, rank u32, sizes u64 ..., type u32, offset u64
    padding, then the data of the tensors at their offsets

Every length is compared with the bytes that are left before anything is made of it, so a damaged file costs no more
memory than its own size suggests.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError, MissingDependency, shown
from onnxsplit.export.sources import GGUF_MAGIC
from onnxsplit.files import open_regular

_VERSIONS = (2, 3)
_MOST_HEADER_BYTES = 64 << 20  # those of models with 262,144 tokens have 15 MB
_MOST_NAME_BYTES = 1 << 16
_MOST_RANK = 4
_MOST_SIZE = 1 << 40  # elements of a tensor
_TEXT, _LIST = 8, 9
_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file.

    Attributes:
        name: its name.
        type: the name of its type, such as ``Q4_0``.
        shape: its sizes; those of a matrix are outputs and inputs.
        start: the place of its first byte in the file.
        size_bytes: its size in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        path: the file.
        fields: the fields by name; lists of numbers are arrays.
        tensors: the tensors by name.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int = 1 << 31) -> int:
        """A field that is a whole number. A list of equal numbers, one a layer, counts as one number.

        Raises:
            ExportError: the field is missing without a default, or is not such a number.
        """
        value = self._value(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            found = shown(value.tolist() if isinstance(value, np.ndarray) else value)
            raise ExportError(f"{self.path}: {name} is {found}; allowed are whole numbers from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0, most: float = 1e30) -> float:
        """A field that is a number.

        Raises:
            ExportError: as for :meth:`whole`.
        """
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ExportError(f"{self.path}: {name} is {shown(value)}; allowed are numbers from {least:g} to {most:g}")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text.

        Raises:
            ExportError: as for :meth:`whole`.
        """
        value = self._value(name, default)
        if not isinstance(value, str):
            raise ExportError(f"{self.path}: {name} is {shown(value)}; it must be a text")
        return value

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts; empty when it is missing.

        Raises:
            ExportError: it is something else.
        """
        value = self.fields.get(name, [])
        if not isinstance(value, list):
            raise ExportError(f"{self.path}: {name} must be a list of texts")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false.

        Raises:
            ExportError: it is something else.
        """
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise ExportError(f"{self.path}: {name} is {shown(value)}; it must be true or false")
        return value

    def _value(self, name: str, default: object) -> Any:
        value = self.fields.get(name, default)
        if value is None:
            raise ExportError(f"{self.path}: the field {name} is missing, and the model cannot be made without it")
        return value


def read_header(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        ExportError: the file cannot be read, is no GGUF file of a version that is known, or is damaged.
        MissingDependency: ``gguf`` is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingDependency("exporting GGUF files needs gguf: pip install 'onnxsplit[gguf]'") from error
    types = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size == 0:  # it would have no mapping
                raise ExportError(f"{path} is empty; fetch it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, types).header()
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error}") from error


class _Reader:
    """Reads the header from its first byte to its last."""

    def __init__(self, path: Path, data: mmap.mmap, types: Mapping[int, tuple[str, int, int]]) -> None:
        self._path, self._data, self._types = path, data, types
        self._end = min(len(data), _MOST_HEADER_BYTES)
        self._place = 0

    def header(self) -> Header:
        if self._bytes(4, "magic number") != GGUF_MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._number("I", "version")
        if version not in _VERSIONS:
            order = "; it was written for big-endian machines" if version & 0xFFFF == 0 and version else ""
            raise ExportError(
                f"{self._path} has version {version}{order}; versions 2 and 3 can be read: convert it again"
            )
        tensors, fields = self._number("Q", "number of tensors"), self._number("Q", "number of fields")
        found: dict[str, Any] = {}
        for _ in range(fields):  # ends at the end of the data at the latest
            name = self._text("name of a field", _MOST_NAME_BYTES)
            if name in found:
                raise self._damaged(f"the field {shown(name)} is there twice")
            found[name] = self._value(self._number("I", name), name)
        table = [self._tensor() for _ in range(tensors)]
        return Header(self._path, found, self._placed(table, found.get("general.alignment", 32)))

    def _placed(self, table: list[StoredTensor], alignment: object) -> dict[str, StoredTensor]:
        """The tensors, whose places so far are relative to the end of the header."""
        if not isinstance(alignment, int) or alignment not in {1 << power for power in range(3, 17)}:
            raise self._damaged(f"general.alignment is {shown(alignment)}; allowed are powers of two from 8 to 65536")
        first = -(-self._place // alignment) * alignment
        placed: dict[str, StoredTensor] = {}
        for one in table:
            if one.name in placed:
                raise self._damaged(f"the tensor {shown(one.name)} is there twice")
            start = first + one.start
            if start + one.size_bytes > len(self._data):
                raise self._damaged(
                    f"the tensor {one.name} needs {one.size_bytes} bytes from byte {start}, but the file has "
                    f"{len(self._data)}; fetch it again"
                )
            placed[one.name] = StoredTensor(one.name, one.type, one.shape, start, one.size_bytes)
        return placed

    def _tensor(self) -> StoredTensor:
        name = self._text("name of a tensor", _MOST_NAME_BYTES)
        rank = self._number("I", name)
        if not 1 <= rank <= _MOST_RANK:
            raise self._damaged(f"the tensor {shown(name)} has {rank} axes; allowed are 1 to {_MOST_RANK}")
        sizes = struct.unpack(f"<{rank}Q", self._bytes(8 * rank, name))
        if not 1 <= math.prod(sizes) <= _MOST_SIZE:
            raise self._damaged(f"the tensor {shown(name)} has the sizes {shown(sizes)}, which no tensor can have")
        number, offset = self._number("I", name), self._number("Q", name)
        if number not in self._types:
            raise ExportError(f"{self._path}: the tensor {shown(name)} has the unknown type {number}; update gguf")
        kind, block, block_bytes = self._types[number]
        if sizes[0] % block:
            raise self._damaged(f"the rows of {shown(name)} have {sizes[0]} numbers, no multiple of {kind}'s {block}")
        return StoredTensor(name, kind, sizes[::-1], offset, math.prod(sizes) // block * block_bytes)

    def _value(self, kind: int, name: str) -> Any:
        if kind in _KINDS:
            return self._number(_KINDS[kind], name)
        if kind == _TEXT:
            return self._text(name, _MOST_HEADER_BYTES)
        if kind != _LIST:
            raise self._damaged(f"the field {shown(name)} has the unknown kind {kind}")
        inside, count = self._number("I", name), self._number("Q", name)
        if inside in _KINDS:
            data = self._bytes(count * struct.calcsize(f"<{_KINDS[inside]}"), name)
            return np.frombuffer(data, np.dtype(_KINDS[inside]).newbyteorder("<"))
        if inside != _TEXT:
            raise self._damaged(
                f"the field {shown(name)} is a list of the kind {inside}; allowed are numbers and texts"
            )
        if count > (self._end - self._place) // 8:
            raise self._damaged(f"the list {shown(name)} has {count} texts, more than fit into the file")
        return [self._text(name, _MOST_NAME_BYTES) for _ in range(count)]

    def _text(self, what: str, most_bytes: int) -> str:
        size = self._number("Q", what)
        if size > most_bytes:
            raise self._damaged(f"a text has {size} bytes at byte {self._place} ({shown(what)})")
        return self._bytes(size, what).decode(errors="replace")

    def _number(self, form: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}"), what))
        return value

    def _bytes(self, size: int, what: str) -> bytes:
        if size > self._end - self._place:
            where = f"its header ends in {shown(what)}"
            limit = f", after {_MOST_HEADER_BYTES} bytes" if self._end < len(self._data) else ""
            raise self._damaged(f"{where}{limit}; fetch it again")
        data = self._data[self._place : self._place + size]
        self._place += size
        return data

    def _damaged(self, why: str) -> ExportError:
        return ExportError(f"{self._path} is damaged, or no GGUF file: {why}")
