"""The controls of a step: arrays that follow from its rows alone. NumPy only.

Terms are those of :mod:`onnxsplit.plan_decoder`: a step has B rows with S new tokens each, and row i has ``starts[i]``
positions before the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from onnxsplit.errors import InputError
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.plan_decoder import Control, RowLayout
from onnxsplit.tensors import Array, numpy_dtype


class StateShape(Protocol):
    """The part of a state that decides its shape: see :class:`~onnxsplit.plan_decoder.State`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of past for one row and, along the axis of the positions, no position."""

    @property
    def batch_axis(self) -> int:
        """The axis of the rows."""

    @property
    def axis(self) -> int | None:
        """The axis of the positions."""

    @property
    def capacity(self) -> int | None:
        """The size along ``axis`` that the model demands."""


def state_shape(state: StateShape, rows: int, positions: int) -> tuple[int, ...]:
    """The shape of past for a number of rows.

    Args:
        state: the state.
        rows: the number of rows.
        positions: the size along the axis of the positions; ignored where the state has no such axis.
    """
    shape = list(state.shape)
    shape[state.batch_axis] = rows
    if state.axis is not None:
        shape[state.axis] = positions
    return tuple(shape)


def control_array(
    control: Control,
    spec: TensorSpec,
    starts: Sequence[int],
    new: int,
    tokens: Sequence[Sequence[int]],
    width: int,
    layout: RowLayout,
) -> Array:
    """Make the array of one control for a step.

    Args:
        control: the input and its role.
        spec: the type and the declared shape of the input.
        starts: for each row, the number of its positions before the step.
        new: the number of new tokens of each row, S.
        tokens: for each row, its new tokens.
        width: the size of past along the axis of the positions in this run. For in-place states, any number that is
            at least the largest of ``starts``: their mask ends at the largest length after the step.
        layout: how the rows share the run.

    Returns:
        An array of the input's type, with the shape that :data:`~onnxsplit.plan_decoder.Role` describes.

    Raises:
        InputError: the input takes one value for all rows, and the rows need several.
    """
    dtype = numpy_dtype(spec.dtype)
    match control.role:
        case "tokens":
            return np.array(tokens, dtype).reshape(len(starts), new)
        case "mask":
            return _mask(spec.shape, starts, new, width, layout).astype(dtype)
        case "positions":
            return _positions(control, spec.shape, starts, new).astype(dtype)
        case "past-length":
            return _lengths(control, spec.shape, starts).astype(dtype)
        case "total-length":
            return _lengths(control, spec.shape, [start + new for start in starts], largest=True).astype(dtype)
        case "last-index":
            return _lengths(control, spec.shape, [start + new - 1 for start in starts], largest=True).astype(dtype)
        case "first-scored":
            return np.full(_one(spec.shape), new - 1, dtype)
        case "fixed":
            return np.full(_one(spec.shape), control.value or 0, dtype)


def _mask(shape: Shape | None, starts: Sequence[int], new: int, width: int, layout: RowLayout) -> Array:
    """1 for each position that a row reads, [B, total]."""
    first = np.array(starts, np.int64)[:, None]
    if layout in ("left", "holes"):
        column = np.arange(width + new)
        return column >= width - first if layout == "left" else (column < first) | (column >= width)
    total = max(starts) + new
    if layout != "right":  # a window holds fewer positions than the row has
        total = min(total, width + new)
    fixed = shape[-1] if shape else None
    column = np.arange(fixed if isinstance(fixed, int) and fixed > total else total)
    return column < np.minimum(first + new, total)


def _positions(control: Control, shape: Shape | None, starts: Sequence[int], new: int) -> Array:
    """The positions of the new tokens: [B, S], or [S] where the input has one axis."""
    if shape is not None and len(shape) == 1:
        return _same(control, starts) + np.arange(new)
    return np.array(starts, np.int64)[:, None] + np.arange(new)


def _lengths(control: Control, shape: Shape | None, lengths: Sequence[int], *, largest: bool = False) -> Array:
    """A length of each row, [B] or [B, 1]; or one for all rows, [] or [1]."""
    if shape is None or (len(shape) == 1 and shape[0] != 1):
        return np.array(lengths, np.int64)
    if len(shape) == 2:
        return np.array(lengths, np.int64)[:, None]
    return np.full(_one(shape), max(lengths) if largest else _same(control, lengths), np.int64)


def _one(shape: Shape | None) -> tuple[int, ...]:
    """The shape of an input that has one element."""
    return tuple(size if isinstance(size, int) else 1 for size in shape or ())


def _same(control: Control, values: Sequence[int]) -> int:
    """The value that all rows share.

    Raises:
        InputError: they do not.
    """
    if min(values) != max(values):
        raise InputError(
            f"input {control.input!r} ({control.role}) takes one value for all rows, and the rows need "
            f"{min(values)} to {max(values)}; run rows of one length together"
        )
    return values[0]
