"""Models that hold two whole decoders in one ``If``: one for the first step, and one that reads the caches."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx

from onnxsplit.decoder.op_slots import domain_of
from onnxsplit.decoder.traces import Trace
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import captured_names, defined_names


def branch_input(graph: OpGraph, traces: Mapping[str, Trace], pasts: Collection[str]) -> str | None:
    """The input that chooses between two decoders.

    Args:
        graph: the model.
        traces: what tensors are of the model's inputs, see :func:`~onnxsplit.decoder.structure.traces_of`.
        pasts: the inputs that are caches, by their names.

    Returns:
        The input that decides an ``If`` that makes outputs of the model, and of which one branch reads more of the
        caches than the other; None where there is no such ``If``.
    """
    for op in graph.ops:
        if op.op_type != "If" or domain_of(op) or not op.node.input:
            continue
        decided = traces.get(op.node.input[0])
        if decided is None or decided.kind is not None or set(graph.outputs).isdisjoint(op.outputs):
            continue
        bodies = {attribute.name: attribute.g for attribute in op.node.attribute}
        then, other = (
            len(_outside(bodies[name]) & set(pasts)) if name in bodies else 0 for name in ("then_branch", "else_branch")
        )
        if then != other:
            return decided.source
    return None


def _outside(body: onnx.GraphProto) -> set[str]:
    """The names of outer tensors that a branch reads."""
    read = {name for node in body.node for name in (*node.input, *captured_names(node)) if name}
    return (read | {output.name for output in body.output}) - defined_names(body)
