"""Walks through a model's protobuf: ops, subgraphs of If, Loop and Scan, functions, and stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxsplit.tensors import size_bytes, type_name

FunctionKey = tuple[str, str, str]
"""Domain, name and overload of a model-local function."""


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs that an op holds directly, as attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def defined_names(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph itself gives to tensors; in a subgraph they hide those of the graphs around it."""
    names = {value.name for value in graph.input}
    names.update(tensor.name for tensor in graph.initializer)
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    names.update(output for node in graph.node for output in node.output)
    return names


def captured_names(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names that an op's subgraphs read from outside, at any depth; a name defined inside hides the outer one."""
    names: dict[str, None] = {}
    for graph in nested_graphs(node):
        own = defined_names(graph)
        for inner in graph.node:
            names.update(dict.fromkeys(n for n in (*inner.input, *captured_names(inner)) if n and n not in own))
        names.update(dict.fromkeys(o.name for o in graph.output if o.name and o.name not in own))
    return tuple(names)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The ops and those of their subgraphs, at any depth."""
    for node in nodes:
        yield node
        for graph in nested_graphs(node):
            yield from all_nodes(graph.node)


def graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph: initializers and attributes, subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in the attributes of ops, subgraphs included."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.TENSORS:
                yield from attribute.tensors
        for graph in nested_graphs(node):
            yield from graph_tensors(graph)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a stored tensor's data takes; strings count by their real length."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    name = type_name(tensor.data_type)
    return size_bytes(name, tuple(tensor.dims)) if name else 0


def functions_of(proto: onnx.ModelProto) -> dict[FunctionKey, onnx.FunctionProto]:
    """The model-local functions by key."""
    return {(f.domain, f.name, f.overload): f for f in proto.functions}


def function_key(node: onnx.NodeProto) -> FunctionKey:
    """The key of the function that an op calls; for another op, a key that no function has."""
    return node.domain, node.op_type, node.overload


def called_functions(
    nodes: Iterable[onnx.NodeProto], functions: dict[FunctionKey, onnx.FunctionProto]
) -> set[FunctionKey]:
    """The functions that ops call: directly, from subgraphs at any depth, or through other functions."""
    called: set[FunctionKey] = set()
    pending = list(nodes)
    while pending:
        for node in all_nodes([pending.pop()]):
            key = function_key(node)
            if key in functions and key not in called:
                called.add(key)
                pending.extend(functions[key].node)
    return called
