"""Trials: batches that show whether rows act on each other, and the comparison of a whole batch with its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxsplit.tensors import Array

Axes = Mapping[str, int]
"""The batch axis of tensors by name."""


@dataclass(frozen=True)
class Trial:
    """A batch, and how it is split into parts.

    Attributes:
        what: a few words about what is special in the batch.
        inputs: the inputs of the whole batch by name.
        parts: the number of rows of each part, in order.
    """

    what: str
    inputs: Mapping[str, Array]
    parts: tuple[int, ...]

    def split(self, axes: Axes) -> list[dict[str, Array]]:
        """The inputs of each part."""
        ends = np.cumsum(self.parts)
        return [
            {
                name: rows_of(a, axes[name], int(end) - size, int(end)) if name in axes else a
                for name, a in self.inputs.items()
            }
            for end, size in zip(ends, self.parts, strict=True)
        ]


@dataclass(frozen=True)
class _RowPattern:
    """How the rows of a trial are made.

    Float rows are drawn from ``low`` to 1 and multiplied by the scales in turn.
    """

    what: str
    parts: tuple[int, ...]
    scales: tuple[float, ...]
    low: float = 0.0


_MOST_DRAWS = 20  # attempts to draw rows that differ
_ROW_PATTERNS = (
    _RowPattern("negative values", (1, 1), (1.0, 3.0), low=-1.0),
    _RowPattern("a large row beside small ones", (1, 2), (1.0, 300.0, 0.1)),
    _RowPattern("small rows", (2, 1), (0.1, 0.05, 0.01), low=-1.0),
    _RowPattern("single rows", (1, 1, 1), (300.0, 0.1, -1.0), low=-1.0),
    _RowPattern("rows between 0 and 1", (2, 3), (1.0,)),
    _RowPattern("zeros beside large rows", (3, 2), (0.0, 300.0, -1.0, 0.1, 1.0)),
)
"""The cheapest first: a slow model is tried on the first few only."""


def trials(example: Mapping[str, Array], axes: Axes, limits: Mapping[str, int]) -> Iterator[Trial]:
    """Make batches to try, the smallest first; the same every time.

    Args:
        example: inputs that the model runs on.
        axes: the batch axis of each input.
        limits: for integer inputs, the number that all values must stay below.
    """
    random = np.random.default_rng(0)
    for pattern in _ROW_PATTERNS:
        count = sum(pattern.parts)
        made = dict(example)
        for name, axis in axes.items():
            for _ in range(_MOST_DRAWS):
                made[name] = _batch(name, example[name], axis, count, pattern, limits.get(name), random)
                if not equal_rows(made, {name: axis}, limits):
                    break
        yield Trial(pattern.what, made, pattern.parts)


def rows_of(array: Array, axis: int, start: int, stop: int) -> Array:
    """The rows from ``start`` to before ``stop``, along an axis."""
    return array[(slice(None),) * axis + (slice(start, stop),)]


def equal_rows(inputs: Mapping[str, Array], axes: Axes, limits: Mapping[str, int]) -> list[str]:
    """The inputs in which two neighbouring rows are equal, except inputs that can hold only one value."""
    names = []
    for name, axis in axes.items():
        moved = np.moveaxis(inputs[name], axis, 0)
        same = [np.array_equal(one, other) for one, other in itertools.pairwise(moved)]
        if any(same) and moved[0].size and limits.get(name) != 1:
            names.append(name)
    return names


def _batch(
    name: str, array: Array, axis: int, count: int, pattern: _RowPattern, limit: int | None, random: np.random.Generator
) -> Array:
    """A batch of different rows, similar to those of the example."""
    first = array.take([0], axis=axis) if array.shape[axis] else np.zeros_like(array)
    if array.dtype.kind in "iub" and array.dtype != np.bool_:
        return _whole_numbers(name, array, first, axis, count, limit, random)
    if array.dtype == np.bool_:
        return _mask(first, axis, count).astype(bool)
    if array.dtype.kind in "OU":
        rows = [
            np.vectorize(lambda text, n=n: f"{text}{n}" if n else text, otypes=[object])(first) for n in range(count)
        ]
        return np.concatenate(rows, axis=axis)
    rows = []
    for number in range(count):
        scale = pattern.scales[number % len(pattern.scales)]
        rows.append((random.uniform(pattern.low, 1.0, size=first.shape) * scale).astype(array.dtype))
    return np.concatenate(rows, axis=axis)


def _whole_numbers(
    name: str, array: Array, first: Array, axis: int, count: int, limit: int | None, random: np.random.Generator
) -> Array:
    low = name.lower()
    if "mask" in low:
        return _mask(first, axis, count).astype(array.dtype)
    highest = int(array.max(initial=0))
    if "len" in low and highest > 1:  # lengths: one row may be as long as the example's, the others are shorter
        choice = random.permutation(np.arange(1, highest + 1))
        shape = list(first.shape)
        shape[axis] = count
        return np.resize(np.concatenate([[highest], choice[choice != highest]]), shape).astype(array.dtype)
    top = limit if limit is not None else max(2, highest + 1)
    shape = list(first.shape)
    shape[axis] = count
    if first.size == 1:  # one number for each row: all are different if there are enough numbers
        return np.resize(random.permutation(min(top, 10**6)), shape).astype(array.dtype)
    return random.integers(0, top, size=shape).astype(array.dtype)


def _mask(first: Array, axis: int, count: int) -> Array:
    """A mask of ones and then zeros, with another number of ones in every row."""
    rows = []
    for number in range(count):
        size = first.size
        if size == 1:
            rows.append(np.full(first.shape, 1 - number % 2))
            continue
        length = size - (number * max(1, size // (count + 1))) % max(1, size)
        rows.append((np.arange(size) < max(1, length)).astype(np.int64).reshape(first.shape))
    return np.concatenate(rows, axis=axis)


def apart(whole: Array, parts: Sequence[Array], axis: int, tolerance: float) -> str | None:
    """Compare the parts of a tensor, joined along an axis, with the whole tensor.

    Rows are compared one by one, so that an error in a small row does not hide behind a large row.

    Args:
        whole: the tensor of the whole batch.
        parts: the tensors of the parts, in order.
        axis: the batch axis.
        tolerance: the largest allowed difference relative to the largest magnitude in a row.

    Returns:
        The difference in words; None if the parts equal the whole.
    """
    if any(part.ndim != whole.ndim for part in parts) or axis >= whole.ndim:
        return "its parts have another rank"
    rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    if rest != {whole.shape[:axis] + whole.shape[axis + 1 :]} or sum(p.shape[axis] for p in parts) != whole.shape[axis]:
        return (
            f"its parts have the shapes {', '.join(str(list(part.shape)) for part in parts)}, not {list(whole.shape)}"
        )
    joined = np.concatenate(list(parts), axis=axis)
    if joined.dtype != whole.dtype:
        return "its parts have another type"
    left, right = np.moveaxis(joined, axis, 0), np.moveaxis(whole, axis, 0)
    if whole.dtype.kind in "biuOUS":
        return None if np.array_equal(left, right) else "its parts differ"
    left, right = left.astype(np.float64), right.astype(np.float64)
    finite = np.isfinite(right)
    if not np.array_equal(finite, np.isfinite(left)) or not np.array_equal(
        left[~finite], right[~finite], equal_nan=True
    ):
        return "its parts differ"
    axes = tuple(range(1, right.ndim))
    left, right = np.where(finite, left, 0.0), np.where(finite, right, 0.0)
    scale = np.abs(right).max(axis=axes, initial=0.0)
    allowed = tolerance * np.maximum(scale, _FLOOR * scale.max(initial=0.0))
    off = np.abs(left - right).max(axis=axes, initial=0.0)
    return None if bool((off <= allowed).all()) else f"its parts differ by {float(off.max()):.1e}"


_FLOOR = 1e-2  # the least scale of a row relative to the largest row: smaller differences are rounding
