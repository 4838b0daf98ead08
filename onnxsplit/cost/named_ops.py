"""A model whose ops have names that ONNX Runtime keeps, so that what it says about an op can be told apart."""

from __future__ import annotations

import re

import onnx

from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import all_nodes

_OP_NAME = re.compile(r"onnxsplit\.op(\d+)\.")


def named_op(name: str) -> int | None:
    """The index of the op with this name in a model that :func:`renamed` made; None for another name."""
    match = _OP_NAME.search(name)
    return int(match.group(1)) if match is not None else None


def renamed(graph: OpGraph) -> onnx.ModelProto:
    """The model with a unique name for every live op. Ops in bodies lose their names, so that no event is confused."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.source.proto)
    del model.graph.node[:]
    for op in graph.ops:
        node = model.graph.node.add()
        node.CopyFrom(op.node)
        for inner in all_nodes([node]):
            inner.name = ""
        node.name = f"onnxsplit.op{op.index}."
    # Inputs that are also initializers are constants in the stages, so they are constants here too.
    kept = [value for value in model.graph.input if value.name not in graph.overridable]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    # In old models, ONNX Runtime refuses initializers that are neither read nor inputs.
    read = {name for op in graph.ops for name in op.reads} | set(graph.outputs)
    for position in range(len(model.graph.initializer) - 1, -1, -1):
        if model.graph.initializer[position].name not in read:
            del model.graph.initializer[position]
    return model
