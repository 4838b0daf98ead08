"""States of which present is past and the new positions, for models that can skip unused positions by a mask."""
# ruff: noqa: ARG002 - banks have one interface

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxsplit.binding import Binding, address
from onnxsplit.plan_decoder import State
from onnxsplit.step_inputs import state_shape
from onnxsplit.tensors import Array, numpy_dtype
from runtime.node.caches.bank import Pool, StepSpan, by_position
from runtime.node.slots import Move

SMALLEST = 64
"""The smallest capacity of a pool, in positions. Capacities are this number times a power of two."""


class HolesBank:
    """A pool in which every row begins at position 0 of a past with room for all rows.

    A run reads the slots of its rows as past. Its new positions are copied from present to the end of each row. The
    capacity grows when a row needs it, and shrinks when none does. How wide past is follows from the rows of the step
    alone, so it is the same at all stages; where it is less than the capacity, past is a copy::

        past of 3 rows, width 8          present
        a a a . . . . .                 a a a . . . . . A       A is copied to position 3,
        b b b b b b . .                 b b b b b b . . B       B to position 6,
        c . . . . . . .                 c . . . . . . . C       C to position 1

    The run of one row that begins, or has several new tokens, reads exactly the positions of that row.

    Args:
        states: states of one shape.
        dtype: ONNX's name of their type.
        slots: the number of slots.
        length: the most positions of a sequence.

    Raises:
        MemoryError: the system cannot reserve the room.
    """

    rebinds = False

    def __init__(self, states: Sequence[State], dtype: str, slots: int, length: int) -> None:
        self.generation = 0
        self._states = states
        self._onnx_dtype = dtype
        self._dtype = numpy_dtype(dtype)
        self._slots = slots
        self._longest = length
        self._lengths = [0] * slots
        self._capacity = min(SMALLEST, length)
        self._pool = self._new_pool()
        self._past: Array = self._pool.array
        self._present: Array = self._pool.array
        self._scratch = np.zeros(0, np.uint8)
        self._made: Array = self._pool.array  # present by positions
        self._views: dict[
            tuple[int, int, int], tuple[Array, Array]
        ] = {}  # both, by rows, new positions and width of past

    def prepare(self, step: StepSpan) -> int | None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        if max(step.starts) > self._capacity:
            self._resize(max(step.starts))
        state = self._states[0]
        if step.rows == 1 and (step.new > 1 or step.starts[0] == 0):
            width = step.starts[0]
            self._past = np.empty((len(self._states), *state_shape(state, 1, width)), self._dtype)
            by_position(self._past, state)[:, 0] = self._pool.by_position[:, step.first, :width]
            self._present, self._made = self._scratch_for(1, width + step.new)
            return width
        width = self._rounded(max(step.starts))
        past = self._pool.rows(step.first, step.rows, state) if width == self._capacity else None
        if past is None:
            past = np.empty((len(self._states), *state_shape(state, step.rows, width)), self._dtype)
            slots = self._pool.by_position[:, step.first : step.first + step.rows, :width]
            by_position(past, state)[...] = slots
        self._past = past
        present = self._views.get((step.rows, step.new, width))
        if present is None:
            present = self._scratch_for(step.rows, width + step.new)
            self._views[step.rows, step.new, width] = present
        self._present, self._made = present
        return width

    def bind(self, binding: Binding, mark: object) -> object:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        place = address(self._past), self._past.shape, self._present.shape, self.generation
        if mark == place:
            return mark
        for state, past, present in zip(self._states, self._past, self._present, strict=True):
            binding.read(state.past, past)
            binding.write(state.present, present)
        return place

    def commit(self, step: StepSpan, made: Mapping[str, Any]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        pool = self._pool.by_position
        longest = max(start + step.new for start in step.starts)
        if longest > self._capacity:
            self._resize(longest)
            pool = self._pool.by_position
        new = self._made[:, :, self._made.shape[2] - step.new :]
        if step.new == 1:
            rows = np.flatnonzero(step.live)
            pool[:, step.first + rows, np.array(step.starts)[rows]] = new[:, rows, 0]
        else:
            for row, (start, live) in enumerate(zip(step.starts, step.live, strict=True)):
                if live:
                    pool[:, step.first + row, start : start + step.new] = new[:, row]
        for row, (start, live) in enumerate(zip(step.starts, step.live, strict=True)):
            if live:
                self._lengths[step.first + row] = start + step.new

    def move(self, moves: Sequence[Move]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        self._pool.move(moves)
        for move in moves:
            self._lengths[move.target] = move.length

    def clear(self, slots: Iterable[int]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        for slot in slots:
            self._pool.clear([slot])
            self._lengths[slot] = 0
        longest = max(self._lengths)
        needed = self._rounded(longest)
        if needed * 2 < self._capacity:
            self._resize(needed)
        if longest == 0:
            self._scratch = np.zeros(0, np.uint8)
            self._past = self._present = self._made = self._pool.array
            self._forget_views()

    def _rounded(self, positions: int) -> int:
        capacity = SMALLEST
        while capacity < positions:
            capacity *= 2
        return min(capacity, self._longest)

    def _resize(self, positions: int) -> None:
        """Move all rows to a pool of another capacity."""
        old, self._capacity = self._pool, self._rounded(positions)
        self._pool = self._new_pool()
        for slot, length in enumerate(self._lengths):
            if length:
                self._pool.by_position[:, slot, :length] = old.by_position[:, slot, :length]
        self._forget_views()

    def _new_pool(self) -> Pool:
        return Pool(self._states, self._onnx_dtype, self._slots, self._capacity)

    def _forget_views(self) -> None:
        self.generation += 1
        self._views.clear()

    def _scratch_for(self, rows: int, width: int) -> tuple[Array, Array]:
        """Room for present, [states, *its shape], and the same by positions; the same memory each time."""
        shape = (len(self._states), *state_shape(self._states[0], rows, width))
        size = self._dtype.itemsize * int(np.prod(shape))
        if size > self._scratch.nbytes:
            self._scratch = np.zeros(size, np.uint8)
            self._forget_views()
        present = self._scratch[:size].view(self._dtype).reshape(shape)
        return present, by_position(present, self._states[0])
