"""Strings as an ``OrtValue``.

ONNX Runtime takes inputs of types that NumPy lacks only as ``OrtValue``, takes either arrays or values but not both,
and cannot make an ``OrtValue`` of an array of strings. So the value comes from a small model that holds the strings.
"""

from __future__ import annotations

from typing import Any

from onnxsplit.tensors import Array


def string_value(runtime: Any, array: Array) -> Any:
    """Make an ``OrtValue`` of an array of ``str``. This takes a few milliseconds, because it opens a session.

    Args:
        runtime: the module ``onnxruntime``.
        array: the strings, of any shape.
    """
    import onnx

    texts = [str(text).encode() for text in array.ravel().tolist()]
    kind = onnx.TensorProto.STRING
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["held"], ["given"])],
        "strings",
        [],
        [onnx.helper.make_tensor_value_info("given", kind, array.shape)],
        [onnx.TensorProto(name="held", data_type=kind, dims=array.shape, string_data=texts)],
    )
    # The lowest versions that suffice, so that every ONNX Runtime accepts them.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run_with_ort_values(["given"], {})[0]
