"""Tensors that a process sends: their shapes, their arrays, and where the arrays lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from onnxsplit.tensors import Array, dtype_name
from runtime.memory.arena import Arena, Block
from runtime.wire.messages.data import TensorPlace, Visit
from runtime.wire.messages.sequences import Drawn, StepRow

_KEPT = 256  # blocks of a layout whose arrays are kept

OutputShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""The ONNX type and the shape of each tensor, by name."""


Readers = Mapping[int, tuple[str, ...]]
"""The names of the tensors that each peer gets, by its number."""


@dataclass(slots=True)
class Outgoing:
    """Tensors that are about to be sent.

    This process holds their shared memory until it is lent, dropped or released.

    Attributes:
        arrays: all arrays by name.
        places: the places of those that lie in shared memory.
        blocks: the blocks of shared memory in which they lie.
        size_bytes: size of all arrays.
        shared_bytes: size of those in shared memory.
        layout: where those in the first block lie, if other tensors have lain so before; else None.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    places: dict[str, TensorPlace] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    size_bytes: int = 0
    shared_bytes: int = 0
    layout: Layout | None = None

    def count(self) -> None:
        """Set :attr:`size_bytes` and :attr:`shared_bytes` from the arrays."""
        self.size_bytes = sum(array.nbytes for array in self.arrays.values())
        self.shared_bytes = sum(self.arrays[name].nbytes for name in self.places)


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


class Attempt(Struct, frozen=True):
    """The fields that all fragments of an attempt share; see :class:`~runtime.wire.messages.data.Fragment`."""

    request: int
    attempt: int
    view: int
    cost: int
    budget_ns: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    history: tuple[Visit, ...] = ()
    rows: tuple[StepRow, ...] = ()
    drawn: tuple[Drawn, ...] = ()


def shapes_of(tensors: Mapping[str, Array]) -> OutputShapes:
    """Types and shapes of tensors; those whose type has no ONNX name are left out."""
    named = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    return {name: (dtype, tensors[name].shape) for name, dtype in named.items() if dtype is not None}
