"""The bodies of ops such as If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies an op holds directly, as attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def defined_names(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph itself gives to tensors; in a body they hide those of the graphs around it."""
    names = {value.name for value in graph.input}
    names.update(tensor.name for tensor in graph.initializer)
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    names.update(output for node in graph.node for output in node.output)
    return names
