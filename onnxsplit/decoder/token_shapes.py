"""Shapes of hidden tensors, taken from the tokens.

Some exporters ask a hidden tensor for its shape where they need the number of rows or of new tokens. A mask that is
computed from that shape depends on the hidden tensor, so it could not be computed by each stage. The tokens have the
same two sizes, and every stage makes those for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.decoder.rewrite import with_dead_nodes_last
from onnxsplit.model.graph import build_graph
from onnxsplit.model.protobuf import defined_names
from onnxsplit.model.shapes import input_specs, specs_for
from onnxsplit.model.source import SourceModel
from onnxsplit.plan import Shape, TensorSpec

_PREFIX = "token-shape"
_NAMES = _ROWS, _NEW = "onnxsplit/rows", "onnxsplit/new"
_OF_ROWS = frozenset(["tokens", "mask", "positions", "past-length", "total-length", "last-index"])


def with_token_shapes(source: SourceModel, claim: DecoderClaim) -> SourceModel:
    """The model in which ops ask the tokens for their shape instead of hidden tensors.

    The protobuf of ``source`` is changed in place. A Shape op is replaced if each size that it returns is a number, the
    number of rows, or that of new tokens. The roles of the inputs say which of their sizes are these; the names that
    the model declares do not, because some are wrong.
    """
    graph = build_graph(source)
    tokens, shapes = _by_roles(claim, input_specs(graph))
    named = shapes.get(tokens, ())
    if len(named) != 2:
        return source
    if _straighten(source, shapes, specs_for(graph, shapes)):
        graph = build_graph(source)
    specs = specs_for(graph, shapes)
    given = {*graph.inputs, *graph.constants}
    proto = source.proto.graph
    prefix = _free_name(proto)
    parts = _Parts(prefix, tokens)
    nodes: list[onnx.NodeProto] = []
    for node in proto.node:
        dims = _asked(node, specs) if node.op_type == "Shape" and node.input[0] not in given else None
        if dims and all(isinstance(dim, int) or dim in _NAMES for dim in dims) and any(dim in _NAMES for dim in dims):
            nodes.append(parts.concatenated(dims, node.output[0]))
        else:
            nodes.append(_copied(node))
    if not parts.nodes:
        return source
    del proto.node[:]
    proto.node.extend([*parts.nodes.values(), *nodes])
    proto.initializer.extend(parts.constants.values())
    return with_dead_nodes_last(source)


def _straighten(source: SourceModel, shapes: Mapping[str, Shape], specs: Mapping[str, TensorSpec]) -> bool:
    """Replace a Reshape of the tokens or positions that leaves their shape as it is; whether there is one.

    Some exporters write ``ids.view(-1, ids.shape[-1])``. Inference does not see that the first size stays.
    """
    found = False
    for node in source.proto.graph.node:
        if node.op_type == "Reshape" and shapes.get(node.input[0]) == _NAMES:
            after = specs.get(node.output[0])
            if after is not None and after.shape is not None and len(after.shape) == 2 and after.shape[1] == _NEW:
                same = helper.make_node("Identity", node.input[:1], node.output, name=node.name)
                node.CopyFrom(same)
                found = True
    return found


def _by_roles(claim: DecoderClaim, specs: Mapping[str, TensorSpec]) -> tuple[str, dict[str, Shape]]:
    """The input with the tokens, and the shapes of all inputs of known rank, with names only where the role says so."""
    shapes: dict[str, list[int | str]] = {
        name: [dim if isinstance(dim, int) else f"{name}/{axis}" for axis, dim in enumerate(spec.shape)]
        for name, spec in specs.items()
        if spec.shape is not None
    }

    def name(tensor: str, axis: int, size: str) -> None:
        if axis < len(shapes.get(tensor, ())) and isinstance(shapes[tensor][axis], str):
            shapes[tensor][axis] = size

    tokens = ""
    for control in claim.controls:
        rank = len(shapes.get(control.input, ()))
        if control.role in _OF_ROWS and (rank == 2 or control.role not in ("tokens", "mask", "positions")):
            name(control.input, 0, _ROWS)
        if control.role in ("tokens", "positions") and rank:
            name(control.input, rank - 1, _NEW)
        tokens = control.input if control.role == "tokens" else tokens
    for state in claim.states:
        name(state.past, state.batch_axis, _ROWS)
    return tokens, {name: tuple(shape) for name, shape in shapes.items()}


class _Parts:
    """The sizes of the tokens and of fixed dimensions, each as a tensor with one element."""

    def __init__(self, prefix: str, tokens: str) -> None:
        self._prefix, self._tokens = prefix, tokens
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.constants: dict[str, onnx.TensorProto] = {}

    def concatenated(self, dims: Sequence[int | str], output: str) -> onnx.NodeProto:
        """An op that writes some sizes in one row."""
        return helper.make_node("Concat", [self._size(dim) for dim in dims], [output], name=f"{output}/sizes", axis=0)

    def _size(self, dim: int | str) -> str:
        if isinstance(dim, int):
            return self._constant(f"{self._prefix}/{dim}", dim)
        whole = f"{self._prefix}/all"
        self.nodes.setdefault(whole, helper.make_node("Shape", [self._tokens], [whole], name=whole))
        axis = _NAMES.index(dim)
        size = f"{self._prefix}/size{axis}"
        place = self._constant(f"{self._prefix}/axis{axis}", axis)
        self.nodes.setdefault(size, helper.make_node("Gather", [whole, place], [size], name=size))
        return size

    def _constant(self, name: str, value: int) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.array([value], np.int64), name))
        return name


def _asked(node: onnx.NodeProto, specs: Mapping[str, TensorSpec]) -> Sequence[int | str] | None:
    """The sizes that a Shape op returns; None if the rank is not known."""
    spec = specs.get(node.input[0])
    if node.domain not in ("", "ai.onnx") or spec is None or spec.shape is None:
        return None
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    return spec.shape[slice(ends.get("start"), ends.get("end"))]


def _free_name(graph: onnx.GraphProto) -> str:
    taken, name = defined_names(graph), _PREFIX
    while any(known.startswith(f"{name}/") for known in taken):
        name += "_"
    return name


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
