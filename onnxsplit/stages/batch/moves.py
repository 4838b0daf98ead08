"""Rules for ops that move, slice, join and look up elements: they say where the axis of the rows goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from onnxsplit.stages.batch.facts import Call, Dependence, Fact, Mixes, from_front, rows
from onnxsplit.stages.batch.linear import Linear, Undecided, linear

_END = 10**8  # more rows than any batch has; exporters write this, or more, for "to the end"


def equal(one: object, other: object) -> bool:
    """Whether two numbers are equal for every number of rows; False if that is not decided."""
    try:
        return bool(one == other)
    except Undecided:
        return False


def transposed(call: Call) -> Fact:
    """Transpose changes the order of the axes."""
    fact = call.require(0)
    order = call.integers("perm") or list(reversed(range(call.rank(0))))
    return rows(order.index(fact.axis), fact.per_row)


def reshaped(call: Call) -> Fact:
    """Reshape: the elements before the axis of the rows must stay before it, and those after it must stay after it."""
    call.others_same(0, 1)
    dims, wanted = call.dims(0), call.numbers(1) if call.has(1) else list(call.integers("shape") or [])
    if not call.integer("allowzero", 0):
        if any(equal(size, 0) for size in wanted[len(dims) :]):
            raise Mixes("its shape does not fit")
        wanted = [dims[place] if equal(size, 0) else size for place, size in enumerate(wanted)]
    return _regrouped(call, dims, wanted)


def flattened(call: Call) -> Fact:
    """Flatten makes two axes: the axes before one axis, and the others."""
    dims, axis = call.dims(0), call.integer("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return _regrouped(call, dims, [_product(dims[:axis]), _product(dims[axis:])])


def _product(dims: Sequence[Linear | int]) -> Linear | int:
    product: Linear | int = 1
    for size in dims:
        product = product * size
    return product


def _regrouped(call: Call, dims: Sequence[Linear | int], wanted: Sequence[Linear | int]) -> Fact:
    fact = call.require(0)
    before = math.prod(d for d in dims[: fact.axis] if isinstance(d, int))
    whole = _product(dims)
    if not isinstance(whole, Linear) or whole.fixed:
        raise Mixes("its tensors have no elements, so rows cannot be followed")
    open_places = [place for place, size in enumerate(wanted) if equal(size, -1)]
    try:
        shape = list(wanted)
        if open_places:
            rest = _product([size for place, size in enumerate(wanted) if place != open_places[0]])
            shape[open_places[0]] = whole // rest
        places = [place for place, size in enumerate(shape) if isinstance(size, Linear)]
        if len(places) != 1:
            raise Mixes("it groups the rows with other axes")
        size = shape[places[0]]
        assert isinstance(size, Linear)
        ahead = _product(shape[: places[0]])
        if size.fixed or ahead != before or not equal(_product(shape), whole):
            raise Mixes("it groups the rows with other axes")
    except Undecided as error:
        raise Mixes("it groups the rows with other axes") from error
    return rows(places[0], size.per_row)


def squeezed(call: Call) -> Fact:
    """Squeeze must list its axes, because otherwise it removes the axis of the rows if there is a single row."""
    fact = call.require(0)
    axes = call.listed("axes", 1)
    if axes is None:
        raise Mixes("it removes every axis of size 1, including that of a single row")
    removed = {from_front(axis, call.rank(0)) for axis in axes}
    if fact.axis in removed:
        raise Mixes("it removes the axis of the rows")
    return rows(fact.axis - sum(axis < fact.axis for axis in removed), fact.per_row)


def unsqueezed(call: Call) -> Fact:
    """Unsqueeze inserts axes."""
    fact = call.require(0)
    axes = call.listed("axes", 1) or []
    rank = call.rank(0) + len(axes)
    new = {from_front(axis, rank) for axis in axes}
    kept = [axis for axis in range(rank) if axis not in new]
    return rows(kept[fact.axis], fact.per_row)


def expanded(call: Call) -> Fact:
    """Expand of something that carries rows: the axis of the rows must keep its length."""
    call.others_same(0, 1)
    fact, shape = call.require(0), call.numbers(1)
    rank = max(call.rank(0), len(shape))
    axis = fact.axis + rank - call.rank(0)
    place = axis - rank + len(shape)
    for other, size in enumerate(shape):
        if other == place:
            if not equal(size, 1) and not equal(size, linear(fact.per_row, 0)):
                raise Mixes("it repeats the rows")
        elif isinstance(size, Linear):
            raise Mixes("two of its axes depend on the number of rows")
    return rows(axis, fact.per_row)


def tiled(call: Call) -> Fact:
    """Tile: the axis of the rows must be repeated once."""
    call.others_same(0)
    fact = call.require(0)
    repeats = call.ints(1)
    if len(repeats) != call.rank(0) or repeats[fact.axis] != 1:
        raise Mixes("it repeats the rows")
    return rows(fact.axis, fact.per_row)


def concatenated(call: Call) -> Fact:
    """Concat: it must join along another axis, and all inputs must carry the rows."""
    carried = {(call.require(index).axis, call.require(index).per_row) for index in range(len(call.facts))}
    axis = from_front(call.integer("axis", 1), call.rank(0))
    if len(carried) != 1:
        raise Mixes("it joins rows that lie along different axes")
    where, per_row = carried.pop()
    if where == axis:
        raise Mixes("it joins tensors along the axis of the rows")
    return rows(where, per_row)


def split(call: Call) -> Fact:
    """Split must work along another axis."""
    call.others_same(0)
    fact = call.require(0)
    if fact.axis == from_front(call.integer("axis", 0), call.rank(0)):
        raise Mixes("it splits the rows")
    return rows(fact.axis, fact.per_row)


def sliced(call: Call) -> Fact:
    """Slice must keep all rows."""
    call.others_same(0, 1, 2)
    fact = call.require(0)
    if call.carries(1) or call.carries(2):
        raise Mixes("its start or end depends on the rows")
    rank = call.rank(0)
    axes = call.listed("axes", 3)
    if axes is None:
        axes = list(range(call.shape(1)[0] if call.has(1) else len(call.integers("starts") or [])))
    for place, axis in enumerate(axes):
        if from_front(axis, rank) == fact.axis:
            starts = call.numbers(1) if call.has(1) else list(call.integers("starts") or [])
            ends = call.numbers(2) if call.has(2) else list(call.integers("ends") or [])
            steps = call.ints(4) if call.has(4) else [1] * len(axes)
            full = equal(ends[place], linear(fact.per_row, 0)) or (isinstance(ends[place], int) and ends[place] >= _END)
            if starts[place] != 0 or steps[place] != 1 or not full:
                raise Mixes("it takes some of the rows")
        elif _any_size(call, place):
            raise Mixes("its start or end depends on the number of rows")
    return rows(fact.axis, fact.per_row)


def _any_size(call: Call, place: int) -> bool:
    """Whether the start or end of a slice depends on the number of rows."""
    given = [call.facts[index] for index in (1, 2) if call.has(index)]
    sizes = [fact.values for fact in given if fact is not None and fact.kind is Dependence.SIZE]
    return any(values is not None and isinstance(list(values.flat)[place], Linear) for values in sizes)


def padded(call: Call) -> Fact:
    """Pad must not add entries before or after the rows."""
    call.others_same(0)
    fact, rank = call.require(0), call.rank(0)
    pads = call.listed("pads", 1)
    if pads is None:
        raise Mixes("its padding is not known")
    axes = call.ints(3) if call.has(3) else list(range(rank))
    for place, axis in enumerate(axes):
        if from_front(axis, rank) == fact.axis and (pads[place] or pads[place + len(axes)]):
            raise Mixes("it adds entries before or after the rows")
    return rows(fact.axis, fact.per_row)


def gathered(call: Call) -> Fact:
    """Gather: rows in the data along another axis, or rows in the indices of a table."""
    axis = from_front(call.integer("axis", 0), call.rank(0))
    call.others_same(0, 1)
    if call.carries(0) and call.carries(1):
        raise Mixes("its indices and its data both carry rows")
    if call.carries(1):
        fact = call.require(1)
        if call.facts[0] is not None and call.facts[0].kind is Dependence.SIZE:
            raise Mixes("it computes with the number of rows")
        return rows(axis + fact.axis, fact.per_row)
    fact = call.require(0)
    if call.facts[1] is None or call.facts[1].kind is not Dependence.SAME:
        raise Mixes("it computes with the number of rows")
    if fact.axis == axis:
        raise Mixes("it picks rows by position")
    return rows(fact.axis + (call.rank(1) - 1 if fact.axis > axis else 0), fact.per_row)


def gathered_elements(call: Call) -> Fact:
    """GatherElements: data and indices must carry the rows along the same, other axis."""
    one, other = call.require(0), call.require(1)
    if (one.axis, one.per_row) != (other.axis, other.per_row) or one.per_row != 1:
        raise Mixes("its indices and its data both carry rows")
    if one.axis == from_front(call.integer("axis", 0), call.rank(0)):
        raise Mixes("it picks rows by position")
    return rows(one.axis)


def gathered_nd(call: Call) -> Fact:
    """GatherND: rows in batch dimensions of both, or in the indices of a table."""
    batch = call.integer("batch_dims", 0)
    if call.carries(0):
        one, other = call.require(0), call.require(1)
        if one != other or one.axis >= batch:
            raise Mixes("its indices and its data both carry rows")
        return rows(one.axis, one.per_row)
    call.others_same(1)
    fact = call.require(1)
    if fact.axis >= call.rank(1) - 1 or fact.axis < batch:
        raise Mixes("it picks entries by the position of a row")
    return rows(fact.axis, fact.per_row)


def scattered_elements(call: Call) -> Fact:
    """ScatterElements: all three must carry the rows along the same, other axis."""
    carried = [call.require(index) for index in range(3)]
    if len(set(carried)) != 1 or carried[0].axis == from_front(call.integer("axis", 0), call.rank(0)):
        raise Mixes("it writes rows by position")
    if carried[0].per_row != 1:
        raise Mixes("it writes rows by position")
    return rows(carried[0].axis)


def one_hot(call: Call) -> Fact:
    """OneHot adds an axis to those of the indices."""
    call.others_same(0)
    fact = call.require(0)
    axis = from_front(call.integer("axis", -1), call.rank(0) + 1)
    return rows(fact.axis + (axis <= fact.axis), fact.per_row)


def triangular(call: Call) -> Fact:
    """Trilu works in the last two axes."""
    call.others_same(0)
    fact = call.require(0)
    if fact.axis >= call.rank(0) - 2:
        raise Mixes("it cuts a triangle out of the rows")
    return rows(fact.axis, fact.per_row)


def einsum(call: Call) -> Fact:
    """Einsum: the rows must have one letter, the output must keep it, and no other axis may have it."""
    equation = call.attribute("equation", b"")
    assert isinstance(equation, bytes)
    left, arrow, right = equation.decode().replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation.decode() or len(terms) != len(call.facts):
        raise Mixes("its equation cannot be followed")
    letters = {terms[i][call.require(i).axis] for i in range(len(terms)) if call.carries(i)}
    counts = {call.require(i).per_row for i in range(len(terms)) if call.carries(i)}
    if len(letters) != 1 or len(counts) != 1:
        raise Mixes("it combines rows that lie along different axes")
    letter = letters.pop()
    for index, term in enumerate(terms):
        if letter in term and (not call.carries(index) or term.count(letter) > 1):
            raise Mixes("it combines rows with each other")
        if letter not in term and call.facts[index] is not None and call.facts[index].kind is not Dependence.SAME:  # type: ignore[union-attr]
            raise Mixes("it computes with the number of rows")
    if right.count(letter) != 1:
        raise Mixes("it sums over the rows")
    return rows(right.index(letter), counts.pop())


def reversed_sequence(call: Call) -> Fact:
    """ReverseSequence reverses each row along the time axis, by the lengths of the rows."""
    fact, lengths = call.require(0), call.require(1)
    if fact.axis != call.integer("batch_axis", 1) or lengths.axis != 0 or (fact.per_row, lengths.per_row) != (1, 1):
        raise Mixes("it reverses the rows")
    return rows(fact.axis)


MOVES: dict[str, Callable[[Call], Fact | Sequence[Fact]]] = {
    "Transpose": transposed,
    "Reshape": reshaped,
    "Flatten": flattened,
    "Squeeze": squeezed,
    "Unsqueeze": unsqueezed,
    "Expand": expanded,
    "Tile": tiled,
    "Concat": concatenated,
    "Split": split,
    "Slice": sliced,
    "Pad": padded,
    "Gather": gathered,
    "GatherElements": gathered_elements,
    "GatherND": gathered_nd,
    "ScatterElements": scattered_elements,
    "OneHot": one_hot,
    "Trilu": triangular,
    "Einsum": einsum,
    "ReverseSequence": reversed_sequence,
}
"""The rules of these ops by op type."""
