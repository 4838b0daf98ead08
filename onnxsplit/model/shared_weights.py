"""Shared weights: where the bytes of stored tensors lie, and which tensors share bytes.

Tied weights are two initializers with the same bytes: two references to one range of external data, or two equal large
tensors in the model file. Ranges of external data may also overlap, or contain each other. Shared bytes are written
once in each file and counted once in each stage.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx

from onnxsplit.model.external_data import external_range, is_external, open_external

_LARGE_BYTES = 64 << 10  # smaller tensors in the model file are not compared
_CHUNK = 1 << 20
_COMPARED_FIRST_BYTES = 64  # at the beginning and at the end


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie.

    Attributes:
        home: path of a file of external data, or hash of the bytes.
        offset: offset of the first byte.
        length: number of bytes.
    """

    home: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.offset + self.length


@dataclass(frozen=True)
class Stored:
    """Bytes that a model stores once, and the names of all tensors that they are part of."""

    size_bytes: int
    names: frozenset[str]


def extents(model: Path, tensors: Sequence[onnx.TensorProto], *, by_content: bool = False) -> list[Extent | None]:
    """Where each tensor's bytes lie; None for a tensor in the model file that is small or equals no other tensor.

    Args:
        model: path of the model that has the tensors.
        tensors: stored tensors.
        by_content: also compare the content of external data, which reads it; else only its file and range.

    Raises:
        ModelError: as :func:`~onnxsplit.model.external_data.external_range`.
    """
    ranges = [external_range(model, tensor) if is_external(tensor) else None for tensor in tensors]
    fingerprints = [_fingerprint(t, place, by_content) for t, place in zip(tensors, ranges, strict=True)]
    alike = Counter(glimpse for glimpse in fingerprints if glimpse is not None)
    places: list[Extent | None] = []
    for tensor, place, glimpse in zip(tensors, ranges, fingerprints, strict=True):
        if glimpse is not None and alike[glimpse] > 1:
            places.append(Extent(_hash(tensor, place), 0, glimpse[0]))
        else:
            places.append(Extent(str(place[0]), place[1], place[2]) if place is not None else None)
    shared = Counter(extent for extent in places if extent is not None)
    return [
        extent if extent is not None and (place is not None or shared[extent] > 1) else None
        for extent, place in zip(places, ranges, strict=True)
    ]


def _fingerprint(
    tensor: onnx.TensorProto, place: tuple[Path, int, int] | None, by_content: bool
) -> tuple[int, bytes, bytes] | None:
    """Length, first and last bytes: data whose fingerprints differ need not be read completely."""
    if place is None:
        content = tensor.raw_data
        length, begin, end = len(content), content[:_COMPARED_FIRST_BYTES], content[-_COMPARED_FIRST_BYTES:]
    elif by_content:
        file, offset, length = place
        with open_external(file) as stream:
            stream.seek(offset)
            begin = stream.read(min(_COMPARED_FIRST_BYTES, length))
            stream.seek(offset + max(0, length - _COMPARED_FIRST_BYTES))
            end = stream.read(min(_COMPARED_FIRST_BYTES, length))
    else:
        return None
    return (length, begin, end) if length >= _LARGE_BYTES else None


def _hash(tensor: onnx.TensorProto, place: tuple[Path, int, int] | None) -> str:
    """SHA-256 of a tensor's bytes, which are read in chunks when they are external."""
    if place is None:
        return hashlib.sha256(tensor.raw_data).hexdigest()
    digest, (file, offset, left) = hashlib.sha256(), place
    with open_external(file) as stream:
        stream.seek(offset)
        while left and (piece := stream.read(min(_CHUNK, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def blocks(given: Iterable[Extent]) -> dict[Extent, Extent]:
    """The block that each extent lies in; a block joins extents that overlap."""
    groups: list[list[Extent]] = []
    end = 0
    for place in sorted(set(given), key=lambda place: (place.home, place.offset, place.length)):
        if groups and groups[-1][0].home == place.home and place.offset < end:
            groups[-1].append(place)
            end = max(end, place.end)
        else:
            groups.append([place])
            end = place.end
    block_of: dict[Extent, Extent] = {}
    for group in groups:
        first = group[0]
        length = max(place.end for place in group) - first.offset
        block_of.update(dict.fromkeys(group, Extent(first.home, first.offset, length)))
    return block_of


def stored_once(sizes: Mapping[str, int], places: Mapping[str, Extent]) -> tuple[Stored, ...]:
    """The bytes of tensors, each byte in one entry with all the tensors that it is part of.

    Args:
        sizes: size in bytes of every tensor, by name.
        places: extents of the tensors that may share bytes with others, by name.
    """
    stored = [Stored(size, frozenset([name])) for name, size in sizes.items() if name not in places]
    by_home: dict[str, list[str]] = {}
    for name, place in places.items():
        by_home.setdefault(place.home, []).append(name)
    for names in by_home.values():
        names.sort(key=lambda name: places[name].offset)
        edges = sorted({edge for name in names for edge in (places[name].offset, places[name].offset + sizes[name])})
        open_names: set[str] = set()
        position = 0
        for start, end in pairwise(edges):
            while position < len(names) and places[names[position]].offset <= start:
                open_names.add(names[position])
                position += 1
            open_names = {name for name in open_names if places[name].offset + sizes[name] > start}
            if open_names:
                stored.append(Stored(end - start, frozenset(open_names)))
    return tuple(stored)
