"""Precision: how exactly two runs of one model can agree, by the float types that it computes in.

A float16 number has 11 significant bits, so two correct orders of the same float16 arithmetic differ far more than two
orders of float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx

from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import all_nodes, graph_tensors, nested_graphs
from onnxsplit.model.shapes import Shapes
from onnxsplit.tensors import Array, type_name

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

_ROUNDING = frozenset(["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"])
_INT8_LEVEL = 4  # of MatMulNBits: products of 8-bit integers


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


def rounds_activations(graph: OpGraph) -> bool:
    """Whether ops round what they read to 8 bits by its own range, so that a last bit may decide over a whole step."""
    nodes = [op.node for op in graph.ops] + [n for f in graph.source.proto.functions for n in f.node]
    return any(
        node.op_type in _ROUNDING or any(a.name == "accuracy_level" and a.i == _INT8_LEVEL for a in node.attribute)
        for node in all_nodes(nodes)
    )


def computed_types(graph: OpGraph, shapes: Shapes) -> frozenset[str]:
    """Types that a model computes in: types of the tensors that its ops write, and types in subgraphs and functions.

    Constants do not count: a weight that is stored in bfloat16 and cast to float32 is rounded before anything runs.
    """
    written = {name for op in graph.ops if op.index not in graph.constant_ops for name in op.outputs}
    types = {spec.dtype for name, spec in shapes.specs.items() if name in written or name in graph.inputs}
    bodies = [body for op in graph.ops for body in nested_graphs(op.node)]
    inner = [node for body in bodies for node in body.node]
    inner += [node for function in graph.source.proto.functions for node in function.node]
    numbers = {tensor.data_type for body in bodies for tensor in graph_tensors(body)} | set(_cast_to(inner))
    return frozenset(types | {name for number in numbers if (name := type_name(number)) is not None})


def _cast_to(nodes: Iterable[onnx.NodeProto]) -> Iterator[int]:
    """Numbers of the types that Cast ops convert to."""
    for node in all_nodes(nodes):
        if node.op_type == "Cast":
            yield from (attribute.i for attribute in node.attribute if attribute.name == "to")


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
