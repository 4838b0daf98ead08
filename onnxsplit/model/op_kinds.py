"""Kinds of ops: custom ops, which a library of the user defines, and random ops."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxsplit.model.protobuf import FunctionKey, all_nodes, called_functions, function_key

_RANDOM = frozenset(
    [
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
    ]
)

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
    """True when one of the ops is a custom op: itself, in a subgraph at any depth, or in a function it calls."""
    nodes = list(nodes)
    inside = [node for key in called_functions(nodes, functions) for node in functions[key].node]
    return any(_is_custom(node) for node in all_nodes((*nodes, *inside)) if function_key(node) not in functions)


def _is_custom(node: onnx.NodeProto) -> bool:
    """True when an op's domain is neither ONNX's nor ONNX Runtime's, or ONNX's own domain does not define it."""
    if node.domain in _ONNX:
        return not onnx.defs.has(node.op_type, "" if node.domain == "ai.onnx" else node.domain)
    return node.domain not in _ONNX_RUNTIME


def is_random(node: onnx.NodeProto, functions: dict[FunctionKey, onnx.FunctionProto]) -> bool:
    """True when an op may give another result each time: itself, in a subgraph or in a function it calls."""
    inside = [node, *(n for key in called_functions([node], functions) for n in functions[key].node)]
    return any(n.op_type in _RANDOM for n in all_nodes(inside))
