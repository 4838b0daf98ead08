"""Splits a request into micro-batches along its batch axis, and joins their outputs. Pure.

    inputs    | 0 1 | 2 3 | 4 |     micro-batches of two rows; each runs on its own, on any replica
    outputs   | 0 1 | 2 3 | 4 |     joined along the batch axis of the outputs

A plan states batch axes only if trials have shown that the parts of a batch give the same outputs as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array, numpy_dtype
from runtime.errors import NotSeparable

BatchAxes = Mapping[str, int | None]
"""The batch axis of each tensor; None for an input that every micro-batch gets whole."""


def batch_axes(plan: Plan, outputs: Sequence[str]) -> BatchAxes | None:
    """The axes along which to split the inputs and to join ``outputs``; None when the request cannot be split."""
    if not any(plan.tensors[name].batch_axis is not None for name in plan.inputs):
        return None
    if any(plan.tensors[name].batch_axis is None for name in outputs):
        return None
    passed = {name: origin.input for name, origin in plan.passthrough.items() if origin.input is not None}
    axes = {name: plan.tensors[name].batch_axis for name in (*plan.inputs, *outputs)}
    return axes | {name: axes[source] for name, source in passed.items()}


def batch_size(plan: Plan) -> int:
    """The batch size that the plan was made for; 1 when its inputs have no batch axis."""
    for name in plan.inputs:
        spec = plan.tensors[name]
        if spec.batch_axis is not None and spec.shape is not None:
            dim = spec.shape[spec.batch_axis]
            return plan.dims.get(f"{name}.{spec.batch_axis}" if dim == "?" else str(dim), 1)
    return 1


def ordinary_bytes(plan: Plan) -> int:
    """Size in bytes of the inputs that the plan was made for; a dimension of unknown size counts as 1."""
    total = 0
    for name in plan.inputs:
        spec = plan.tensors[name]
        shape = spec.shape or ()
        sizes = [
            dim if isinstance(dim, int) else plan.dims.get(f"{name}.{axis}" if dim == "?" else str(dim), 1)
            for axis, dim in enumerate(shape)
        ]
        total += math.prod(sizes) * (8 if spec.dtype == "string" else numpy_dtype(spec.dtype).itemsize)
    return total


def split(inputs: Mapping[str, Array], axes: BatchAxes, rows: int) -> list[dict[str, Array]]:
    """Split inputs into micro-batches of at most ``rows`` rows, as views.

    Inputs whose numbers of rows differ are not split, because it is not known how the model combines them.
    """
    sizes = {array.shape[axis] for name, array in inputs.items() if (axis := axes[name]) is not None}
    total = max(sizes, default=0)
    if len(sizes) != 1 or total <= rows:
        return [dict(inputs)]
    return [
        {name: rows_of(array, axes[name], start, start + rows) for name, array in inputs.items()}
        for start in range(0, total, rows)
    ]


def join(parts: Sequence[Mapping[str, Array]], axes: BatchAxes) -> dict[str, Array]:
    """Concatenate the outputs of all micro-batches, in order.

    Raises:
        NotSeparable: the shapes of an output do not fit each other.
    """
    if len(parts) == 1:
        return dict(parts[0])
    joined = {}
    for name in parts[0]:
        try:
            joined[name] = np.concatenate([part[name] for part in parts], axis=axes[name] or 0)
        except ValueError as error:
            shapes = ", ".join(str(list(shape)) for shape in dict.fromkeys(part[name].shape for part in parts))
            raise NotSeparable(
                f"the micro-batches of a request cannot be joined along axis {axes[name] or 0}: {name!r} came back as "
                f"{shapes}. The model's rows depend on each other; run requests whole, with micro_batch=0 "
                "(--micro-batch 0)"
            ) from error
    return joined


def rows_of(array: Array, axis: int | None, start: int, end: int) -> Array:
    """Some rows of an array along its batch axis; the whole array when it has none."""
    if axis is None:
        return array
    return array[(slice(None),) * axis + (slice(start, end),)]


def row_count(inputs: Mapping[str, Array], axes: BatchAxes | None) -> int:
    """The number of rows along the batch axis; 1 without one."""
    for name, array in inputs.items():
        axis = axes[name] if axes is not None else None
        if axis is not None:
            return int(array.shape[axis])
    return 1


def has_rows(outputs: Mapping[str, Array], axes: BatchAxes | None, rows: int) -> bool:
    """Whether every output with a batch axis has ``rows`` rows, so that they can be divided again."""
    return all(
        (axis := (axes or {}).get(name)) is None or (axis < array.ndim and array.shape[axis] == rows)
        for name, array in outputs.items()
    )
