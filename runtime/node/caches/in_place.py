"""States that a run reads and writes where they lie."""
# ruff: noqa: ARG002 - banks have one interface

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxsplit.binding import Binding
from onnxsplit.plan_decoder import State
from onnxsplit.step_inputs import state_shape
from onnxsplit.tensors import Array, numpy_dtype
from runtime.node.caches.bank import Pool, StepSpan, by_row
from runtime.node.slots import Move


class InPlaceBank:
    """A pool with room for the longest sequence in each slot; the slots of a step are bound as past and as present.

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
        self._dtype = numpy_dtype(dtype)
        self._positions = states[0].capacity or length
        self._pool = Pool(states, dtype, slots, self._positions)
        self._arrays = self._pool.array  # what the step that was prepared reads and writes, and its place
        self._place = 0, 0
        self._staged: dict[int, Array] = {}  # for each number of rows that do not lie as a run needs them

    def prepare(self, step: StepSpan) -> int | None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        place = step.first, step.rows
        if place != self._place or step.rows in self._staged:
            arrays = self._pool.rows(step.first, step.rows, self._states[0])
            if arrays is None:
                self._copy(step, back=False)
                arrays = self._staged[step.rows]
            self._arrays, self._place = arrays, place
        return None

    def bind(self, binding: Binding, mark: object) -> object:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        if mark != self._place:
            for state, array in zip(self._states, self._arrays, strict=True):
                binding.read(state.past, array)
                binding.write(state.present, array)
        return self._place

    def commit(self, step: StepSpan, made: Mapping[str, Any]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        if step.rows in self._staged:
            self._copy(step, back=True)

    def _copy(self, step: StepSpan, *, back: bool) -> None:
        """Copy the slots of a step to an array that a run can use, or back."""
        state = self._states[0]
        if step.rows not in self._staged:
            shape = state_shape(state, step.rows, self._positions)
            self._staged[step.rows] = np.zeros((len(self._states), *shape), self._dtype)
        rows = by_row(self._staged[step.rows], state)
        slots = self._pool.array[:, step.first : step.first + step.rows]
        if back:
            slots[...] = rows
        else:
            rows[...] = slots

    def move(self, moves: Sequence[Move]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        self._pool.move(moves)

    def clear(self, slots: Iterable[int]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        self._pool.clear(slots)
