"""Which ops neither ONNX nor ONNX Runtime has, so that a library of custom ops must have them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxsplit.model.source import FunctionKey, all_nodes, called_functions

_ONNX = frozenset(
    ["", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training"],
)
_ONNX_RUNTIME = frozenset(
    [
        "com.intel.ai",
        "com.microsoft",
        "com.microsoft.dml",
        "com.microsoft.experimental",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
        "com.xilinx",
        "org.pytorch.aten",
        "trt.plugins",
    ]
)


def holds_custom_op(nodes: Iterable[onnx.NodeProto], functions: dict[FunctionKey, onnx.FunctionProto]) -> bool:
    """True when one of the nodes is a custom op: itself, in a body at any depth, or in a function that is called."""
    nodes = list(nodes)
    bodies = [node for key in called_functions(nodes, functions) for node in functions[key].node]
    return any(
        _is_custom(node)
        for node in all_nodes((*nodes, *bodies))
        if (node.domain, node.op_type, node.overload) not in functions
    )


def _is_custom(node: onnx.NodeProto) -> bool:
    """By its domain; among ONNX's own, what ONNX does not define is taken for custom, to be on the safe side."""
    if node.domain in _ONNX:
        return not onnx.defs.has(node.op_type, "" if node.domain == "ai.onnx" else node.domain)
    return node.domain not in _ONNX_RUNTIME
