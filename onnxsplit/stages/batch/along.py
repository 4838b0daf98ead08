"""Rules for ops that reduce, normalise, sort or accumulate along some axes, which must not be the axis of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from onnxsplit.stages.batch.combine import first_alone, together
from onnxsplit.stages.batch.facts import Call, Fact, Mixes, from_front, rows


def softmax(call: Call) -> Fact:
    """Softmax and its relatives work along one axis; before opset 13, along this axis and all that follow."""
    fact = first_alone(call)
    axis = from_front(call.integer("axis", -1 if call.opset >= 13 else 1), call.rank(0))
    if fact.axis == axis or (call.opset < 13 and fact.axis > axis):
        raise Mixes("it normalises over the rows")
    return fact


def normalised(call: Call) -> Fact:
    """Layer and root mean square normalisation work along an axis and all that follow."""
    if call.carries(0) and call.require(0).axis >= from_front(call.integer("axis", -1), call.rank(0)):
        raise Mixes("it normalises over the rows")
    call.others_same(0)
    return together(call, range(len(call.facts)))


def lp_normalised(call: Call) -> Fact:
    """LpNormalization works along one axis."""
    fact = first_alone(call)
    if fact.axis == from_front(call.integer("axis", -1), call.rank(0)):
        raise Mixes("it normalises over the rows")
    return fact


def mean_variance(call: Call) -> Fact:
    """MeanVarianceNormalization works along listed axes; by default, axis 0 is one of them."""
    fact = first_alone(call)
    if fact.axis in [from_front(axis, call.rank(0)) for axis in call.integers("axes") or [0, 2, 3]]:
        raise Mixes("it normalises over the rows")
    return fact


def skip_normalised(call: Call) -> Fact:
    """SkipLayerNormalization of com.microsoft adds two inputs and normalises along the last axis."""
    fact = together(call, [0, 1])
    if fact.axis >= call.rank(0) - 1:
        raise Mixes("it normalises over the rows")
    return fact


def reduced(call: Call) -> Fact:
    """Reductions work along listed axes, or along all axes if none are listed."""
    call.others_same(0)
    fact = call.require(0)
    axes = call.listed("axes", 1)
    if not axes:
        if call.integer("noop_with_empty_axes", 0):
            return fact
        raise Mixes("it reduces over all axes, including that of the rows")
    return _without(call, fact, axes)


def arg_reduced(call: Call) -> Fact:
    """ArgMax and ArgMin work along one axis."""
    return _without(call, call.require(0), [call.integer("axis", 0)])


def _without(call: Call, fact: Fact, axes: Sequence[int]) -> Fact:
    removed = {from_front(axis, call.rank(0)) for axis in axes}
    if fact.axis in removed:
        raise Mixes("it reduces over the rows")
    shift = 0 if call.integer("keepdims", 1) else sum(axis < fact.axis for axis in removed)
    return rows(fact.axis - shift, fact.per_row)


def top_k(call: Call) -> Fact:
    """TopK sorts along one axis."""
    call.others_same(0)
    fact = call.require(0)
    if fact.axis == from_front(call.integer("axis", -1), call.rank(0)):
        raise Mixes("it sorts the rows")
    return rows(fact.axis, fact.per_row)


def cumulative(call: Call) -> Fact:
    """CumSum adds up along one axis."""
    call.others_same(0)
    fact = call.require(0)
    if fact.axis == from_front(call.ints(1)[0], call.rank(0)):
        raise Mixes("it adds up over the rows")
    return rows(fact.axis, fact.per_row)
