"""Where the tensors of recurring requests lie in a slot of shared memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from onnxsplit.tensors import Array, dtype_name, size_bytes
from runtime.memory.arena import Arena, Block
from runtime.memory.extents import aligned

_LAYOUTS = 256  # layouts that are cached
_KEPT = 256  # blocks of a layout whose arrays are kept

OutputShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""The ONNX type and the shape of each tensor, by name."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where tensors of some shapes are placed; computed once for each combination of shapes.

    Attributes:
        shapes: types and shapes of all tensors.
        shared: for each tensor that is placed in shared memory, its offset in a block of ``size`` bytes.
        size: bytes of the block.
        size_bytes: size of all tensors.
        shared_bytes: size of the shared ones, without the gaps between them.
        small: arrays for tensors that are sent in headers; made when first needed, and reused for every request.
    """

    shapes: OutputShapes
    shared: Mapping[str, int]
    size: int
    size_bytes: int
    shared_bytes: int
    small: dict[str, Array] = field(default_factory=dict)
    _arrays: dict[tuple[int, int], dict[str, Array]] = field(default_factory=dict)
    _starts: dict[tuple[str, ...], int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, shapes: OutputShapes, shared: Collection[str]) -> Layout:
        """The layout of tensors, of which those in ``shared`` are placed in shared memory; never strings."""
        sizes = {name: size_bytes(*spec) for name, spec in shapes.items() if spec[0] != "string"}
        placed, at = {}, 0
        for name, size in sizes.items():
            if name in shared:
                placed[name] = at
                at += aligned(size)
        return cls(
            shapes=shapes,
            shared=placed,
            size=at,
            size_bytes=sum(sizes.values()),
            shared_bytes=sum(sizes[name] for name in placed),
        )

    def arrays(self, block: Block, arena: Arena) -> dict[str, Array]:
        """The arrays in a block, as long as it is in use. Recurring blocks give the same arrays."""
        key = block.number, block.offset
        arrays = self._arrays.get(key)
        if arrays is None:
            if len(self._arrays) >= _KEPT:
                self._arrays.clear()
            arrays = {name: arena.array(block, at, *self.shapes[name]) for name, at in self.shared.items()}
            self._arrays[key] = arrays
        return arrays

    def start(self, names: tuple[str, ...]) -> int | None:
        """Where the first of some tensors lies in the block; None unless all of them lie there."""
        if names not in self._starts:
            offsets = [self.shared.get(name, -1) for name in names]
            self._starts[names] = None if min(offsets, default=-1) < 0 else min(offsets)
        return self._starts[names]


class Layouts:
    """The layouts that were needed before."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[str, ...]], Layout] = {}

    def of(self, shapes: OutputShapes, shared: tuple[str, ...]) -> Layout:
        """The layout of some tensors; made once for the same two objects.

        Args:
            shapes: types and shapes of the tensors; must not change afterwards.
            shared: the names of those that are placed in shared memory.
        """
        key = (id(shapes), shared)  # the layout holds a reference to the shapes, so their id is not reused
        layout = self._kept.get(key)
        if layout is None:
            if len(self._kept) >= _LAYOUTS:
                self._kept.clear()
            layout = self._kept[key] = Layout.of(shapes, shared)
        return layout

    def clear(self) -> None:
        """Forget all layouts."""
        self._kept.clear()


def shapes_of(tensors: Mapping[str, Array]) -> OutputShapes:
    """Types and shapes of tensors; those whose type has no ONNX name are left out."""
    named = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    return {name: (dtype, tensors[name].shape) for name, dtype in named.items() if dtype is not None}
