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

from onnxsplit.decoder.rewrite import with_dead_nodes_last
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import defined_names
from onnxsplit.model.source import SourceModel
from onnxsplit.plan import TensorSpec

_PREFIX = "token-shape"


def with_token_shapes(source: SourceModel, graph: OpGraph, tokens: str, specs: Mapping[str, TensorSpec]) -> SourceModel:
    """The model in which ops ask the tokens for their shape instead of hidden tensors.

    The protobuf of ``source`` is changed in place. A Shape op is replaced if each size that it returns is a number, or
    has the name of the tokens' first or second dimension.

    Args:
        source: the model.
        graph: its ops.
        tokens: the input with the tokens, [rows, new tokens].
        specs: types and symbolic shapes of the tensors.
    """
    named = specs[tokens].shape or ()
    if len(named) != 2 or named[0] == named[1] or not all(isinstance(dim, str) and dim != "?" for dim in named):
        return source
    given = {*graph.inputs, *graph.constants}
    proto = source.proto.graph
    prefix = _free_name(proto)
    parts = _Parts(prefix, tokens, named)
    nodes: list[onnx.NodeProto] = []
    for node in proto.node:
        dims = _asked(node, specs) if node.op_type == "Shape" and node.input[0] not in given else None
        if dims and all(isinstance(dim, int) or dim in named for dim in dims) and any(dim in named for dim in dims):
            nodes.append(parts.concatenated(dims, node.output[0]))
        else:
            nodes.append(_copied(node))
    if not parts.nodes:
        return source
    del proto.node[:]
    proto.node.extend([*parts.nodes.values(), *nodes])
    proto.initializer.extend(parts.constants.values())
    return with_dead_nodes_last(source)


class _Parts:
    """The sizes of the tokens and of fixed dimensions, each as a tensor with one element."""

    def __init__(self, prefix: str, tokens: str, named: Sequence[int | str]) -> None:
        self._prefix, self._tokens, self._named = prefix, tokens, named
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
        axis = self._named.index(dim)
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
