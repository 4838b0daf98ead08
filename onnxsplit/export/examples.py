"""Example inputs: nested inputs by name, and random inputs similar to given ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxsplit.errors import ExportError
from onnxsplit.tensors import Array


def mapped(inputs: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Inputs of the same structure, with each leaf changed.

    Args:
        inputs: arrays or tensors by name; lists, tuples and dictionaries of them may be nested to any depth.
        change: takes a leaf's name and the leaf. The name is the path to the leaf: ``cache.0.key`` is
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
    leaves: dict[str, Any] = {}

    def keep(name: str, leaf: Any) -> None:
        if name in leaves:
            raise ExportError(f"two of the example inputs have the name {name!r}; rename one of them")
        leaves[name] = leaf

    mapped(inputs, keep)
    return leaves


def resized(arrays: Mapping[str, Array], axes: Mapping[str, Mapping[int, str]]) -> dict[str, Array]:
    """A part of each array: free dimensions larger than 1 become one smaller."""
    parts = {}
    for name, array in arrays.items():
        free = axes.get(name, {})
        part = tuple(slice(0, max(1, size - 1) if axis in free else size) for axis, size in enumerate(array.shape))
        parts[name] = array[part].copy()
    return parts


def varied(arrays: Mapping[str, Array], bounds: Mapping[str, Array], *, seed: int = 0) -> dict[str, Array]:
    """Arrays of the same shapes with random values, drawn separately for each array, so that no two are equal.

    Args:
        arrays: arrays to replace, by name.
        bounds: for each array, one whose least and largest value bound the new values: an index stays valid.
        seed: seed of the random numbers.
    """
    source = np.random.default_rng(seed)
    return {name: _varied(array, bounds[name], source) for name, array in arrays.items()}


def _varied(array: Array, bounds: Array, source: np.random.Generator) -> Array:
    """Random values for one array. Masks of minus infinity and empty arrays stay; equal floats vary around theirs."""
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
