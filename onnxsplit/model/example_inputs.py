"""Example inputs: given by a user, or made up so that real models accept them.

Made-up inputs follow what the model declares: type, shape, name, and the tables that integers index. Sizes of free
dimensions are tried one after another until the model runs. A dimension that is a formula of others, such as
``past + 1``, gets its size from theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from onnxsplit.errors import InputError
from onnxsplit.model.dimensions import check_dimensions, free_dimensions, sized_dimensions, with_formulas
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.shapes import Shapes, infer_shapes
from onnxsplit.plan import TensorSpec
from onnxsplit.tensors import Array, check_inputs, numpy_dtype, size_bytes

_BATCH = re.compile(r"batch|^n$|^b$", re.IGNORECASE)
_STATE = re.compile(r"state|hidden|cell|^[hc][n0-9]?$", re.IGNORECASE)  # usually [layers, batch, width]
_PAST = re.compile(r"past|cache", re.IGNORECASE)
_SEQUENCE_SIZES = (128, 32, 16, 64, 256, 512, 8, 1)
_IMAGE_SIZES = (224, 320, 256, 640, 64, 48, 32, 512)
_MOST_CHOICES = 64
_MOST_BYTES = 4 << 30
_OTHER_SIZES = (32, 256, 512, 16, 64, 128, 8, 1)
_INDEXING = frozenset(["Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND"])
_INDEX_TYPES = frozenset(["int32", "int64"])
_TRANSPARENT = frozenset(
    ["Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Transpose", "Clip", "Slice"]
)


def dimension_choices(specs: Mapping[str, TensorSpec], fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try for the free dimensions, most likely first; sizes in ``fixed`` stay.

    Raises:
        InputError: ``fixed`` names a dimension that the model does not have, or a formula has no size at any choice.
    """
    free = sized_dimensions(specs)
    check_dimensions(specs, fixed)
    sizes = {name: (fixed[name],) if name in fixed else _sizes(name, specs, where) for name, where in free.items()}
    seen: list[dict[str, int]] = []
    unsuitable: InputError | None = None
    for choice in islice(_combinations(sizes), _MOST_CHOICES):
        if choice in seen:
            continue
        try:
            with_formulas(specs, choice)
        except InputError as error:
            unsuitable = unsuitable or error
            continue
        seen.append(choice)
        yield choice
    if unsuitable is not None and not seen:
        raise unsuitable


def _combinations(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Combinations of sizes: first all dimensions at the same position of their lists, then one at another position."""
    positions = range(max((len(options) for options in sizes.values()), default=1))
    level = [{name: options[min(i, len(options) - 1)] for name, options in sizes.items()} for i in positions]
    yield from level
    for rest in level:
        for name, options in sizes.items():
            yield from ({**rest, name: size} for size in options)


def _sizes(name: str, specs: Mapping[str, TensorSpec], where: list[tuple[str, int]]) -> tuple[int, ...]:
    """Sizes to try for one dimension, by its name and by the ranks and axes where it occurs."""
    ranks = {len(specs[owner].shape or ()) for owner, _ in where}
    axes = {axis for _, axis in where}
    if _BATCH.search(name) or axes == {0}:
        return (1,)
    if ranks == {3} and axes == {1} and all(_STATE.search(owner) for owner, _ in where):
        return (1,)
    if _PAST.search(name):
        return (*_SEQUENCE_SIZES, 0)
    if ranks == {4} and axes <= {2, 3}:
        return _IMAGE_SIZES
    return _SEQUENCE_SIZES if ranks <= {2, 3} and axes == {1} else _OTHER_SIZES


def guesses(
    graph: OpGraph,
    specs: Mapping[str, TensorSpec],
    sizes: Mapping[str, tuple[int, ...]],
    defaults: Mapping[str, Array],
) -> Iterator[dict[str, Array]]:
    """Made-up inputs of the given shapes to try one after another.

    In the second set, integers that index other tensors lie within those. Inputs with a default have their default.
    """
    specs = {name: spec for name, spec in specs.items() if name not in defaults}
    sizes = {**sizes, **{name: array.shape for name, array in defaults.items()}}
    yield {**synthesize(graph, specs, sizes), **defaults}
    if any(_indexes(graph, name) for name, spec in specs.items() if spec.dtype in _INDEX_TYPES):
        yield {**synthesize(graph, specs, sizes, infer_shapes(graph, sizes)), **defaults}


def synthesize(
    graph: OpGraph,
    specs: Mapping[str, TensorSpec],
    sizes: Mapping[str, tuple[int, ...]],
    shapes: Shapes | None = None,
) -> dict[str, Array]:
    """Make up inputs of the given shapes; the same arguments give the same inputs.

    Floats lie in [0, 1); integers that index a constant table lie within it; masks are ones; lengths are the size of
    the longest axis.

    Args:
        graph: the model.
        specs: types of the inputs.
        sizes: shapes of the inputs.
        shapes: shapes of all tensors at these sizes; with them, integers also lie within tensors that are not
            constants, such as the nodes of a graph network.

    Raises:
        InputError: the inputs would take over 4 GiB.
    """
    total = sum(size_bytes(spec.dtype, sizes[name]) for name, spec in specs.items())
    if total > _MOST_BYTES:
        raise InputError(
            f"example inputs of these shapes take {total} bytes, over {_MOST_BYTES}; give smaller sizes with --dim"
        )
    random = np.random.default_rng(0)
    longest = max((max(shape, default=1) for shape in sizes.values()), default=1)
    return {
        name: _values(name, spec.dtype, sizes[name], _bound(graph, name, spec, shapes), longest, random)
        for name, spec in specs.items()
    }


def _bound(graph: OpGraph, name: str, spec: TensorSpec, shapes: Shapes | None) -> int | None:
    """The bound that integers of an input must stay below; None when none is known."""
    bounds = [table_size(graph, name)]
    if shapes is not None and spec.dtype in _INDEX_TYPES:
        for data, axes in _indexed(graph, name, shapes):
            size = shapes.sizes.get(data, ())  # with unknown sizes, 0 is an index that most tensors have
            bounds.append(min((size[axis] for axis in axes if -len(size) <= axis < len(size)), default=1))
    return min((max(1, bound) for bound in bounds if bound is not None), default=None)


def _values(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    table: int | None,
    longest: int,
    random: np.random.Generator,
) -> Array:
    kind = numpy_dtype(dtype)
    low = name.lower()
    if dtype == "string":
        return np.full(shape, "a", dtype=object)
    if dtype == "bool" or "mask" in low:
        return np.ones(shape, dtype=kind)
    if kind.kind in "iu":
        if table is not None:
            return random.integers(0, table, size=shape).astype(kind)
        if re.search(r"sample_?rate|^sr$", low):
            return np.full(shape, 16000).astype(kind)
        if "len" in low:
            return np.full(shape, longest).astype(kind)
        return random.integers(0, 2, size=shape).astype(kind)
    return random.random(size=shape, dtype=np.float32).astype(kind)


def table_size(graph: OpGraph, name: str) -> int | None:
    """Rows of the smallest constant table that an input indexes with Gather; None when it indexes none."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.source.proto.graph.initializer}
    rows: list[int] = []
    pending, seen = [name], {name}
    while pending:
        tensor = pending.pop()
        for index in graph.readers.get(tensor, ()):
            op = graph.ops[index]
            if op.op_type == "Gather" and len(op.node.input) > 1 and op.node.input[1] == tensor:
                shape = shapes.get(op.node.input[0])
                axis = next((a.i for a in op.node.attribute if a.name == "axis"), 0)
                if shape and -len(shape) <= axis < len(shape):
                    rows.append(shape[axis])
            elif op.op_type in _TRANSPARENT:
                new = [output for output in op.outputs if output not in seen]
                pending += new
                seen.update(new)
    return min(rows, default=None)


def _indexes(graph: OpGraph, name: str) -> bool:
    """Whether values computed from an input may index a tensor that is not a constant."""
    return any(data not in graph.constants for data, _ in _indexed(graph, name, None))


def _indexed(graph: OpGraph, name: str, shapes: Shapes | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors that values computed from an input index, with the indexed axes.

    Values are followed through every op that writes integers; an output of unknown type counts as integers.
    """
    pending, seen = [name], {name}
    while pending:
        tensor = pending.pop()
        for index in graph.readers.get(tensor, ()):
            op = graph.ops[index]
            if op.op_type in _INDEXING and len(op.node.input) > 1 and op.node.input[1] == tensor:
                yield op.node.input[0], _indexed_axes(op, tensor, shapes)
            for output in op.outputs:
                spec = shapes.specs.get(output) if shapes is not None else None
                if output not in seen and (spec is None or spec.dtype in _INDEX_TYPES):
                    seen.add(output)
                    pending.append(output)


def _indexed_axes(op: Op, indices: str, shapes: Shapes | None) -> tuple[int, ...]:
    """The axes of an op's first input that its indices select along."""
    if op.op_type in ("GatherND", "ScatterND"):
        size = shapes.sizes.get(indices, ()) if shapes is not None else ()
        return tuple(range(size[-1] if size else 1))
    return (next((a.i for a in op.node.attribute if a.name == "axis"), 0),)


def accept(graph: OpGraph, specs: Mapping[str, TensorSpec], given: Mapping[str, Array]) -> dict[str, int]:
    """Check inputs that a user gave; returns the sizes that free dimensions have in them.

    Raises:
        InputError: the inputs do not fit the model, or give one dimension two sizes.
    """
    check_inputs(given, {name: (spec.dtype, spec.shape) for name, spec in specs.items()}, _unread(graph))
    return sizes_in(specs, given)


def sizes_in(specs: Mapping[str, TensorSpec], given: Mapping[str, Array]) -> dict[str, int]:
    """Sizes of the free dimensions in given inputs; dimensions with different sizes are left out."""
    dims: dict[str, int] = {}
    for dim, where in free_dimensions(specs).items():
        sizes = {given[owner].shape[axis] for owner, axis in where if owner in given}
        if len(sizes) == 1:
            dims[dim] = int(sizes.pop())
    return dims


def _unread(graph: OpGraph) -> frozenset[str]:
    """Inputs that neither an op nor an output reads."""
    return frozenset(name for name in graph.inputs if name not in graph.readers and name not in graph.outputs)
