"""The graph of a model whose calls of functions are unfolded, for looking at its ops."""

from __future__ import annotations

from dataclasses import replace

from onnxsplit.model.graph import OpGraph, build_graph
from onnxsplit.model.protobuf import all_nodes, function_key, functions_of
from onnxsplit.model.shapes import annotated, spec_of
from onnxsplit.plan import TensorSpec


def flat_graph(graph: OpGraph) -> tuple[OpGraph, dict[str, TensorSpec]]:
    """The graph without calls of model-local functions, and what inference knows of the tensors in them.

    Inputs, outputs and the other tensors of the main graph keep their names. A graph without such calls is returned as
    it is.
    """
    functions = functions_of(graph.source.proto)
    called = functions and any(function_key(n) in functions for n in all_nodes(op.node for op in graph.ops))
    if not called:
        return graph, {}
    proto = annotated(graph, {})
    del proto.graph.initializer[:]  # these lack their data
    proto.graph.initializer.extend(graph.source.proto.graph.initializer)
    known = {value.name: spec for value in proto.graph.value_info if (spec := spec_of(value)) is not None}
    return build_graph(replace(graph.source, proto=proto, in_file=False)), known
