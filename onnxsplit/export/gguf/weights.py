"""The weights of a GGUF file: read from its memory map some rows at a time, as float32 or in blocks of 4 or 8 bits.

MatMulNBits multiplies with blocks of a row that share a scale; a number of 8 bits means ``scale * (number - 128)``, one
of 4 bits ``scale * (number - 8)``. Some of GGUF's types are exactly that. The others are rounded anew:

    Q4_0                          4 bits in blocks of 32, exact
    Q8_0, Q5_0, IQ4_NL            8 bits in blocks of 32, exact
    Q6_K                          8 bits in blocks of 16, exact
    F32, F16, BF16                float32, exact
    Q4_1, Q5_1, Q2_K ... Q5_K     8 bits in blocks of 32, rounded: the minimum of their blocks is a float
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxsplit.errors import ExportError
from onnxsplit.export.conversion import Precision
from onnxsplit.export.gguf.header import Header, StoredTensor
from onnxsplit.tensors import Array

_FLOATS = ("F32", "F16", "BF16")
_EXACT = {("Q4_0", 4): 32, ("Q4_0", 8): 32, ("Q8_0", 8): 32, ("Q5_0", 8): 32, ("IQ4_NL", 8): 32, ("Q6_K", 8): 16}
_BLOCK = 32  # of weights that are rounded anew
_LARGEST = {8: 127, 4: -8}  # the whole number that the largest number of a block becomes
_CHUNK = 1 << 22  # numbers that are converted at a time


@dataclass(frozen=True)
class Form:
    """How a matrix is written.

    Attributes:
        bits: 4 or 8; None for float32.
        block: how many numbers of a row share a scale.
        exact: whether the file's numbers keep their values.
    """

    bits: int | None
    block: int = _BLOCK
    exact: bool = True


def form_of(kind: str, wanted: Precision) -> Form:
    """How a matrix of one of GGUF's types is written."""
    if wanted == "float" or (wanted == "auto" and kind in _FLOATS):
        return Form(None)
    bits = 4 if wanted == "4" or (wanted == "auto" and kind == "Q4_0") else 8
    exact = (kind, bits) in _EXACT
    return Form(bits, _EXACT.get((kind, bits), _BLOCK), exact)


class GGUFWeights:
    """The weights of a file. Each is read when it is asked for, and none is kept.

    Args:
        header: the header of the file.

    Attributes:
        used: the names of the weights that were asked for.
    """

    def __init__(self, header: Header) -> None:
        self.used: set[str] = set()
        self._path, self._table = header.path, header.tensors
        self._data = np.memmap(header.path, np.uint8, mode="r")

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def entry(self, name: str) -> StoredTensor:
        """What the file says of a weight.

        Raises:
            ExportError: the file has no such weight.
        """
        if name not in self._table:
            raise ExportError(f"{self._path} has no tensor {name}, which a model of its architecture needs")
        self.used.add(name)
        return self._table[name]

    def vector(self, name: str, size: int) -> Array:
        """A weight with one axis, as float32.

        Raises:
            ExportError: it is missing, or has another size.
        """
        self._check(name, (size,))
        floats: Array = self._floats(self.entry(name), 0, 1)[0]
        return floats

    def rows(self, name: str, rows: int, columns: int, numbers: Array) -> Array:
        """The rows of a matrix with the given numbers, as float32 [..., columns].

        Raises:
            ExportError: it is missing, or has other sizes.
        """
        self._check(name, (rows, columns))
        entry = self.entry(name)
        flat = [self._floats(entry, row, row + 1) for row in numbers.ravel().tolist()]
        return np.concatenate(flat).reshape(*numbers.shape, columns)

    def chunks(self, name: str, rows: int, columns: int) -> Iterator[tuple[slice, Array]]:
        """A matrix some rows at a time, as float32; each with its place.

        Raises:
            ExportError: as for :meth:`rows`.
        """
        self._check(name, (rows, columns))
        step = max(1, _CHUNK // columns)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            yield slice(first, last), self._floats(self.entry(name), first, last)

    def blocks(self, name: str, rows: int, columns: int, form: Form) -> Iterator[tuple[slice, Array, Array]]:
        """A matrix some rows at a time, as numbers of 4 or 8 bits and scales; each with its place.

        The numbers are bytes [rows, blocks, bytes of a block], those of 4 bits in pairs with the first in the low bits.
        The scales are float32 [rows, blocks]. Where the last block of a row is not full, 0 follows.

        Raises:
            ExportError: as for :meth:`rows`.
        """
        assert form.bits is not None
        entry = self.entry(name)
        for place, floats in self.chunks(name, rows, columns):
            if missing := -columns % form.block:
                floats = np.pad(floats, ((0, 0), (0, missing)))
            grouped = floats.reshape(len(floats), -1, form.block)
            if form.exact:
                scales = _scales(self._raw(entry, place.start, place.stop), entry.type)
            else:
                largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
                scales = largest / np.float32(_LARGEST[form.bits])
            yield place, _numbers(grouped, scales, form.bits), scales

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.entry(name).shape
        if found != shape:
            raise ExportError(f"{self._path}: the tensor {name} has the sizes {list(found)}; it needs {list(shape)}")

    def _raw(self, entry: StoredTensor, first: int, last: int) -> Array:
        """Rows as the file has them, [rows, bytes]."""
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        data = self._data[entry.start : entry.start + entry.size_bytes].reshape(rows, -1)
        return data[first:last]

    def _floats(self, entry: StoredTensor, first: int, last: int) -> Array:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = self._raw(entry, first, last)
        try:
            with np.errstate(all="ignore"):  # a damaged file may hold any number
                return dequantize(raw, GGMLQuantizationType[entry.type]).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ExportError(
                f"{self._path}: the tensor {entry.name} has the type {entry.type}, which gguf cannot read; convert the "
                "model to Q8_0 or Q4_0"
            ) from error


def _scales(raw: Array, kind: str) -> Array:
    """The scales of blocks in rows of one of the exact types, as float32 [rows, blocks]."""
    if kind == "Q6_K":  # 128 + 64 bytes of numbers, 16 whole numbers, and one scale
        groups = raw.reshape(len(raw), -1, 210)
        whole = np.ascontiguousarray(groups[..., 192:208]).view(np.int8).astype(np.float32)
        scale = np.ascontiguousarray(groups[..., 208:]).view(np.float16).astype(np.float32)
        return (whole * scale).reshape(len(raw), -1)
    size = {"Q4_0": 18, "IQ4_NL": 18, "Q5_0": 22, "Q8_0": 34}[kind]
    first = np.ascontiguousarray(raw.reshape(len(raw), -1, size)[..., :2])
    return first.view(np.float16)[..., 0].astype(np.float32)


def _numbers(grouped: Array, scales: Array, bits: int) -> Array:
    """Numbers of 4 or 8 bits, [rows, blocks, bytes], of floats [rows, blocks, block]."""
    half = 1 << (bits - 1)
    with np.errstate(all="ignore"):
        whole = np.rint(grouped / np.where(scales == 0, np.float32(1), scales)[..., None]) + half
        numbers: Array = np.nan_to_num(whole.clip(0, 2 * half - 1)).astype(np.uint8)
    return numbers if bits == 8 else numbers[..., 0::2] | numbers[..., 1::2] << 4
