"""Shape rules for ops that only ONNX Runtime defines, and for newer ops that ONNX's inference does not support.

In a copy of the model that is only used for inference, such an op is replaced by a stand-in: standard ops with the same
output shapes and types. One pass of ONNX's own inference then also reaches the ops behind it, with symbolic dimensions.
Stand-ins rely on the fact that inference takes the type of most ops from their first input and does not check the
others: ``Mul(a, b)`` has the type of ``a`` and the broadcast shape of both. An output without a stand-in stays unknown.

Sources: the operator tables of ONNX Runtime (docs/ContribOperators.md) and of ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxsplit.model.protobuf import functions_of, nested_graphs

_MICROSOFT = "com.microsoft"


def use_stand_ins(model: onnx.ModelProto) -> None:
    """Replace ops by stand-ins, also in subgraphs at any depth. The model is then only fit for shape inference."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    own = {(domain, name) for domain, name, _ in functions_of(model)}
    _replace(model.graph.node, opset, constants, own)
    for function in model.functions:
        _replace(function.node, opset, constants, own)


def _replace(nodes: Any, opset: int, constants: dict[str, TensorProto], own: set[tuple[str, str]]) -> None:
    replaced: list[onnx.NodeProto] = []
    for node in nodes:
        rule = None if (node.domain, node.op_type) in own else _rule(node)
        if rule is None:
            for graph in nested_graphs(node):
                _replace(graph.node, opset, constants, own)
            replaced.append(node)
            continue
        stand_in = _StandIn(node, opset, constants)
        rule(stand_in)
        replaced += stand_in.nodes
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in replaced]
    del nodes[:]
    nodes.extend(copies)


@dataclass
class _StandIn:
    """Builder of the stand-in of one op.

    Attributes:
        node: the op.
        opset: version of the standard ops in the model.
        constants: initializers of the main graph by name.
        nodes: the standard ops that were added so far.
    """

    node: onnx.NodeProto
    opset: int
    constants: dict[str, TensorProto]
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def input(self, position: int) -> str:
        """Name of an input; empty when it is left out."""
        return self.node.input[position] if position < len(self.node.input) else ""

    def output(self, position: int) -> str:
        """Name of an output; empty when it is left out."""
        return self.node.output[position] if position < len(self.node.output) else ""

    def integer(self, name: str, default: int = 0) -> int:
        """Value of an integer attribute."""
        return next((a.i for a in self.node.attribute if a.name == name), default)

    def dims(self, name: str) -> list[int]:
        """Shape of an initializer; empty when the name is not one."""
        return list(self.constants[name].dims) if name in self.constants else []

    def add(self, op_type: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a standard op; returns the name of its output."""
        output = output or f"{next(o for o in self.node.output if o)}/stand-in/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(self, dims: Sequence[int], kind: int = TensorProto.FLOAT) -> str:
        """Add a constant without data; returns its name."""
        tensor = TensorProto(data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="absent")
        return self.add("Constant", [], value=tensor)

    def same(self, position: int, source: int = 0) -> None:
        """Give an output the type and shape of an input, if both exist."""
        if self.output(position) and self.input(source):
            self.add("Identity", [self.input(source)], self.output(position))


def _like_first(op: _StandIn) -> None:
    op.same(0)


def _skip_normalization(op: _StandIn) -> None:
    op.same(0)
    op.same(3)  # the sum of input and skip; outputs 1 and 2 are for training


def _skip_group_normalization(op: _StandIn) -> None:
    op.same(0)
    op.same(1)


def _elementwise(right: int) -> Callable[[_StandIn], None]:
    """The broadcast shape of the first input and another one, in the type of the first."""

    def rule(op: _StandIn) -> None:
        op.add("Add", [op.input(0), op.input(right)], op.output(0))

    return rule


def _as(op_type: str, *positions: int, drop: Sequence[str] = ()) -> Callable[[_StandIn], None]:
    """A standard op on some of the inputs, with the same attributes except some."""

    def rule(op: _StandIn) -> None:
        if op.integer("channels_last"):
            return
        op.add(op_type, [op.input(position) for position in positions], op.output(0))
        kept = [a for a in op.node.attribute if a.name not in (*drop, "channels_last")]
        op.nodes[-1].attribute.extend(kept)

    return rule


def _scaled_product(scale: int) -> Callable[[_StandIn], None]:
    """The product of two integer matrices, in the type of a scale input."""

    def rule(op: _StandIn) -> None:
        product = op.add("MatMul", [op.input(0), op.input(1)])
        op.add("Mul", [op.input(scale), product], op.output(0))

    return rule


def _narrow_weight_product(op: _StandIn) -> None:
    weight = op.constant([op.integer("K"), op.integer("N")])
    op.add("MatMul", [op.input(0), weight], op.output(0))


def _fused_product(op: _StandIn) -> None:
    if op.integer("transBatchA") or op.integer("transBatchB"):
        return
    weight = op.dims(op.input(1))
    if len(weight) == 2 and not op.integer("transA"):
        shape = weight[::-1] if op.integer("transB") else weight
        op.add("MatMul", [op.input(0), op.constant(shape)], op.output(0))
        return
    left = "...ji" if op.integer("transA") else "...ij"
    right = "...kj" if op.integer("transB") else "...jk"
    op.add("Einsum", [op.input(0), op.input(1)], op.output(0), equation=f"{left},{right}->...ik")


def _gather_blocks(op: _StandIn) -> None:
    dims, scales = op.dims(op.input(0)), op.constants.get(op.input(2))
    if not dims or scales is None:
        return
    if op.constants[op.input(0)].data_type == TensorProto.UINT8:
        dims[-1] = dims[-1] * 8 // op.integer("bits", 4)
    table = op.constant(dims, scales.data_type)
    op.add("Gather", [table, op.input(1)], op.output(0), axis=op.integer("gather_axis"))


def _embedding(op: _StandIn) -> None:
    op.add("Gather", [op.input(2), op.input(0)], op.output(0))
    if op.output(1):
        first = op.add("ArgMax", [op.input(0)], axis=1, keepdims=0)
        op.add("Cast", [first], op.output(1), to=TensorProto.INT32)
    if op.output(2):
        op.add("Gather", [op.input(2), op.input(0)], op.output(2))


def _heads(op: _StandIn, tensor: str, heads: int) -> str:
    """Reshape [batch, sequence, heads * size] to [batch, heads, sequence, size]."""
    shape = helper.make_tensor("", TensorProto.INT64, [4], [0, 0, heads, -1])
    parted = op.add("Reshape", [tensor, op.add("Constant", [], value=shape)])
    return op.add("Transpose", [parted], perm=[0, 2, 1, 3])


def _grown(op: _StandIn, past: str, new: str, output: str, axis: int) -> None:
    """Write a key or value cache that has grown by the new one along an axis."""
    if output and past:
        op.add("Concat", [past, new], output, axis=axis)
    elif output:
        op.add("Identity", [new], output)


def _grouped_attention(op: _StandIn) -> None:
    """Inputs: query, key, value, past key, past value. Without a key, the query holds query, key and value by heads."""
    heads, shared = op.integer("num_heads"), op.integer("kv_num_heads")
    query, key, value = op.input(0), op.input(1), op.input(2)
    if key:
        op.same(0)
    else:
        packed = _heads(op, query, heads + 2 * shared)
        groups = [helper.make_tensor("", TensorProto.INT64, [count], [0] * count) for count in (heads, shared)]
        rows, few = (op.add("Constant", [], value=group) for group in groups)
        own = op.add("Transpose", [op.add("Gather", [packed, rows], axis=1)], perm=[0, 2, 1, 3])
        whole = helper.make_tensor("", TensorProto.INT64, [3], [0, 0, -1])
        op.add("Reshape", [own, op.add("Constant", [], value=whole)], op.output(0))
        new = op.add("Gather", [packed, few], axis=1)
    for position, past, tensor in ((1, op.input(3), key), (2, op.input(4), value)):
        if op.output(position):
            _grown(op, past, _heads(op, tensor, shared) if tensor else new, op.output(position), 2)


def _multi_head_attention(op: _StandIn) -> None:
    """Inputs: query, key and value with three dimensions; past key and value are inputs 6 and 7."""
    query, key, value = op.input(0), op.input(1), op.input(2)
    if not key or not value:
        return
    op.add("Einsum", [query, value], op.output(0), equation="bsh,bkv->bsv")
    for position, past, tensor in ((1, op.input(6), key), (2, op.input(7), value)):
        if op.output(position):
            _grown(op, past, _heads(op, tensor, op.integer("num_heads")), op.output(position), 2)


def _projecting_attention(op: _StandIn) -> None:
    """Inputs: input, weights [width, 3 * hidden], bias, mask, past [2, batch, heads, length, size]."""
    weights = op.dims(op.input(1))
    sizes = next((list(a.ints) for a in op.node.attribute if a.name == "qkv_hidden_sizes"), [])
    if len(weights) != 2:
        return
    hidden = sizes[2] if len(sizes) == 3 else weights[1] // 3
    new = op.add("MatMul", [op.input(0), op.constant([weights[0], hidden])])
    op.add("Identity", [new], op.output(0))
    if op.output(1):
        one = _heads(op, new, op.integer("num_heads"))
        axes = helper.make_tensor("", TensorProto.INT64, [1], [0])
        if op.opset >= 13:
            row = op.add("Unsqueeze", [one, op.add("Constant", [], value=axes)])
        else:
            row = op.add("Unsqueeze", [one], axes=[0])
        both = op.add("Concat", [row, row], axis=0)
        _grown(op, op.input(4), both, op.output(1), 3)


def _standard_attention(op: _StandIn) -> None:
    """ONNX's inference knows the first output, but not present key and value when inputs have three dimensions."""
    op.nodes.append(onnx.NodeProto.FromString(op.node.SerializeToString()))
    heads = op.integer("kv_num_heads")
    for position in (1, 2) if heads else ():
        if op.output(position):
            _grown(op, op.input(position + 3), _heads(op, op.input(position), heads), op.output(position), 2)
            op.nodes[0].output[position] = ""


def _concatenation(op: _StandIn) -> None:
    tensors = list(op.node.input)[2::3]
    op.add("Concat", tensors, op.output(0), axis=op.integer("axis"))


_STANDARD: dict[str, Callable[[_StandIn], None]] = {
    "SimplifiedLayerNormalization": _like_first,
    "RMSNormalization": _like_first,
    "RotaryEmbedding": _like_first,
    "Attention": _standard_attention,
}
_CONTRIBUTED: dict[str, Callable[[_StandIn], None]] = {
    "BiasAdd": _like_first,
    "BiasGelu": _like_first,
    "BiasSoftmax": _like_first,
    "FastGelu": _like_first,
    "Gelu": _like_first,
    "GemmaRotaryEmbedding": _like_first,
    "GroupNorm": _like_first,
    "MoE": _like_first,
    "QLinearLeakyRelu": _like_first,
    "QLinearSigmoid": _like_first,
    "QLinearSoftmax": _like_first,
    "QMoE": _like_first,
    "QuickGelu": _like_first,
    "RotaryEmbedding": _like_first,
    "SkipLayerNormalization": _skip_normalization,
    "SkipSimplifiedLayerNormalization": _skip_normalization,
    "SkipGroupNorm": _skip_group_normalization,
    "QLinearAdd": _elementwise(3),
    "QLinearMul": _elementwise(3),
    "QLinearConcat": _concatenation,
    "QLinearAveragePool": _as("AveragePool", 0),
    "QLinearGlobalAveragePool": _as("GlobalAveragePool", 0),
    "QLinearConv": _as("QLinearConv", 0, 1, 2, 3, 4, 5, 6, 7),
    "QuantizeLinear": _as("QuantizeLinear", 0, 1, 2),
    "DequantizeLinear": _as("DequantizeLinear", 0, 1),
    "FusedConv": _as("Conv", 0, 1, drop=("activation", "activation_params")),
    "FusedGemm": _as("Gemm", 0, 1, drop=("activation", "activation_alpha", "activation_beta", "activation_gamma")),
    "FusedMatMul": _fused_product,
    "TransposeMatMul": _fused_product,
    "GemmFastGelu": _as("MatMul", 0, 1),
    "DynamicQuantizeMatMul": _as("MatMul", 0, 1),
    "MatMulIntegerToFloat": _scaled_product(2),
    "MatMulNBits": _narrow_weight_product,
    "MatMulBnb4": _narrow_weight_product,
    "GatherBlockQuantized": _gather_blocks,
    "EmbedLayerNormalization": _embedding,
    "Attention": _projecting_attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _grouped_attention,
    "SparseAttention": _grouped_attention,
}


def _rule(node: onnx.NodeProto) -> Callable[[_StandIn], None] | None:
    if node.domain == _MICROSOFT:
        return _CONTRIBUTED.get(node.op_type)
    return _STANDARD.get(node.op_type) if node.domain in ("", "ai.onnx") else None
