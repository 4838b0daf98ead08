"""Tensors that leave a process: their shapes, their arrays and where those lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from onnxsplit.tensors import Array, dtype_name
from runtime.memory.arena import Block
from runtime.wire.messages.data import TensorPlace, Visit

OutputShapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""ONNX type and shape of tensors, by name."""


Readers = Mapping[int, Sequence[str]]
"""The tensors that each peer will get, by its number."""


@dataclass
class Outgoing:
    """Tensors that are about to go to some peers: the arrays, and where those are that lie in shared memory.

    That memory is held by this process until it is lent, dropped or released.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    places: dict[str, TensorPlace] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    size_bytes: int = 0
    shared_bytes: int = 0

    def count(self) -> None:
        """Add up the bytes of all arrays, and of those in shared memory."""
        self.size_bytes = sum(array.nbytes for array in self.arrays.values())
        self.shared_bytes = sum(self.arrays[name].nbytes for name in self.places)


@dataclass(frozen=True)
class Layout:
    """How tensors of some shapes go to some peers; worked out once.

    Attributes:
        shapes: of all tensors.
        large: of those that go to shared memory, the offset in a slot of ``size`` bytes.
        size_bytes: of all tensors.
        shared_bytes: of the large ones, without what lies between them.
        small: arrays for those that go into headers, made when first needed and used again every time.
    """

    shapes: OutputShapes
    large: Mapping[str, int]
    size: int
    size_bytes: int
    shared_bytes: int
    small: dict[str, Array] = field(default_factory=dict)


class Attempt(Struct, frozen=True):
    """What fragments say of the attempt they belong to; see :class:`~runtime.wire.messages.data.Fragment`."""

    request: int
    attempt: int
    view: int
    cost: int
    budget_ns: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    history: tuple[Visit, ...] = ()


def shapes_of(tensors: Mapping[str, Array]) -> OutputShapes:
    """Types and shapes of tensors; those whose type has no name are left out."""
    named = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    return {name: (dtype, tensors[name].shape) for name, dtype in named.items() if dtype is not None}
