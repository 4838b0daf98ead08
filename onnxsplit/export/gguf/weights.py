"""The weights of a GGUF file: read from its memory map some rows at a time, as float32 or in blocks of 4 or 8 bits.

MatMulNBits multiplies with blocks of a row that share a scale and a zero point, a whole number: a number n of 8 bits
means ``scale * (n - zero)``, and ``zero`` is 128 where it is not written, or 8 for 4 bits. Some of GGUF's types are
exactly that. In others, numbers are ``step * q + minimum`` with a few bits q and a minimum that is a float. There, n is
``k * q`` for the k for which the minimum is nearest to a multiple of ``step / k``, so only the minimum is rounded, by
less than a hundredth of the step as a rule. The others are rounded anew:

    Q4_0                          4 bits in blocks of 32, exact
    Q8_0, Q5_0, IQ4_NL            8 bits in blocks of 32, exact
    Q6_K                          8 bits in blocks of 16, exact
    Q4_1, Q5_1, Q4_K, Q5_K        8 bits in blocks of 32 with zero points: the minimum is rounded
    F32, F16, BF16                float32, exact
    others                        8 bits in blocks of 32, rounded
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
_STEPPED = {"Q4_1": 15, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31}  # steps of a minimum, and the most steps
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
        zeros: whether blocks have zero points.
    """

    bits: int | None
    block: int = _BLOCK
    exact: bool = True
    zeros: bool = False


def form_of(kind: str, wanted: Precision) -> Form:
    """How a matrix of one of GGUF's types is written."""
    if wanted == "float" or (wanted == "auto" and kind in _FLOATS):
        return Form(None)
    bits = 4 if wanted == "4" or (wanted == "auto" and kind == "Q4_0") else 8
    exact = (kind, bits) in _EXACT
    return Form(bits, _EXACT.get((kind, bits), _BLOCK), exact, zeros=bits == 8 and kind in _STEPPED)


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

    def blocks(self, name: str, rows: int, columns: int, form: Form) -> Iterator[tuple[slice, tuple[Array, ...]]]:
        """A matrix some rows at a time, as numbers of 4 or 8 bits, scales and maybe zero points; each with its place.

        The numbers are bytes [rows, blocks, bytes of a block], those of 4 bits in pairs with the first in the low bits.
        The scales are float32 [rows, blocks], the zero points bytes of the same shape, where the form has them. Where
        the last block of a row is not full, 0 follows.

        Raises:
            ExportError: as for :meth:`rows`.
        """
        assert form.bits is not None
        entry = self.entry(name)
        for place, floats in self.chunks(name, rows, columns):
            if missing := -columns % form.block:
                floats = np.pad(floats, ((0, 0), (0, missing)))
            grouped = floats.reshape(len(floats), -1, form.block)
            if form.zeros:
                steps, minima = _steps(self._raw(entry, place.start, place.stop), entry.type)
                yield place, _stepped(grouped, steps, minima, _STEPPED[entry.type])
                continue
            if form.exact:
                scales = _scales(self._raw(entry, place.start, place.stop), entry.type)
            else:
                largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
                scales = largest / np.float32(_LARGEST[form.bits])
            yield place, (_numbers(grouped, scales, form.bits), scales)

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


def _steps(raw: Array, kind: str) -> tuple[Array, Array]:
    """The step and the minimum of each block in rows of one of the types with minima, as float32 [rows, blocks]."""
    if kind.endswith("_1"):
        groups = raw.reshape(len(raw), -1, {"Q4_1": 20, "Q5_1": 24}[kind])
        pair = np.ascontiguousarray(groups[..., :4]).view(np.float16).astype(np.float32)
        return pair[..., 0], pair[..., 1]
    groups = raw.reshape(len(raw), -1, {"Q4_K": 144, "Q5_K": 176}[kind])  # of eight blocks
    pair = np.ascontiguousarray(groups[..., :4]).view(np.float16).astype(np.float32)
    packed = groups[..., 4:16]  # eight scales and eight minima of 6 bits each
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], -1)
    steps, floors = pair[..., :1] * scales, -pair[..., 1:] * minima
    return steps.reshape(len(raw), -1), floors.reshape(len(raw), -1)


def _stepped(grouped: Array, steps: Array, minima: Array, most: int) -> tuple[Array, Array, Array]:
    """Numbers of 8 bits, scales and zero points of blocks ``step * q + minimum`` with q from 0 to ``most``.

    A block whose minimum is further from 0 than its zero point can be, or that has no step, is rounded anew.
    """
    with np.errstate(all="ignore"):
        below = np.nan_to_num(-minima / steps, nan=-1.0, posinf=-1.0, neginf=-1.0)  # steps from the minimum up to 0
        finest = 255 // most
        parts, error = np.ones_like(below), np.full_like(below, np.inf)
        for part in range(1, finest + 1):
            off = np.abs(below * part - np.rint(below * part)) / part
            better = (off < error) & (below >= 0) & (below * part <= 255)
            parts, error = np.where(better, part, parts), np.where(better, off, error)
        fits = np.isfinite(error)
        largest = np.abs(grouped).max(-1)
        scales = np.where(fits, steps / parts, largest / np.float32(127)).astype(np.float32)
        zeros = np.where(fits, np.rint(below * parts), 128)
        steps_up = np.rint((grouped - minima[..., None]) / steps[..., None]) * parts[..., None]
        anew = np.rint(grouped / np.where(scales == 0, np.float32(1), scales)[..., None]) + 128
        numbers = np.nan_to_num(np.where(fits[..., None], steps_up, anew)).clip(0, 255)
    return numbers.astype(np.uint8), scales, zeros.astype(np.uint8)


def _numbers(grouped: Array, scales: Array, bits: int) -> Array:
    """Numbers of 4 or 8 bits, [rows, blocks, bytes], of floats [rows, blocks, block]."""
    half = 1 << (bits - 1)
    with np.errstate(all="ignore"):
        whole = np.rint(grouped / np.where(scales == 0, np.float32(1), scales)[..., None]) + half
        numbers: Array = np.nan_to_num(whole.clip(0, 2 * half - 1)).astype(np.uint8)
    return numbers if bits == 8 else numbers[..., 0::2] | numbers[..., 1::2] << 4
