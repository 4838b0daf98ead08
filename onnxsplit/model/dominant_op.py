"""The dominant op of a model that cannot be cut: an If, Loop, Scan or function call that holds nearly all of it."""

from __future__ import annotations

import shlex

from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.protobuf import all_nodes, called_functions, function_key, functions_of, nested_graphs

_OUTSIDE_SHARE = 10  # at least 10 ops inside for one outside count as nearly all

_ADVICE = {
    "If": "Optimum merges decoders like this (decoder_model_merged.onnx). Take the files it merged, decoder_model.onnx "
    "and decoder_with_past_model.onnx, or export again without merging (optimum-cli export onnx --no-post-process)",
    "Loop": "Export one step as a model of its own and repeat it from outside, or export with the loop unrolled",
    "Scan": "Export one step as a model of its own and repeat it from outside, or export with the loop unrolled",
}


def explain_dominant_op(graph: OpGraph) -> str | None:
    """A sentence about the op that holds nearly the whole network, and what to do; None when there is no such op."""
    if not graph.ops:
        return None
    inside = [_inside(graph, op) for op in graph.ops]
    held = max(range(len(inside)), key=inside.__getitem__)
    outside = sum(inside) - inside[held] + len(graph.ops) - 1
    if not inside[held] or outside * _OUTSIDE_SHARE > inside[held]:
        return None
    op = graph.ops[held]
    if function_key(op.node) in functions_of(graph.source.proto):
        inlined = f"onnx.inliner.inline_local_functions(onnx.load({str(graph.source.path)!r}))"
        command = shlex.quote(f"import onnx, onnx.inliner; onnx.save({inlined}, 'OUT.onnx')")
        return (
            f"nearly the whole network lies in one call of the function {op.op_type!r} (op {op.name!r}: {inside[held]} "
            f"ops; {outside} are outside), and a call runs in one stage. Put the function's ops in its place: "
            f"python -c {command}"
        )
    held_ops = [sum(1 for _ in all_nodes(body.node)) for body in nested_graphs(op.node)]
    where = "the two branches" if op.op_type == "If" else "the body"
    advice = _ADVICE.get(op.op_type, "Export the body as a model of its own")
    sizes = " and ".join(map(str, held_ops))
    return (
        f"nearly the whole network lies in {where} of one {op.op_type} (op {op.name!r}: {sizes} ops; {outside} are "
        f"outside), and an op runs in one stage with all its ops inside. {advice}"
    )


def _inside(graph: OpGraph, op: Op) -> int:
    """Number of ops in the subgraphs and functions of an op."""
    functions = functions_of(graph.source.proto)
    bodies = sum(1 for _ in all_nodes([op.node])) - 1
    return bodies + sum(1 for key in called_functions([op.node], functions) for _ in all_nodes(functions[key].node))
