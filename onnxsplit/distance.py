"""How far two tensors are apart, and how far rounding explains.

A float16 number has 11 significant bits, so two correct orders of the same float16 arithmetic differ far more than two
orders of float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxsplit.tensors import Array

LEAST_TOLERANCE = 1e-4
"""Tolerance for float32 and wider types, relative to the scale of an output."""

# ONNX Runtime rounds to float16 where a tensor leaves a session, but not between float32 kernels inside it. Each cut
# therefore adds a rounding: four epsilons. ONNX Runtime rounds to the other types wherever the model says so, in the
# whole model as in the stages. A cut then adds no rounding, and only a last bit differs between optimised kernels.
_TOLERANCE = {
    "float16": 4 * 2.0**-10,
    "bfloat16": 2 * 2.0**-7,
    "float8e4m3fn": 2.0**-3,
    "float8e4m3fnuz": 2.0**-3,
    "float8e5m2": 2.0**-2,
    "float8e5m2fnuz": 2.0**-2,
}


def narrowest(types: Iterable[str]) -> str | None:
    """The float type with the fewest significant bits; None when none is narrower than float32."""
    return max(sorted(_TOLERANCE.keys() & set(types)), key=_TOLERANCE.__getitem__, default=None)


def tolerance(types: Iterable[str]) -> float:
    """The largest difference, relative to an output's scale, that rounding to these types explains.

    Args:
        types: ONNX names of the types that cross a cut or that the model computes in; wider types are ignored.
    """
    name = narrowest(types)
    return LEAST_TOLERANCE if name is None else _TOLERANCE[name]


def distance(actual: Array, expected: Array) -> float:
    """The largest difference of two tensors, relative to the scale of the expected one.

    For whole numbers, booleans and text it is the share of elements that differ. It is infinite when shapes or types
    differ, or when NaNs and infinities are not at the same positions.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.size == 0:
        return 0.0
    if is_discrete(expected):
        return float(np.mean(actual != expected))
    is_complex = expected.dtype.kind == "c"
    left, right = (a.astype(np.complex128 if is_complex else np.float64) for a in (actual, expected))
    finite = np.isfinite(right)
    if not np.array_equal(finite, np.isfinite(left)) or not np.array_equal(
        left[~finite], right[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(right[finite]).max()) or 1.0
    return float(np.abs(left[finite] - right[finite]).max()) / scale


def is_discrete(array: Array) -> bool:
    """Whether a tensor holds whole numbers, booleans or text, which are compared for equality."""
    return array.dtype.kind in "biuOUS"
