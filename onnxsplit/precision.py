"""How exactly two runs of one model can agree: a tolerance that follows the float types it computes in.

A float16 number has 11 significant bits, so two correct orders of the same float16 arithmetic differ by far more than
two of float32. ONNX Runtime's CPU kernels compute many float16 ops in float32 and round where a tensor leaves a
session, so a cut by itself adds one rounding to each tensor that crosses.
"""

from __future__ import annotations

from collections.abc import Iterable

LEAST_TOLERANCE = 1e-4
"""The tolerance for float32 and wider types, over the scale of an output."""

_ROUNDINGS = 4  # epsilons that the roundings at the borders may add up to
_EPSILON = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8e4m3fn": 2.0**-3,
    "float8e4m3fnuz": 2.0**-3,
    "float8e5m2": 2.0**-2,
    "float8e5m2fnuz": 2.0**-2,
    "float4e2m1": 2.0**-1,
}


def narrowest(types: Iterable[str]) -> str | None:
    """The float type with the fewest significant bits; None when there is none narrower than float32."""
    narrow = [name for name in types if name in _EPSILON]
    return max(sorted(narrow), key=lambda name: _EPSILON[name], default=None)


def tolerance(types: Iterable[str]) -> float:
    """The largest difference, over an output's scale, that roundings explain.

    Args:
        types: ONNX names of the types that cross a border or that the model computes in; others are ignored.
    """
    name = narrowest(types)
    return LEAST_TOLERANCE if name is None else _ROUNDINGS * _EPSILON[name]
