"""Pairs of an input and an output by the ops of a graph that update states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.op_slots import attribute, domain_of, state_slots
from onnxsplit.decoder.traces import Trace, joined, moved
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.plan import Shape, TensorSpec

_SCATTERS = frozenset({"ScatterElements", "ScatterND"})


def traces_of(graph: OpGraph, specs: Mapping[str, TensorSpec], inputs: Iterable[str]) -> dict[str, Trace]:
    """What each tensor is of one of the given inputs, as far as the ops say it; in one walk over the graph.

    Args:
        graph: the model.
        specs: types and shapes of tensors; those of the inputs are needed, others help.
        inputs: the inputs to follow.
    """
    constants = Constants(graph)
    shapes = {name: spec.shape for name, spec in specs.items()}
    traces: dict[str, Trace] = {}
    for name in inputs:
        shape = shapes.get(name)
        if shape is not None:
            traces[name] = Trace(name, tuple(range(len(shape))))
    for op in graph.ops:
        for output, trace in _outputs(op, traces, constants, shapes):
            if output and trace is not None:
                traces[output] = trace
    return traces


def states_by_structure(graph: OpGraph, traces: Mapping[str, Trace]) -> dict[str, dict[str, Trace]]:
    """The outputs that continue each input, with how: all of the input, in the input's own layout."""
    found: dict[str, dict[str, Trace]] = {}
    for name in graph.outputs:
        trace = traces.get(name)
        if trace is None or trace.kind is None or trace.parts:
            continue
        if all(axis in (None, place) for place, axis in enumerate(trace.axes)):
            found.setdefault(trace.source, {})[name] = trace
    return found


def passed_on(graph: OpGraph, traces: Mapping[str, Trace]) -> dict[str, str]:
    """The inputs that an output repeats unchanged, by output."""
    views = {name: trace for name in graph.outputs if (trace := traces.get(name)) is not None}
    return {name: view.source for name, view in views.items() if view.kind is None and not view.parts}


def _outputs(
    op: Op, traces: Mapping[str, Trace], constants: Constants, shapes: Mapping[str, Shape | None]
) -> Iterable[tuple[str, Trace | None]]:
    """The traces of an op's outputs."""
    given = [traces.get(name) for name in op.node.input]
    if not any(given):
        return []
    slots = state_slots(op)
    if slots:
        updated = []
        for slot in slots:
            view = given[slot.past] if slot.past < len(given) else None
            if view is not None and view.kind is None and slot.present < len(op.node.output):
                trace = view.continued(slot.kind, slot.axis, slot.batch_axis, slot.least)
                updated.append((op.node.output[slot.present], trace))
        return updated
    if domain_of(op):
        return []
    if op.op_type == "Concat":
        return [(op.node.output[0], joined(op, given))]
    first = given[0]
    if first is None:
        return []
    if op.op_type in _SCATTERS:
        return [(op.node.output[0], _scattered(op, first, shapes))]
    return zip(op.node.output, moved(op, first, constants, shapes), strict=False)


def _scattered(op: Op, view: Trace, shapes: Mapping[str, Shape | None]) -> Trace | None:
    """A buffer of which some positions are written anew, at computed places."""
    if view.kind is not None or any(a.name == "reduction" and a.s != b"none" for a in op.node.attribute):
        return None
    axis = attribute(op, "axis", 0)
    if op.op_type == "ScatterND":
        index = shapes.get(op.node.input[1])
        if not index or index[-1] != 1:
            return None
        axis = 0
    return view.continued("in-place", axis, None) if view.at(axis) is not None else None
