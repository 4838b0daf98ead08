"""Changes to the graph of a decoder before it is cut: one branch instead of two, and scores of the last positions only.

Both keep the names of the model's inputs and outputs. The protobuf of the source is changed in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxsplit.model.graph_io import add_default_input
from onnxsplit.model.protobuf import captured_names, defined_names, nested_graphs
from onnxsplit.model.shapes import spec_of
from onnxsplit.model.source import SourceModel

_PASSING = frozenset(["Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Flatten"])
_PRODUCTS = frozenset(["MatMul", "MatMulNBits", "FusedMatMul"])
_ELEMENTWISE = frozenset(["Identity", "Cast", "Add", "Sub", "Mul", "Div", "Tanh"])
_TO_THE_END = 2**63 - 1
_POSITIONS = 1  # the axis of the positions in hidden states, [B, S, width]


def branch_with_past(proto: onnx.ModelProto, condition: str) -> bool | None:
    """The value of a Boolean input that chooses the branch with past; None if the input chooses no branch.

    The branch with past reads more of the model's inputs than the other.
    """
    ends = {value.name for value in proto.graph.input}
    for place in _chosen_by(proto.graph, condition):
        node = proto.graph.node[place]
        reads = [len(ends & set(captured_names(_only(node, name)))) for name in ("then_branch", "else_branch")]
        return reads[0] >= reads[1]
    return None


def inlined(source: SourceModel, condition: str, value: bool) -> SourceModel:
    """The model with one branch in the place of each If that an input chooses between.

    The input stays an input, which nothing reads.

    Args:
        source: the model.
        condition: the Boolean input.
        value: its value from now on.
    """
    graph = source.proto.graph
    chosen = _chosen_by(graph, condition)
    taken = defined_names(graph)
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(graph.node):
        if number not in chosen:
            nodes.append(_copy(node))
            continue
        body = _branch(node, "then_branch" if value else "else_branch")
        renamed = _new_names(body, node, taken, f"branch{number}/")
        taken |= set(renamed.values())
        graph.initializer.extend(_renamed_tensor(tensor, renamed) for tensor in body.initializer)
        nodes += [_renamed_node(inner, renamed) for inner in body.node]
        nodes += _passed_on(body, node, renamed)
    del graph.node[:]
    graph.node.extend(nodes)
    return with_dead_nodes_last(source)


def last_positions_only(source: SourceModel, scores: str, name: str = "first-scored") -> tuple[SourceModel, str]:
    """The model with a new input that says which of the new positions is the first whose scores are computed.

    A Slice along the axis of the positions goes before the product that makes the scores. The input's default is 0.

    Args:
        source: the model.
        scores: the output with the scores.
        name: the name of the new input; it is changed if a tensor has it.

    Returns:
        The model, and the name of the input; empty if the scores are made in another way, and the model is unchanged.
    """
    graph = source.proto.graph
    product = _product(graph, scores)
    declared = next((spec_of(value) for value in graph.output if value.name == scores), None)
    if product is None or declared is None or len(declared.shape or ()) != 3:
        return source, ""
    taken = defined_names(graph)
    while name in taken:
        name += "_"
    hidden = product.input[0]
    constants = {f"{name}/end": _TO_THE_END, f"{name}/axis": _POSITIONS}
    graph.initializer.extend(numpy_helper.from_array(np.array([v], np.int64), n) for n, v in constants.items())
    cut = helper.make_node("Slice", [hidden, name, *constants], [f"{hidden}/{name}"], name=f"{name}/Slice")
    product.input[0] = cut.output[0]
    graph.node.insert(list(graph.node).index(product), cut)
    for value in graph.output:
        if value.name == scores:
            value.type.tensor_type.shape.dim[_POSITIONS].Clear()
    source = with_dead_nodes_last(source)
    return add_default_input(source, numpy_helper.from_array(np.zeros(1, np.int64), name)), name


def _chosen_by(graph: onnx.GraphProto, condition: str) -> list[int]:
    """The positions of the If ops whose condition is an input, directly or through ops that keep its value."""
    same = {condition}
    found = []
    for place, node in enumerate(graph.node):
        if node.op_type in _PASSING and node.input and node.input[0] in same:
            same.update(node.output)
        elif node.op_type == "If" and node.input[0] in same:
            found.append(place)
    return found


def _branch(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    graph: onnx.GraphProto = next(attribute.g for attribute in node.attribute if attribute.name == name)
    return graph


def _only(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    """An If op with one of its branches."""
    return onnx.NodeProto(op_type=node.op_type, attribute=[a for a in node.attribute if a.name == name])


def _new_names(body: onnx.GraphProto, node: onnx.NodeProto, taken: Iterable[str], prefix: str) -> dict[str, str]:
    """New names of what a branch defines: its outputs get the If's, and names that are taken get a prefix."""
    own = defined_names(body)
    outputs = {inner.name: outer for inner, outer in zip(body.output, node.output, strict=True) if outer}
    written = {output for inner in body.node for output in inner.output}
    renamed = {name: outputs[name] for name in outputs if name in written}
    return {name: prefix + name for name in own - renamed.keys() if name in taken} | renamed


def _passed_on(body: onnx.GraphProto, node: onnx.NodeProto, renamed: Mapping[str, str]) -> list[onnx.NodeProto]:
    """Identity ops for outputs of the If that no op of the branch writes under their name."""
    return [
        helper.make_node("Identity", [renamed.get(inner.name, inner.name)], [outer], name=f"{outer}/Identity")
        for inner, outer in zip(body.output, node.output, strict=True)
        if outer and renamed.get(inner.name) != outer
    ]


def _renamed_node(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    copy = _copy(node)
    for names in (copy.input, copy.output):
        for position, name in enumerate(names):
            names[position] = renamed.get(name, name)
    for body in nested_graphs(copy):
        _rename_captures(body, renamed)
    return copy


def _rename_captures(body: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename what a subgraph reads from outside; a name that it defines itself hides the outer one."""
    own = defined_names(body)
    outer = {old: new for old, new in renamed.items() if old not in own}
    if not outer:
        return
    nodes = [_renamed_node(node, outer) for node in body.node]
    del body.node[:]
    body.node.extend(nodes)
    for value in body.output:
        value.name = outer.get(value.name, value.name)


def _renamed_tensor(tensor: onnx.TensorProto, renamed: Mapping[str, str]) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = renamed.get(tensor.name, tensor.name)
    return copy


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _product(graph: onnx.GraphProto, scores: str) -> onnx.NodeProto | None:
    """The product with the weights that makes the scores; only ops on single elements may follow it."""
    writer = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name for tensor in graph.initializer}

    def is_constant(name: str) -> bool:
        node = writer.get(name)
        return name in stored or (node is not None and all(map(is_constant, filter(None, node.input))))

    name = scores
    while (node := writer.get(name)) is not None:
        if node.op_type in _PRODUCTS:
            fixed = all(map(is_constant, filter(None, node.input[1:])))
            return node if fixed and not is_constant(node.input[0]) else None
        moving = [name for name in node.input if name and not is_constant(name)]
        if node.op_type not in _ELEMENTWISE or len(moving) != 1:
            return None
        name = moving[0]
    return None


def with_dead_nodes_last(source: SourceModel) -> SourceModel:
    """The same model; ops that were removed from it, and may be put back, have their places at the end."""
    changes = source.io_changes
    if changes is None:
        return replace(source, in_file=False)
    end = len(source.proto.graph.node)
    moved = {end + number: changes.dead_nodes[place] for number, place in enumerate(sorted(changes.dead_nodes))}
    return replace(source, in_file=False, io_changes=replace(changes, dead_nodes=moved))
