"""What all banks of states have in common."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from msgspec import Struct

from onnxsplit.binding import Binding
from onnxsplit.plan_decoder import State
from onnxsplit.step_inputs import state_shape
from onnxsplit.tensors import Array, numpy_dtype
from runtime.node.slots import Move

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python names from 3.13 on
_PAGE = mmap.PAGESIZE


class StepSpan(Struct, frozen=True):
    """The rows of a step, as the banks see them.

    Attributes:
        first: the slot of the first row; the others lie in the slots that follow.
        starts: for each row, the number of its positions before the step.
        new: the number of new positions of each row.
        live: for each row, whether its new states are kept.
    """

    first: int
    starts: tuple[int, ...]
    new: int
    live: tuple[bool, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.starts)


class Bank(Protocol):
    """States that lie and change together.

    Attributes:
        generation: changes when bindings made earlier must no longer be used.
        rebinds: whether every run needs :meth:`bind` and gives new values, as opposed to arrays that stay.
    """

    generation: int
    rebinds: bool

    def prepare(self, step: StepSpan) -> int | None:
        """Make the past of a step ready; returns its size along the positions, or None if that does not follow."""
        ...

    def bind(self, binding: Binding, mark: object) -> object:
        """Bind past and present of the step that was prepared.

        Args:
            binding: where.
            mark: what this method returned for this binding last; None the first time.
        """
        ...

    def commit(self, step: StepSpan, made: Mapping[str, Any]) -> None:
        """Keep what the run of the step that was prepared has made.

        Args:
            step: the step.
            made: the outputs that ONNX Runtime has made itself.
        """
        ...

    def move(self, moves: Sequence[Move]) -> None:
        """Move sequences to other slots, or copy them, all at once."""
        ...

    def clear(self, slots: Iterable[int]) -> None:
        """Forget the states of some slots, and give their memory back to the system."""
        ...


class Pool:
    """Room for the states of all slots: a private mapping, of which only touched pages take memory.

    Args:
        states: the states of a bank.
        dtype: ONNX's name of their type.
        slots: the number of slots.
        positions: the room along the axis of the positions.

    Attributes:
        array: [states, slots, *the shape of a state without its batch axis].
        by_position: the same memory as [states, slots, positions, *the other axes].

    Raises:
        MemoryError: the system cannot reserve the room.
    """

    def __init__(self, states: Sequence[State], dtype: str, slots: int, positions: int) -> None:
        state = states[0]
        rest = list(state_shape(state, 1, positions))
        del rest[state.batch_axis]
        kind = numpy_dtype(dtype)
        shape = (len(states), slots, *rest)
        size = kind.itemsize * int(np.prod(shape, dtype=object))
        try:
            self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(
                f"the system does not reserve {size} bytes for the states of {slots} sequences of {positions} "
                f"positions ({error}). Allow fewer or shorter sequences (--max-rows, --max-length)"
            ) from error
        self.array: Array = np.frombuffer(self._map, np.uint8, size).view(kind).reshape(shape)
        self._slot_bytes = size // (len(states) * slots)
        self._slots = slots
        self._run_bytes = kind.itemsize * int(np.prod(rest[position_axis(state) :]))  # of all positions that adjoin
        self.by_position = np.moveaxis(self.array, 2 + position_axis(state), 2)

    def clear(self, slots: Iterable[int]) -> None:
        """Fill some slots with zeros; their whole pages go back to the system."""
        for slot in slots:
            for state in range(len(self.array)):
                begin = (state * self._slots + slot) * self._slot_bytes
                self._clear(begin, begin + self._slot_bytes)

    def cut(self, slot: int, length: int) -> None:
        """Fill a slot with zeros behind its first positions; whole pages go back to the system."""
        run = self._run_bytes
        kept = length * (run // self.by_position.shape[2])
        for state in range(len(self.array)):
            first = (state * self._slots + slot) * self._slot_bytes
            for begin in range(first, first + self._slot_bytes, run):
                self._clear(begin + kept, begin + run)

    def _clear(self, begin: int, end: int) -> None:
        """Fill some bytes with zeros; whole pages go back to the system."""
        flat = self.array.reshape(-1).view(np.uint8)
        first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
            flat[begin:first] = 0
            flat[last:end] = 0
        else:
            flat[begin:end] = 0

    def move(self, moves: Sequence[Move]) -> None:
        """Copy sequences to other slots, all at once, and cut those that stay in their slots."""
        targets = {move.target for move in moves if move.source != move.target}
        held = {m.source: self.by_position[:, m.source, : m.length].copy() for m in moves if m.source in targets}
        for move in moves:
            if move.source == move.target:
                self.cut(move.target, move.length)
                continue
            self.clear([move.target])
            content = held.get(move.source)
            if content is None:
                content = self.by_position[:, move.source, : move.length]
            self.by_position[:, move.target, : move.length] = content

    def rows(self, first: int, count: int, state: State) -> Array | None:
        """Neighbouring slots as [states, *the shape of a state]; None if their memory is not laid out like that."""
        if count > 1 and any(size != 1 for size in state.shape[: state.batch_axis]):
            return None
        return np.moveaxis(self.array[:, first : first + count], 1, 1 + state.batch_axis)


def position_axis(state: State) -> int:
    """The axis of the positions in the shape of a state without its batch axis."""
    assert state.axis is not None
    return state.axis - (state.axis > state.batch_axis)


def by_row(array: Array, state: State) -> Array:
    """An array [states, *the shape of a state] as [states, rows, *the other axes]."""
    return np.moveaxis(array, 1 + state.batch_axis, 1)


def by_position(array: Array, state: State) -> Array:
    """An array [states, *the shape of a state] as [states, rows, positions, *the other axes]."""
    return np.moveaxis(by_row(array, state), 2 + position_axis(state), 2)
