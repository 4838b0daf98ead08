"""Splitting a request along its batch axis, and putting its answer together. Pure.

    inputs    | 0 1 | 2 3 | 4 |     micro-batches of two rows: parts of their own, in any order, on any replica
    outputs   | 0 1 | 2 3 | 4 |     joined along the outputs' own axis

Only plans whose maker proved that the halves of a batch give what the whole gives carry batch axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array, numpy_dtype
from runtime.errors import NotSeparable

BatchAxes = Mapping[str, int | None]
"""The batch axis of each tensor; None for one that every part gets, or gives, whole."""


def batch_axes(plan: Plan, outputs: Sequence[str]) -> BatchAxes | None:
    """The axes to split inputs and join ``outputs`` along; None when such a request cannot be split."""
    if not any(plan.tensors[name].batch_axis is not None for name in plan.inputs):
        return None
    if any(plan.tensors[name].batch_axis is None for name in outputs):
        return None
    passed = {name: origin.input for name, origin in plan.passthrough.items() if origin.input is not None}
    axes = {name: plan.tensors[name].batch_axis for name in (*plan.inputs, *outputs)}
    return axes | {name: axes[source] for name, source in passed.items()}


def batch_size(plan: Plan) -> int:
    """The batch size the plan was made and measured for; 1 when it has none."""
    for name in plan.inputs:
        spec = plan.tensors[name]
        if spec.batch_axis is not None and spec.shape is not None:
            dim = spec.shape[spec.batch_axis]
            return plan.dims.get(f"{name}.{spec.batch_axis}" if dim == "?" else str(dim), 1)
    return 1


def ordinary_bytes(plan: Plan) -> int:
    """Bytes of the inputs that the plan was made and measured for; sizes that are not known count as 1."""
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
    """Parts of at most ``rows`` rows each, as views of the inputs.

    Inputs of unlike numbers of rows are not split: what the model makes of them is its own affair.
    """
    sizes = {array.shape[axis] for name, array in inputs.items() if (axis := axes[name]) is not None}
    total = max(sizes, default=0)
    if len(sizes) != 1 or total <= rows:
        return [dict(inputs)]
    return [
        {name: _rows(array, axes[name], start, start + rows) for name, array in inputs.items()}
        for start in range(0, total, rows)
    ]


def join(parts: Sequence[Mapping[str, Array]], axes: BatchAxes) -> dict[str, Array]:
    """The tensors of all parts, in order, as one.

    Raises:
        NotSeparable: the parts of a tensor do not fit each other.
    """
    if len(parts) == 1:
        return dict(parts[0])
    found = {}
    for name in parts[0]:
        try:
            found[name] = np.concatenate([part[name] for part in parts], axis=axes[name] or 0)
        except ValueError as error:
            shapes = ", ".join(str(list(shape)) for shape in dict.fromkeys(part[name].shape for part in parts))
            raise NotSeparable(
                f"the parts of a batch cannot be joined along axis {axes[name] or 0}: {name!r} came back as {shapes}. "
                "This model's rows depend on each other; run its requests whole, with micro_batch=0 (--micro-batch 0)"
            ) from error
    return found


def _rows(array: Array, axis: int | None, start: int, end: int) -> Array:
    if axis is None:
        return array
    return array[(slice(None),) * axis + (slice(start, end),)]
