"""Precision: the float types that a model computes in, by which two runs of it can differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import all_nodes, graph_tensors, nested_graphs
from onnxsplit.model.shapes import Shapes
from onnxsplit.tensors import type_name

_ROUNDING = frozenset(["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"])
_INT8_LEVEL = 4  # of MatMulNBits: products of 8-bit integers


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
