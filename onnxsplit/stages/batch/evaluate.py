"""Evaluating the ops by which models compute shapes, on small tensors whose numbers may depend on the number of rows.

Models compute in types of limited width, and Python does not. So integers are followed within the range of int32, and
floats only if they are whole numbers that float32 holds exactly. A number beyond that counts as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from onnxsplit.stages.batch.facts import Call, Dependence, Fact, Mixes, from_front
from onnxsplit.stages.batch.linear import MOST_ELEMENTS, Linear, Undecided, Values, values

Evaluation = Callable[[Call], Values]
"""Computes the numbers that an op writes."""


def evaluate(call: Call) -> Values | None:
    """The numbers that an op writes; None if they are not known, or there are too many."""
    op = call.node.op_type
    try:
        if op == "Shape":
            return _shape(call)
        if op == "Size":
            return values([math.prod(call.dims(0))]).reshape(())
        if op not in _EVALUATIONS or any(f is not None and f.values is None for f in call.facts):
            return None
        numbers = _EVALUATIONS[op](call)
    except (Undecided, Mixes, ArithmeticError, ValueError, TypeError, LookupError, AssertionError):
        return None
    return numbers if numbers.size <= MOST_ELEMENTS else None


def _shape(call: Call) -> Values:
    dims = call.dims(0)
    start, end = call.integer("start", 0), call.integer("end", len(dims))
    return values(dims[slice(start, end)])


def _given(call: Call, index: int) -> Values:
    fact = call.facts[index]
    assert fact is not None
    assert fact.values is not None
    return fact.values


def _elementwise(function: Callable[..., object], *, exact: bool = True) -> Evaluation:
    def run(call: Call) -> Values:
        arrays = np.broadcast_arrays(*(_given(call, index) for index in range(len(call.facts))))
        shape = arrays[0].shape
        results = [function(*items) for items in zip(*(a.flat for a in arrays), strict=True)]
        return values([_exact(item) for item in results] if exact else results, shape)

    return run


def _exact(item: Any) -> Any:
    """The number itself, if it is the same in every type that :func:`~onnxsplit.stages.batch.facts.stored` follows.

    Raises:
        Undecided: the number is too large, or has a fraction.
    """
    if isinstance(item, float) and not (item.is_integer() and abs(item) <= _MOST_FLOAT):
        raise Undecided
    if isinstance(item, int) and abs(item) > _MOST_INT:
        raise Undecided
    return item


_MOST_FLOAT = 2**24
_MOST_INT = 2**31 - 1


def _divide(one: object, other: object) -> object:
    one, other = _exact(one), _exact(other)
    if isinstance(one, Linear) or isinstance(other, Linear):
        return one // other  # type: ignore[operator]
    if isinstance(one, float) or isinstance(other, float):
        return one / other  # type: ignore[operator]
    assert isinstance(one, int)
    assert isinstance(other, int)
    quotient = abs(one) // abs(other)  # ONNX rounds whole numbers towards zero
    return quotient if (one < 0) == (other < 0) else -quotient


def _rounded(function: Callable[[float], int]) -> Evaluation:
    return _elementwise(lambda item: item if isinstance(item, Linear) else float(function(item)))


def _cast(call: Call) -> Values:
    kind = np.dtype(_CASTS[call.integer("to", 0)]).kind
    convert = {"f": float, "b": bool}.get(kind, int)
    return _elementwise(lambda item: item if isinstance(item, Linear) and kind != "b" else convert(_exact(item)))(call)


_CASTS = {1: "f4", 11: "f8", 6: "i4", 7: "i8", 9: "?"}


def _concat(call: Call) -> Values:
    arrays = [_given(call, index) for index in range(len(call.facts))]
    return np.concatenate(arrays, axis=call.integer("axis", 0))


def _gather(call: Call) -> Values:
    data, indices = _given(call, 0), np.array(_given(call, 1).tolist(), dtype=np.int64)
    return np.asarray(np.take(data, indices, axis=call.integer("axis", 0)), dtype=object)


def _slice(call: Call) -> Values:
    data = _given(call, 0)
    starts, ends = call.listed("starts", 1) or [], call.listed("ends", 2) or []
    axes, steps = call.listed("axes", 3) or list(range(len(starts))), (call.listed("steps", 4) or [1] * len(starts))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = data.shape[axis]
        lowest, highest = (0, size) if step > 0 else (-1, size - 1)
        first, last = (min(max(n + size if n < 0 else n, lowest), highest) for n in (start, end))
        data = np.take(data, range(max(first, 0), last, step), axis=axis)
    return np.asarray(data, dtype=object)


def _squeeze(call: Call) -> Values:
    axes = call.listed("axes", 1)
    data = _given(call, 0)
    return data.reshape([n for n in data.shape if n != 1]) if axes is None else np.squeeze(data, axis=tuple(axes))


def _unsqueeze(call: Call) -> Values:
    return np.expand_dims(_given(call, 0), tuple(call.listed("axes", 1) or []))


def _reshape(call: Call) -> Values:
    return _given(call, 0).reshape(call.ints(1))


def _constant_of_shape(call: Call) -> Values:
    shape = call.ints(0)
    if math.prod(shape) > MOST_ELEMENTS:
        raise Undecided
    tensor = call.attribute("value")
    filler = 0.0 if tensor is None else _scalar(tensor)
    return values([filler] * math.prod(shape), tuple(shape))


def _scalar(tensor: object) -> object:
    return onnx.numpy_helper.to_array(tensor).reshape(-1)[0].item()  # type: ignore[arg-type]


def _range(call: Call) -> Values:
    start, limit, step = (call.ints(index)[0] for index in range(3))
    numbers = range(start, limit, step)
    if len(numbers) > MOST_ELEMENTS:
        raise Undecided
    return values(list(numbers))


def _expand(call: Call) -> Values:
    shape = call.ints(1)
    if math.prod(shape) > MOST_ELEMENTS:
        raise Undecided
    data = _given(call, 0)
    return np.array(np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(shape))))


def _reduce(function: Callable[[list[object]], object]) -> Evaluation:
    def run(call: Call) -> Values:
        data = _given(call, 0)
        axes = call.listed("axes", 1)
        if data.ndim > 1 or (axes is None and call.integer("noop_with_empty_axes", 0)):
            raise Undecided
        if axes is not None and [from_front(axis, data.ndim) for axis in axes] != [0] * data.ndim:
            raise Undecided
        keep = call.integer("keepdims", 1)
        return values([_exact(function([_exact(item) for item in data.flat]))], (1,) * data.ndim if keep else ())

    return run


def _product(items: list[object]) -> object:
    return math.prod(items)  # type: ignore[arg-type]


def _sum(items: list[object]) -> object:
    return sum(items)  # type: ignore[arg-type]


def _transpose(call: Call) -> Values:
    return np.transpose(_given(call, 0), call.integers("perm"))


_EVALUATIONS: dict[str, Evaluation] = {
    "Identity": lambda call: _given(call, 0),
    "Add": _elementwise(lambda a, b: _exact(a) + _exact(b)),
    "Sub": _elementwise(lambda a, b: _exact(a) - _exact(b)),
    "Mul": _elementwise(lambda a, b: _exact(a) * _exact(b)),
    "Div": _elementwise(_divide),
    "Neg": _elementwise(lambda a: -a),
    "Abs": _elementwise(lambda a: a if a >= 0 else -a),
    "Min": _elementwise(min, exact=False),
    "Max": _elementwise(max, exact=False),
    "Floor": _rounded(math.floor),
    "Ceil": _rounded(math.ceil),
    "Equal": _elementwise(lambda a, b: bool(_exact(a) == _exact(b))),
    "Less": _elementwise(lambda a, b: bool(_exact(a) < _exact(b))),
    "Greater": _elementwise(lambda a, b: bool(_exact(a) > _exact(b))),
    "LessOrEqual": _elementwise(lambda a, b: bool(_exact(a) <= _exact(b))),
    "GreaterOrEqual": _elementwise(lambda a, b: bool(_exact(a) >= _exact(b))),
    "Not": _elementwise(lambda a: not a),
    "And": _elementwise(lambda a, b: bool(a and b)),
    "Or": _elementwise(lambda a, b: bool(a or b)),
    "Where": _elementwise(lambda test, a, b: a if test else b, exact=False),
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Expand": _expand,
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(_sum),
}


def widened(call: Call) -> Fact:
    """The fact for an op that makes one copy for each row: ``Expand``, ``Tile`` and ``ConstantOfShape``.

    Its inputs are the same for every batch, except that a shape among them depends on the number of rows.

    Raises:
        Mixes: it is another op, or more than one axis depends on the number of rows.
    """
    op = call.node.op_type
    if op == "ConstantOfShape":
        return _repeated(call.numbers(0))
    if op == "Expand":
        call.others_same(1)
        shape, given = call.numbers(1), list(call.shape(0))
        copies = _repeated(shape)
        place = copies.axis - len(shape) + len(given)
        if place >= 0 and given[place] != 1:
            raise Mixes("it expands an axis that is not 1 to the number of rows")
        return Fact(Dependence.ROWS, copies.axis + max(0, len(given) - len(shape)), copies.per_row)
    if op == "Tile":
        call.others_same(1)
        copies = _repeated(call.numbers(1))
        return Fact(Dependence.ROWS, copies.axis, copies.per_row * call.shape(0)[copies.axis])
    raise Mixes("it computes with the number of rows")


def _repeated(shape: list[Linear | int]) -> Fact:
    places = [axis for axis, size in enumerate(shape) if isinstance(size, Linear)]
    if len(places) != 1:
        raise Mixes("more than one of its axes depends on the number of rows")
    size = shape[places[0]]
    assert isinstance(size, Linear)
    if size.fixed or size.per_row < 1:
        raise Mixes("one of its axes is not a multiple of the number of rows")
    return Fact(Dependence.ROWS, places[0], size.per_row)
