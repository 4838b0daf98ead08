"""A model that computes next to nothing, to measure what requests cost beside it."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def negations(stages: int, tensors: int, size: int) -> onnx.ModelProto:
    """A model that negates each of its inputs as many times as there are stages.

    Its inputs are ``x0``, ``x1`` and so on, and ``y{t}_{s}`` is input ``t`` after ``s + 1`` negations.

    Args:
        stages: how often each input is negated.
        tensors: the number of inputs, and of outputs.
        size: elements of each, of type float32.
    """
    nodes, inputs, outputs = [], [], []
    for tensor in range(tensors):
        last = f"x{tensor}"
        inputs.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, [size]))
        for stage in range(stages):
            name = f"y{tensor}_{stage}"
            nodes.append(helper.make_node("Neg", [last], [name]))
            last = name
        outputs.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, [size]))
    graph = helper.make_graph(nodes, "negations", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
