"""The graph of a model's ops, :class:`OpGraph`.

The graph is a ``networkx.DiGraph``. Its nodes are integers, the positions of the ops in a topological order. The node
attribute ``op`` is the :class:`Op`. The edge attribute ``tensors`` lists the names of the tensors that pass along the
edge, sorted.

The graph contains only live ops: the ancestors of the model's outputs. An op reads the tensors that its subgraphs (of
If, Loop and Scan, at any depth) capture from outside, exactly as it reads its explicit inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import onnx

from onnxsplit.errors import ModelError
from onnxsplit.model.op_kinds import holds_custom_op, is_random
from onnxsplit.model.protobuf import FunctionKey, captured_names, functions_of, tensor_bytes
from onnxsplit.model.shared_weights import Extent, Stored, extents, stored_once
from onnxsplit.model.source import SourceModel

_PACKING = frozenset(
    [
        "Conv",
        "ConvTranspose",
        "MatMul",
        "Gemm",
        "LSTM",
        "GRU",
        "QLinearConv",
        "QLinearMatMul",
        "MatMulInteger",
        "ConvInteger",
    ]
)


@dataclass(frozen=True)
class Op:
    """One op of the main graph.

    Attributes:
        index: its position in the topological order, and its node in the graph.
        name: the op's name in the model; its type and first output when it has none.
        op_type: ONNX op type.
        domain: operator domain, '' for ai.onnx.
        inputs: tensors that it reads explicitly; omitted optional inputs are left out.
        captures: tensors of the main graph that its subgraphs read.
        outputs: tensors that it writes; omitted optional outputs are left out.
        node: the protobuf that it was read from; do not change it.
    """

    index: int
    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    captures: tuple[str, ...]
    outputs: tuple[str, ...]
    node: onnx.NodeProto = field(repr=False, compare=False)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of its inputs and captures, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.captures)))


@dataclass(frozen=True)
class OpGraph:
    """The graph of a model's live ops, with lookups of tensors by name.

    Attributes:
        source: the model.
        digraph: the ops and the tensors between them, as the module describes.
        ops: the ops by index.
        producer: the op that writes each tensor.
        readers: the ops that read each tensor, ascending.
        inputs: inputs that a caller must give; initializers that are also inputs are constants, see ``overridable``.
        outputs: outputs of the model, each once.
        constants: size in bytes of each initializer of the main graph, including sparse ones.
        stored: the bytes of the constants; bytes that several constants share are counted once.
        packed: constants of which ONNX Runtime's CPU kernels keep a packed copy.
        overridable: initializers that the model also lists as inputs. Stages treat them as constants.
        constant_ops: ops whose result never changes: no path leads to them from an input, a random or a custom op.
        custom_ops: ops that neither ONNX nor ONNX Runtime defines, and ops that hold or call such ops.
    """

    source: SourceModel
    digraph: nx.DiGraph
    ops: tuple[Op, ...]
    producer: dict[str, int]
    readers: dict[str, tuple[int, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, int]
    stored: tuple[Stored, ...]
    packed: frozenset[str]
    overridable: tuple[str, ...]
    constant_ops: frozenset[int]
    custom_ops: frozenset[int]


def build_graph(source: SourceModel) -> OpGraph:
    """Build the graph of a model's live ops.

    Raises:
        ModelError: a tensor is written twice, or read but never written, or the ops form a cycle.
    """
    proto = source.proto.graph
    constants = {tensor.name: tensor_bytes(tensor) for tensor in proto.initializer}
    constants |= {s.values.name: tensor_bytes(s.values) + tensor_bytes(s.indices) for s in proto.sparse_initializer}
    inputs = tuple(value.name for value in proto.input if value.name not in constants)
    outputs = tuple(dict.fromkeys(value.name for value in proto.output))

    nodes = _sorted_live_nodes(source, given={*constants, *inputs}, outputs=outputs)
    ops = tuple(
        Op(
            index=index,
            name=node.name or f"{node.op_type}:{next((o for o in node.output if o), '')}",
            op_type=node.op_type,
            domain=node.domain,
            inputs=tuple(dict.fromkeys(n for n in node.input if n)),
            captures=captured_names(node),
            outputs=tuple(o for o in node.output if o),
            node=node,
        )
        for index, node in enumerate(nodes)
    )
    producer = {output: op.index for op in ops for output in op.outputs}
    readers: dict[str, list[int]] = {}
    digraph = nx.DiGraph()
    for op in ops:
        digraph.add_node(op.index, op=op)
        read_from: dict[int, list[str]] = {}
        for name in op.reads:
            readers.setdefault(name, []).append(op.index)
            if name in producer:
                read_from.setdefault(producer[name], []).append(name)
        for origin, names in read_from.items():
            digraph.add_edge(origin, op.index, tensors=tuple(sorted(names)))
    functions = functions_of(source.proto)
    custom = frozenset(op.index for op in ops if holds_custom_op([op.node], functions))
    return OpGraph(
        source=source,
        digraph=digraph,
        ops=ops,
        producer=producer,
        readers={name: tuple(indices) for name, indices in readers.items()},
        inputs=inputs,
        outputs=outputs,
        constants=constants,
        stored=stored_once(constants, _places(source)),
        packed=frozenset(name for op in ops if op.op_type in _PACKING for name in op.inputs if name in constants),
        overridable=tuple(value.name for value in proto.input if value.name in constants),
        constant_ops=_constant_ops(ops, constants, producer, functions, custom),
        custom_ops=custom,
    )


def _places(source: SourceModel) -> dict[str, Extent]:
    """The extents of the initializers that may share bytes with others, by name."""
    tensors = source.proto.graph.initializer
    places = zip(tensors, extents(source.place, tensors), strict=True)
    return {tensor.name: place for tensor, place in places if place is not None}


def _sorted_live_nodes(source: SourceModel, *, given: set[str], outputs: tuple[str, ...]) -> list[onnx.NodeProto]:
    """The ancestors of the outputs in a topological order, as close to the file's order as possible."""
    nodes = list(source.proto.graph.node)
    producer: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for output in filter(None, node.output):
            if output in producer or output in given:
                raise ModelError(f"{source.path}: tensor {output!r} is written twice; names must be unique in a graph")
            producer[output] = position
    order = nx.DiGraph()
    pending = [(name, "the model's outputs") for name in outputs]
    while pending:
        name, reader = pending.pop()
        if name in given:
            continue
        if name not in producer:
            raise ModelError(f"{source.path}: tensor {name!r}, read by {reader}, is never written")
        position = producer[name]
        if position in order:
            continue
        node = nodes[position]
        order.add_node(position)
        pending += [(n, f"op {node.name or node.op_type!r}") for n in (*node.input, *captured_names(node)) if n]
    for position in list(order):
        for name in (*nodes[position].input, *captured_names(nodes[position])):
            if name in producer:
                order.add_edge(producer[name], position)
    try:
        return [nodes[position] for position in nx.lexicographical_topological_sort(order)]
    except nx.NetworkXUnfeasible as error:
        raise ModelError(f"{source.path}: ops form a cycle; an ONNX graph must have none") from error


def _constant_ops(
    ops: tuple[Op, ...],
    constants: dict[str, int],
    producer: dict[str, int],
    functions: dict[FunctionKey, onnx.FunctionProto],
    custom: frozenset[int],
) -> frozenset[int]:
    """Ops whose result never changes."""
    constant: set[int] = set()
    for op in ops:
        fixed = all(name in constants or producer.get(name) in constant for name in op.reads)
        if fixed and op.index not in custom and not is_random(op.node, functions):
            constant.add(op.index)
    return frozenset(constant)
