"""Tensors that a process sends: their shapes, their arrays, and where the arrays lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from onnxsplit.tensors import Array
from runtime.memory.arena import Block
from runtime.memory.layouts import Layout
from runtime.wire.messages.data import TensorPlace, Visit
from runtime.wire.messages.sequences import Drawn, StepRow

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

    def release(self) -> None:
        """Stop holding the shared memory; it is free when the peers it was lent to have read it."""
        for block in self.blocks:
            block.held = False

    def drop(self) -> None:
        """Free the shared memory, because the tensors are not sent."""
        for block in self.blocks:
            block.lend(())

    def count(self) -> None:
        """Set :attr:`size_bytes` and :attr:`shared_bytes` from the arrays."""
        self.size_bytes = sum(array.nbytes for array in self.arrays.values())
        self.shared_bytes = sum(self.arrays[name].nbytes for name in self.places)


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
