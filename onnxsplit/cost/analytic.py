"""Costs estimated by arithmetic from multiply-adds and bytes, without ONNX Runtime and without inputs.

This is the fall-back for models that cannot run on this host. The rates are those of one ordinary x86 core; only their
ratio affects a cut. An op whose work is not known is costed by the bytes that it reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnxsplit.cost import OpCosts
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.protobuf import all_nodes, nested_graphs
from onnxsplit.model.shapes import Shapes

FLOP_PER_S = 40_000_000_000
BYTES_PER_S = 8_000_000_000
OP_OVERHEAD_NS = 2_000
_NOMINAL_BODY_OP_NS = 10_000  # time of an op in a body of If, Loop or Scan, where shapes are not inferred
_FREE = frozenset(["Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size", "Constant"])

Dims = tuple[int, ...]


def analytic_costs(graph: OpGraph, shapes: Shapes) -> OpCosts:
    """Cost every op by its work or by the bytes that it reads and writes, whichever takes longer."""
    times = tuple(_op_ns(op, graph, shapes) for op in graph.ops)
    return OpCosts(time_ns=times, whole_ns=sum(times), level="all", source="analytic", shapes=shapes)


def _op_ns(op: Op, graph: OpGraph, shapes: Shapes) -> int:
    if op.op_type in _FREE or op.index in graph.constant_ops:
        return 0
    touched = _touched_bytes(op, shapes)
    count = _FLOPS.get(op.op_type)
    if op.op_type == "Attention":
        count = _projecting_attention if op.domain == "com.microsoft" else _attention
    work = count(op, shapes) if count is not None else 0
    bodies = sum(1 for _ in all_nodes(n for body in nested_graphs(op.node) for n in body.node))
    return (
        OP_OVERHEAD_NS
        + max(work * 1_000_000_000 // FLOP_PER_S, touched * 1_000_000_000 // BYTES_PER_S)
        + bodies * _NOMINAL_BODY_OP_NS
    )


def _touched_bytes(op: Op, shapes: Shapes) -> int:
    """Bytes that an op reads and writes. An op reads at most as many bytes of a table as it writes."""
    tables = {_input(op, position) for position in _TABLES.get(op.op_type, ())}
    written = sum(shapes.bytes(name) for name in op.outputs)
    read = sum(min(shapes.bytes(name), written) if name in tables else shapes.bytes(name) for name in op.inputs)
    return read + written


def _size(name: str, shapes: Shapes) -> Dims:
    return shapes.sizes.get(name, ())


def _output_elements(op: Op, shapes: Shapes) -> int:
    return math.prod(_size(op.outputs[0], shapes)) if op.outputs else 0


def _convolution(op: Op, shapes: Shapes) -> int:
    weight = _size(_input(op, {"ConvInteger": 1, "QLinearConv": 3}.get(op.op_type, 1)), shapes)
    return 2 * _output_elements(op, shapes) * math.prod(weight[1:])


def _transposed_convolution(op: Op, shapes: Shapes) -> int:
    weight = _size(_input(op, 1), shapes)
    return 2 * math.prod(_size(_input(op, 0), shapes)) * math.prod(weight[1:])


def _matmul(op: Op, shapes: Shapes) -> int:
    left = _size(_input(op, 0), shapes)
    return 2 * _output_elements(op, shapes) * (left[-1] if left else 0)


def _attention(op: Op, shapes: Shapes) -> int:
    """Two products of queries and keys. The number of keys is the length of the cache after this step."""
    present, key = (_size(name, shapes) for name in (_output(op, 1), _input(op, 1)))
    keys = (present or key or _size(_input(op, 0), shapes))[-2:-1]
    return 4 * _output_elements(op, shapes) * math.prod(keys)


def _projecting_attention(op: Op, shapes: Shapes) -> int:
    """The Attention op of com.microsoft, which first multiplies its input by the query, key and value weights."""
    source, weights = _size(_input(op, 0), shapes), _size(_input(op, 1), shapes)
    return 2 * math.prod((*source, *weights[-1:])) + 4 * _output_elements(op, shapes) * math.prod(source[-2:-1])


def _narrow_weight_product(op: Op, shapes: Shapes) -> int:
    return 2 * _output_elements(op, shapes) * next((a.i for a in op.node.attribute if a.name == "K"), 0)


def _gemm(op: Op, shapes: Shapes) -> int:
    left = _size(_input(op, 0), shapes)
    transposed = any(a.name == "transA" and a.i for a in op.node.attribute)
    return 2 * _output_elements(op, shapes) * (left[0 if transposed else -1] if left else 0)


def _recurrent(op: Op, shapes: Shapes) -> int:
    source = _size(_input(op, 0), shapes)
    weights = math.prod(_size(_input(op, 1), shapes)) + math.prod(_size(_input(op, 2), shapes))
    return 2 * weights * math.prod(source[:2])


def _input(op: Op, position: int) -> str:
    names: list[str] = list(op.node.input)
    return names[position] if position < len(names) else ""


def _output(op: Op, position: int) -> str:
    names: list[str] = list(op.node.output)
    return names[position] if position < len(names) else ""


_TABLES = {
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "EmbedLayerNormalization": (2, 3, 4),
    "Slice": (0,),
}
"""By op type, the inputs that are tables: the op reads at most as much of them as it writes."""

_FLOPS: dict[str, Callable[[Op, Shapes], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "FusedConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "FusedMatMul": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "GemmFastGelu": _matmul,
    "MatMulNBits": _narrow_weight_product,
    "MatMulBnb4": _narrow_weight_product,
    "GroupQueryAttention": _attention,
    "MultiHeadAttention": _attention,
    "SparseAttention": _attention,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}


def activation_bytes(graph: OpGraph, shapes: Shapes, ops: tuple[int, ...], kept: frozenset[str]) -> int:
    """The largest sum of live activations in bytes while some ops run in order.

    A tensor is live from its writer to its last reader.

    Args:
        graph: the graph.
        shapes: sizes of its tensors.
        ops: op indices, ascending.
        kept: tensors that stay live to the end: the outputs.
    """
    inside = set(ops)
    last = {
        name: max((r for r in graph.readers.get(name, ()) if r in inside), default=-1)
        for op in ops
        for name in graph.ops[op].reads
    }
    alive = sum(shapes.bytes(n) for n in last if n not in graph.constants and graph.producer.get(n) not in inside)
    largest = alive
    for index in ops:
        op = graph.ops[index]
        alive += sum(shapes.bytes(name) for name in op.outputs)
        largest = max(largest, alive)
        ending = [n for n in op.reads if last[n] == index and n not in graph.constants and n not in kept]
        unread = [n for n in op.outputs if n not in last and n not in kept]
        alive -= sum(shapes.bytes(name) for name in (*ending, *unread))
    return largest
