"""Which axis of each tensor is its batch, by proof: the whole batch against its parts.

A dimension that the model leaves free is a candidate. The stages run on a batch of some rows that all differ, and on
its two unequal parts; a tensor has a batch axis where the parts, put together along it, are the whole. A model of
which one output has none (it averages over the batch, or takes its scale from it) cannot be split at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import Plan
from onnxsplit.providers import provider_here
from onnxsplit.shapes import free_dimensions
from onnxsplit.tensors import Array, load_npz, save_npz
from onnxsplit.timed import TimedModel
from onnxsplit.verify import TOLERANCE, distance

_PARTS = (2, 3)  # rows; unequal, and none of them one
_MOST_CANDIDATES = 4

Axes = Mapping[str, int]


def with_batch_axes(plan: Plan, folder: Path, example: Mapping[str, Array]) -> Plan:
    """The plan, with the batch axis of every tensor that was proven to have one; the same plan where none was.

    Args:
        plan: whose stage files can run here.
        folder: where they are.
        example: inputs of the model; rows that differ are made of them.
    """
    for candidate in _candidates(plan, example):
        try:
            axes = _proven(plan, folder, example, candidate)
        except OnnxsplitError:  # it does not run on batches of this kind
            continue
        if axes:
            tensors = {
                name: msgspec.structs.replace(spec, batch_axis=axes.get(name)) for name, spec in plan.tensors.items()
            }
            return msgspec.structs.replace(plan, tensors=tensors)
    return plan


def _candidates(plan: Plan, example: Mapping[str, Array]) -> list[Axes]:
    """Axes of inputs that may be the batch, likeliest first: all free leading ones at once, then each dimension."""
    free = free_dimensions({name: plan.tensors[name] for name in plan.inputs})
    leading = [owner for where in free.values() for owner, axis in where if axis == 0]
    found: list[Axes] = [dict.fromkeys(leading, 0)] if leading else []
    found += [dict(where) for _, where in sorted(free.items(), key=lambda item: min(axis for _, axis in item[1]))]
    unique = [axes for position, axes in enumerate(found) if axes not in found[:position]]
    return [axes for axes in unique if axes.keys() <= example.keys()][:_MOST_CANDIDATES]


def _proven(plan: Plan, folder: Path, example: Mapping[str, Array], inputs: Axes) -> Axes:
    """The axes of inputs and of tensors of stages where the proof holds; empty when an output fails it."""
    whole = {n: _rows(array, inputs[n], sum(_PARTS)) if n in inputs else array for n, array in example.items()}
    feeds, start = [whole], 0
    for rows in _PARTS:
        part = slice(start, start + rows)
        feeds.append({n: a[(slice(None),) * inputs[n] + (part,)] if n in inputs else a for n, a in whole.items()})
        start += rows
    everything, *parts = _run(plan, folder, feeds)
    axes = dict(inputs)
    for name in plan.producers():
        axis = _batch_axis(everything[name], [part[name] for part in parts])
        if axis is not None:
            axes[name] = axis
        elif name in plan.outputs:
            return {}
    return axes


def _rows(array: Array, axis: int, count: int) -> Array:
    """A batch of rows that all differ, made of the first row: shifted along the other axes, and floats made smaller."""
    first = array.take([0], axis=axis)
    others = tuple(other for other in range(array.ndim) if other != axis)
    rows = [np.roll(first, number, axis=others) if others else first for number in range(count)]
    if array.dtype.kind == "f":
        rows = [(row * (1 - 0.15 * number)).astype(array.dtype) for number, row in enumerate(rows)]
    return np.concatenate(rows, axis=axis)


def _batch_axis(whole: Array, parts: list[Array]) -> int | None:
    """The axis along which the parts make up the whole."""
    for axis in range(whole.ndim):
        shapes = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts if part.ndim == whole.ndim}
        sizes = [part.shape[axis] for part in parts if part.ndim == whole.ndim]
        if shapes != {whole.shape[:axis] + whole.shape[axis + 1 :]} or len(set(sizes)) == 1:
            continue
        if sum(sizes) == whole.shape[axis] and distance(np.concatenate(parts, axis=axis), whole) <= TOLERANCE:
            return axis
    return None


def _run(plan: Plan, folder: Path, feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """What the stages, one after the other, give for each of the inputs."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        file, out = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
        for stage in plan.stages:
            with ExitStack() as stack:
                worker: TimedModel | None = None
                for values in feeds:
                    save_npz(file, {name: values[name] for name in stage.inputs})
                    if worker is None:
                        worker = stack.enter_context(
                            TimedModel(
                                folder / stage.file,
                                file,
                                threads=stage.threads,
                                level=stage.optimization_level,
                                provider=provider_here(stage.provider),
                            )
                        )
                    else:
                        worker.feed(file)
                    worker.run(0.0)
                    worker.save_outputs(out)
                    values.update(load_npz(out))
    return feeds
