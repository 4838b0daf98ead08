"""Shape inference with the help of a walk: exported models compute shapes by ops that inference alone cannot follow."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.shape_inference

from onnxsplit.stages.batch.linear import Values
from onnxsplit.stages.batch.walk import Learned, graph_sizes


def refined(model: onnx.ModelProto, learned: Learned) -> onnx.ModelProto | None:
    """Infer more shapes of a model.

    A tensor whose numbers are known becomes a constant, and the output of an If that can run only one branch gets
    the shape that this branch gives. Both hold for one binding of the free dimensions.

    Args:
        model: the model; it is changed.
        learned: what a walk over this model learned.

    Returns:
        The model with the inferred shapes; None if nothing new was learned, or inference fails.
    """
    changes = [
        _with_shape(graph, name, what) if isinstance(what, onnx.ValueInfoProto) else _with_numbers(graph, name, what)
        for graph, name, what in learned
    ]
    if not any(changes):
        return None
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # shapes that inference cannot find stay unknown
        return None


def _with_shape(graph: onnx.GraphProto, name: str, value: onnx.ValueInfoProto) -> bool:
    if name in graph_sizes(graph):
        return False
    for known in (*graph.value_info, *graph.output):
        if known.name == name:
            known.CopyFrom(value)
            return True
    graph.value_info.add().CopyFrom(value)
    return True


def _with_numbers(graph: onnx.GraphProto, name: str, numbers: Values) -> bool:
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    node = next((node for node in graph.node if name in node.output), None)
    if node is None or node.op_type == "Constant" or not kinds.get(name):
        return False
    array = np.array(numbers.tolist(), dtype=onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
    tensor = onnx.numpy_helper.from_array(array.reshape(numbers.shape), name)
    node.CopyFrom(onnx.helper.make_node("Constant", [], [name], value=tensor))
    return True
