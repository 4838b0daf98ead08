"""What a tensor is of an input: a view of it, or the continuation of it as a state.

A *view* holds an input's elements in another layout: its axes are moved, some of it is cut away, or its type is
changed. A *continuation* is what an op that updates states makes of a view. Both are a :class:`Trace`. The ops that
only move axes turn a trace into another, so a state is found however its layout changes on its way through the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.op_slots import attribute
from onnxsplit.model.graph import Op
from onnxsplit.plan import Shape
from onnxsplit.plan_decoder import StateKind

_OPEN_END = 2**31 - 1  # exporters write the largest int32 or int64 for the end of an axis
_MOST_PARTS = 8  # parts of parts; layers of pairs of keys and values need two
_SAME_AXES = frozenset(["Identity", "Cast", "CastLike", "Dropout", "QuantizeLinear", "DequantizeLinear"])


@dataclass(frozen=True)
class Part:
    """A part of an input: the places from ``start`` to ``end`` along an axis of the input."""

    axis: int
    start: int
    end: int


@dataclass(frozen=True)
class Trace:
    """What a tensor is of an input.

    Attributes:
        source: the input.
        axes: for each axis of the tensor, the axis of the input; None for an axis that the input does not have.
        parts: what has been taken of the input, one after the other.
        kind: how the state was changed; None for a view.
        axis: the axis of the positions in the input; None where it is not known, or there is none.
        batch_axis: the axis of the rows in the input, by the op that updates the state.
        shortened: whether the oldest positions were cut away.
        most: the number of positions that are left of it at most; None where that is not a constant.
        least: the smallest size of the axis of the positions; None where any size will do.
        pieces: the number of parts that were continued one by one and put together again.
    """

    source: str
    axes: tuple[int | None, ...]
    parts: tuple[Part, ...] = ()
    kind: StateKind | None = None
    axis: int | None = None
    batch_axis: int | None = None
    shortened: bool = False
    most: int | None = None
    least: int | None = None
    pieces: int = 1

    def at(self, position: int | None) -> int | None:
        """The axis of the input at a position of the tensor's axes; None where there is none."""
        if position is None or not -len(self.axes) <= position < len(self.axes):
            return None
        return self.axes[position]

    def continued(self, kind: StateKind, axis: int | None, batch_axis: int | None, least: int | None = None) -> Trace:
        """What an op makes of this view. Both axes are counted in the tensor."""
        return replace(self, kind=kind, axis=self.at(axis), batch_axis=self.at(batch_axis), least=least)


def moved(op: Op, trace: Trace, constants: Constants, shapes: Mapping[str, Shape | None]) -> list[Trace | None]:
    """The traces of an op's outputs, where the op only moves, adds, removes or cuts axes of its first input."""
    kind = op.op_type
    if kind in _SAME_AXES:
        return [trace]
    if kind == "Transpose":
        order = _integers(op, "perm") or list(range(len(trace.axes)))[::-1]
        fits = sorted(order) == list(range(len(trace.axes)))
        return [replace(trace, axes=tuple(trace.axes[i] for i in order)) if fits else None]
    if kind == "Unsqueeze":
        return [_unsqueezed(trace, _axes(op, constants))]
    if kind == "Squeeze":
        return [_squeezed(trace, _axes(op, constants))]
    if kind == "Reshape":
        return [_reshaped(trace, shapes.get(op.node.input[0]), shapes.get(op.node.output[0]))]
    if kind == "Gather" and len(op.node.input) == 2:
        return [_gathered(op, trace, constants, shapes)]
    if kind == "Split":
        return list(_split(op, trace, constants))
    if kind == "Slice":
        return [_sliced(op, trace, constants)]
    return []


def joined(op: Op, traces: Sequence[Trace | None]) -> Trace | None:
    """The trace of a Concat's output: a view continued by new positions, or parts of one state put together again."""
    axis = attribute(op, "axis", 0)
    known = [trace for trace in traces if trace is not None]
    if known and len(known) == len(traces) and all(trace.kind for trace in known):
        return _stacked(known, axis)
    first = traces[0] if traces else None
    others = {trace.source for trace in known[1:]}
    if first is None or first.kind is not None or len(traces) < 2 or first.source in others:
        return None
    place = first.at(axis)
    if any(part.axis == place for part in first.parts) or not -len(first.axes) <= axis < len(first.axes):
        return None
    return first.continued("window" if first.shortened else "append", axis, None)


def _stacked(traces: Sequence[Trace], axis: int) -> Trace | None:
    """The whole of a state whose parts were continued one by one and are put together in their order."""
    first, taken = traces[0], [trace.parts[-1] for trace in traces if trace.parts]
    if len(taken) != len(traces) or any(
        replace(trace, parts=(*trace.parts[:-1], first.parts[-1]), pieces=first.pieces) != first for trace in traces
    ):
        return None
    places = {part.axis for part in taken}
    follows = all(one.end == other.start for one, other in pairwise(taken))
    if len(places) != 1 or taken[0].start != 0 or not follows or first.at(axis) not in (None, taken[0].axis):
        return None
    if not -len(first.axes) <= axis < len(first.axes):
        return None
    axes = list(first.axes)
    axes[axis] = taken[0].axis
    pieces = sum(trace.pieces for trace in traces)
    return replace(first, axes=tuple(axes), parts=first.parts[:-1], pieces=pieces)


def _part(trace: Trace, part: Part) -> Trace | None:
    """A part of a view."""
    return replace(trace, parts=(*trace.parts, part)) if len(trace.parts) < _MOST_PARTS else None


def _unsqueezed(trace: Trace, axes: list[int] | None) -> Trace | None:
    if axes is None:
        return None
    rank = len(trace.axes) + len(axes)
    added = {axis % rank for axis in axes if -rank <= axis < rank}
    kept = iter(trace.axes)
    if len(added) != len(axes):
        return None
    return replace(trace, axes=tuple(None if axis in added else next(kept) for axis in range(rank)))


def _squeezed(trace: Trace, axes: list[int] | None) -> Trace | None:
    rank = len(trace.axes)
    if axes is None or not all(-rank <= axis < rank for axis in axes):
        return None
    gone = {axis % rank for axis in axes}
    return replace(trace, axes=tuple(a for axis, a in enumerate(trace.axes) if axis not in gone))


def _reshaped(trace: Trace, before: Shape | None, after: Shape | None) -> Trace | None:
    """A trace through a Reshape: axes keep their meaning as far as sizes are equal from either end."""
    if after is None:
        return None
    axes: list[int | None] = [None] * len(after)
    if before is not None and len(before) == len(trace.axes):
        for i, (old, new) in enumerate(zip(before, after, strict=False)):
            if old != new or old == "?":
                break
            axes[i] = trace.axes[i]
        for i, (old, new) in enumerate(zip(before[::-1], after[::-1], strict=False)):
            if old != new or old == "?":
                break
            axes[-1 - i] = trace.axes[-1 - i]
        if len(before) == len(after) and axes.count(None) == 1:  # all others are equal, so this one is, too
            lost = axes.index(None)
            axes[lost] = trace.axes[lost]
    return replace(trace, axes=tuple(axes))


def _gathered(op: Op, trace: Trace, constants: Constants, shapes: Mapping[str, Shape | None]) -> Trace | None:
    """A view of one place along an axis, by a constant index without dimensions, which removes the axis."""
    index = constants.numbers(op.node.input[1])
    if index is None or len(index) != 1 or index[0] < 0 or shapes.get(op.node.input[1]) not in ((), None):
        return None
    axis = attribute(op, "axis", 0)
    place = trace.at(axis)
    if place is None:
        return None
    axis %= len(trace.axes)
    part = Part(place, index[0], index[0] + 1)
    return _part(replace(trace, axes=trace.axes[:axis] + trace.axes[axis + 1 :]), part)


def _split(op: Op, trace: Trace, constants: Constants) -> list[Trace | None]:
    """The views that a Split makes, which keep the axis."""
    place, count = trace.at(attribute(op, "axis", 0)), len(op.node.output)
    given = constants.numbers(op.node.input[1]) if len(op.node.input) > 1 and op.node.input[1] else None
    sizes = given or _integers(op, "split") or [1] * count  # equal sizes, whatever they are
    if place is None or len(sizes) != count:
        return [None] * count
    return [_part(trace, Part(place, end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _sliced(op: Op, trace: Trace, constants: Constants) -> Trace | None:
    """A trace through a Slice along one axis: a part of it, or all but its oldest positions."""
    given = [*op.node.input[1:], "", "", "", ""][:4]
    starts, ends, axes, steps = (constants.numbers(name) if name else None for name in given)
    if not op.node.input[1:]:  # before opset 10
        starts, ends, axes = (_integers(op, name) for name in ("starts", "ends", "axes"))
    axes = axes if axes is not None else list(range(len(starts or [0])))
    if len(axes) != 1 or (steps or [1]) != [1] or not -len(trace.axes) <= axes[0] < len(trace.axes):
        return None
    place, start = trace.at(axes[0]), starts[0] if starts else None
    if not ends or place is None:
        return None
    if ends[0] >= _OPEN_END:
        return _shortened(trace, place, start)
    if start is None or not 0 <= start < ends[0] or trace.kind is not None:
        return None
    return _part(trace, Part(place, start, ends[0]))


def _shortened(trace: Trace, place: int, start: int | None) -> Trace | None:
    """A trace whose positions before ``start`` are cut away; a start of None is computed in the run."""
    if start == 0:
        return trace
    most = -start if start is not None and start < 0 else None
    if trace.kind is None:
        return replace(trace, shortened=True, axis=place, most=most)
    if trace.kind in ("append", "window") and trace.axis == place:
        return replace(trace, kind="window", shortened=True, most=most)
    return None


def _axes(op: Op, constants: Constants) -> list[int] | None:
    """The axes of a Squeeze or an Unsqueeze, an attribute before opset 13; None where they are not constants."""
    if len(op.node.input) > 1 and op.node.input[1]:
        return constants.numbers(op.node.input[1])
    return _integers(op, "axes")


def _integers(op: Op, name: str) -> list[int] | None:
    return next((list(a.ints) for a in op.node.attribute if a.name == name), None)
