"""States of which the present of one run is the past of the next: nothing is copied while the rows stay the same."""
# ruff: noqa: ARG002 - banks have one interface

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxsplit.binding import Binding, view_of
from onnxsplit.plan_decoder import State
from onnxsplit.step_inputs import state_shape
from onnxsplit.tensors import Array, numpy_dtype
from runtime.node.caches.bank import StepSpan, position_axis
from runtime.node.slots import Move


@dataclass(eq=False)
class _Pack:
    """The states of some rows after a run.

    Attributes:
        width: the size along the positions; 0 for states without such an axis.
        lengths: for each row, the number of positions of its sequence.
        sizes: for each row, how many of the last columns belong to it.
        values: the states in ONNX Runtime's memory; empty if they are arrays.
        arrays: the states as arrays, made when they are first needed.
    """

    width: int
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    values: list[Any] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """The first ``size`` columns of a row's part of a pack hold what a step continues."""

    pack: _Pack
    row: int
    size: int


class PackedBank:
    """States in packs: what a run has made for its rows.

    A slot refers to a row of a pack. When a step has the same rows as the pack, the pack is its past. Otherwise a new
    pack is made from the rows of several. Rows of unequal length end at the end of the pack::

        width 6, rows of 6, 3, and 4 positions
        a a a a a a
        . . . b b b
        . . c c c c

    States that cannot be cut back keep the pack before the last run as a spare.

    Args:
        states: states of one kind; those of kind ``window`` have one capacity.
        dtypes: ONNX's names of their types.
    """

    rebinds = True

    def __init__(self, states: Sequence[State], dtypes: Sequence[str]) -> None:
        self.generation = 0
        self._states = states
        self._onnx_dtypes = dtypes
        self._dtypes = [numpy_dtype(dtype) for dtype in dtypes]
        self._kind = states[0].kind
        self._now: dict[int, tuple[_Pack, int]] = {}
        self._spare: dict[int, tuple[_Pack, int]] = {}
        self._past = _Pack(0, (), ())

    def prepare(self, step: StepSpan) -> int | None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        self._past = self._steady(step) or self._gathered(step)
        return None if self._kind == "recurrent" else self._past.width

    def _steady(self, step: StepSpan) -> _Pack | None:
        """The pack that is the past of a step as it is; None if there is none."""
        pack, _ = self._now.get(step.first, (None, 0))
        if pack is None or pack.lengths != step.starts:
            return None
        same = all(self._now.get(step.first + row) == (pack, row) for row in range(step.rows))
        return pack if same else None

    def _gathered(self, step: StepSpan) -> _Pack:
        """A new pack for the rows of a step."""
        parts = [self._find(step.first + row, start) for row, start in enumerate(step.starts)]
        sizes = [0 if part is None else part.size for part in parts]
        width = max(step.starts) if self._kind == "append" else max(sizes)
        arrays = [
            np.zeros(state_shape(state, step.rows, width), dtype)
            for state, dtype in zip(self._states, self._dtypes, strict=True)
        ]
        for row, part in enumerate(parts):
            if part is None:
                continue
            for state, target, source in zip(self._states, arrays, self._arrays(part.pack), strict=True):
                to, of = _row(target, state, row), _row(source, state, part.row)
                if state.axis is None:
                    to[...] = of
                else:
                    begin = part.pack.width - part.pack.sizes[part.row]
                    to[width - part.size :] = of[begin : begin + part.size]
        return _Pack(width, step.starts, tuple(sizes), arrays=arrays)

    def _find(self, slot: int, start: int) -> _Part | None:
        """Where the states of a slot lie as they were after ``start`` positions; None if nothing has to be kept."""
        if start == 0:
            return None
        for pack, row in (place for place in (self._now.get(slot), self._spare.get(slot)) if place is not None):
            if pack.lengths[row] == start:
                return _Part(pack, row, pack.sizes[row])
            if self._kind == "append" and pack.lengths[row] > start:
                return _Part(pack, row, start)
        return None

    def _arrays(self, pack: _Pack) -> list[Array]:
        if not pack.arrays:
            pack.arrays = [view_of(value, dtype) for value, dtype in zip(pack.values, self._onnx_dtypes, strict=True)]
        return pack.arrays

    def bind(self, binding: Binding, mark: object) -> object:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        past = self._past
        for at, state in enumerate(self._states):
            if past.values:
                binding.read_value(state.past, past.values[at])
            else:
                binding.read(state.past, past.arrays[at])
            binding.make(state.present)
        return None

    def commit(self, step: StepSpan, made: Mapping[str, Any]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        past = self._past
        values = [made[state.present] for state in self._states]
        width = past.width + step.new
        if self._kind == "window":
            state = self._states[0]
            assert state.axis is not None
            width = values[0].shape()[state.axis]
        elif self._kind == "recurrent":
            width = 0
        sizes = past.sizes
        if self._kind != "recurrent":
            sizes = tuple([min(size + step.new, width) for size in past.sizes])
        lengths = tuple([start + step.new for start in step.starts])
        pack = _Pack(width, lengths, sizes, values=values)
        for row, live in enumerate(step.live):
            if live:
                slot = step.first + row
                self._now[slot] = pack, row
                if self._kind != "append":
                    self._spare[slot] = past, row

    def move(self, moves: Sequence[Move]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        for places in (self._now, self._spare):
            moved = {move.target: places.get(move.source) for move in moves}
            for slot in (*moved, *(move.source for move in moves if not move.keep)):
                places.pop(slot, None)
            places.update({slot: place for slot, place in moved.items() if place is not None})

    def clear(self, slots: Iterable[int]) -> None:
        """See :class:`~runtime.node.caches.bank.Bank`."""
        for slot in slots:
            self._now.pop(slot, None)
            self._spare.pop(slot, None)
        self.generation += 1  # a binding keeps alive what it was last given
        self._past = _Pack(0, (), ())


def _row(array: Array, state: State, row: int) -> Array:
    """One row of a state, with its positions in front."""
    part: Array = np.moveaxis(array, state.batch_axis, 0)[row]
    return part if state.axis is None else np.moveaxis(part, position_axis(state), 0)
