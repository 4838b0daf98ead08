"""Example inputs: nested ones by name, and random ones that are like given ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError
from onnxsplit.tensors import Array


def mapped(inputs: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Inputs of the same structure, each leaf changed.

    Args:
        inputs: arrays or tensors by name, and lists, tuples and dictionaries of them, nested at will.
        change: takes a leaf's name and the leaf. The name has the way to the leaf: ``cache.0.key`` is
            ``inputs["cache"][0]["key"]``.
    """

    def inside(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inside(f"{name}.{key}", one) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(inside(f"{name}.{place}", one) for place, one in enumerate(value))
        return change(name, value)

    return {name: inside(name, value) for name, value in inputs.items()}


def flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested inputs by name, in order.

    Raises:
        ExportError: two leaves have one name.
    """
    found: dict[str, Any] = {}

    def keep(name: str, leaf: Any) -> None:
        if name in found:
            raise ExportError(f"two of the example inputs have the name {name!r}; rename one of them")
        found[name] = leaf

    mapped(inputs, keep)
    return found


def resized(arrays: Mapping[str, Array], axes: Mapping[str, Mapping[int, str]]) -> dict[str, Array]:
    """A part of each array: free dimensions are one smaller, where they are larger than 1."""
    found = {}
    for name, array in arrays.items():
        free = axes.get(name, {})
        part = tuple(slice(0, max(1, size - 1) if axis in free else size) for axis, size in enumerate(array.shape))
        found[name] = array[part].copy()
    return found


def varied(arrays: Mapping[str, Array], bounds: Mapping[str, Array], *, seed: int = 0) -> dict[str, Array]:
    """Random values in place of given ones, drawn for each array by itself, so that no two arrays are alike.

    Args:
        arrays: what to replace, by name.
        bounds: arrays between whose least and largest value the new values lie: an index stays a valid index.
        seed: of the random numbers.
    """
    source = np.random.default_rng(seed)
    return {name: _varied(array, bounds[name], source) for name, array in arrays.items()}


def _varied(array: Array, bounds: Array, source: np.random.Generator) -> Array:
    """Floats that are all equal get values around theirs; masks of minus infinity and empty arrays stay as they are."""
    if array.size == 0 or bounds.size == 0:
        return array
    kind, random = array.dtype.kind, np.empty_like(array)
    if kind == "b":
        random[...] = source.integers(0, 2, array.shape)
    elif kind in "iu":
        random[...] = source.integers(bounds.min(), bounds.max(), array.shape, dtype=array.dtype, endpoint=True)
    elif kind in "OUS":
        random[...] = source.choice(bounds.ravel(), array.shape)
    else:
        low, high = float(bounds.min()), float(bounds.max())
        if not np.isfinite([low, high]).all():
            return array
        if low == high:
            low, high = min(low / 2, low * 1.5), max(low / 2, low * 1.5) or 1.0
        random[...] = source.uniform(low, high, array.shape)
    return random
