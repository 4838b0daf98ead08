"""Models that are run to measure what requests cost beside the runs of their stages."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


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
    return _model(helper.make_graph(nodes, "negations", inputs, outputs))


def products(stages: int, each: int, width: int) -> onnx.ModelProto:
    """A model that multiplies a vector with square matrices, so that its stages fill caches with their weights.

    Its input is ``x0``, and ``y0_{s}`` is the result of stage ``s``. A vector of ones stays one.

    Args:
        stages: the number of stages.
        each: the matrices of a stage.
        width: the elements of the vector, of type float32.
    """
    weights = [
        numpy_helper.from_array(np.full((width, width), 1 / width, np.float32), f"w{place}")
        for place in range(stages * each)
    ]
    names = [
        "x0",
        *(f"y0_{place // each}" if place % each == each - 1 else f"p{place}" for place in range(len(weights))),
    ]
    nodes = [
        helper.make_node("MatMul", [before, weight.name], [after])
        for before, weight, after in zip(names, weights, names[1:], strict=False)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [width]) for name in (names[0], names[-1])]
    return _model(helper.make_graph(nodes, "products", ends[:1], ends[1:], weights))


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
