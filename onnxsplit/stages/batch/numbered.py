"""Rules for the numbers of rows, ``Range(0, rows)``, by which exported attention masks look up rows.

    mask[arange(batch)[:, None], places]    as    GatherND(mask, Concat(numbers, places))

Row *b* picks from row *b*, so rows stay apart. If the number of a row is used as a value, rows are mixed, because a row
has another number in a part of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from onnxsplit.stages.batch.facts import Call, Dependence, Fact, Mixes, from_front, rows
from onnxsplit.stages.batch.linear import Linear
from onnxsplit.stages.batch.moves import equal
from onnxsplit.stages.batch.rules import RULES

_MOVES = frozenset(["Cast", "Expand", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"])
_WHOLE = frozenset([onnx.TensorProto.INT32, onnx.TensorProto.INT64])  # types that hold the number of any row
_ARITHMETIC = frozenset(["Add", "Max", "Min", "Mul", "Sub"])


def numbers_of_rows(call: Call) -> Fact:
    """The fact for a ``Range`` from 0 to the number of rows.

    Raises:
        Mixes: the range is another one.
    """
    start, limit, step = (call.numbers(index)[0] for index in range(3))
    if not (equal(start, 0) and equal(limit, Linear(1)) and equal(step, 1)):
        raise Mixes("it computes with the number of rows")
    return Fact(Dependence.NUMBERS, 0)


def numbered(call: Call) -> Fact:
    """The fact for an op that reads numbers of rows.

    Raises:
        Mixes: the numbers are used as values.
    """
    op = call.node.op_type
    if op == "Cast" and call.integer("to", 0) not in _WHOLE:
        raise Mixes("it uses the numbers of rows as values")
    if op in _MOVES:
        return replace(_as_rows(call, op), kind=call.facts[0].kind)  # type: ignore[union-attr]
    if op in _ARITHMETIC:  # exporters do this to learn a shape; the result is not the number of a row any more
        return replace(_as_rows(call, op), kind=Dependence.PLACED)
    if op == "Concat":
        return _index(call)
    if op == "GatherND":
        return _picked(call)
    if op == "Gather":
        return _all(call)
    raise Mixes("it uses the numbers of rows as values")


def _as_rows(call: Call, op: str) -> Fact:
    """Apply the rule of the op as if the numbers were rows."""
    kinds = {Dependence.NUMBERS, Dependence.PLACED}
    if any(fact is not None and fact.kind is Dependence.ROWS for fact in call.facts):
        raise Mixes("it uses the numbers of rows as values")
    facts = [replace(f, kind=Dependence.ROWS) if f is not None and f.kind in kinds else f for f in call.facts]
    fact = RULES[op](replace(call, facts=facts))
    assert isinstance(fact, Fact)
    return fact


def _index(call: Call) -> Fact:
    """Indices for GatherND: first the number of the row, then numbers that the row itself gives."""
    first = call.facts[0]
    rank = call.rank(0)
    if first is None or first.kind is not Dependence.NUMBERS or from_front(call.integer("axis", 1), rank) != rank - 1:
        raise Mixes("it uses the numbers of rows as values")
    if call.shape(0)[-1] != 1 or first.axis == rank - 1:
        raise Mixes("it uses the numbers of rows as values")
    for index in range(1, len(call.facts)):
        other = call.require(index)
        if (other.axis, other.per_row) != (first.axis, first.per_row):
            raise Mixes("it joins rows that lie along different axes")
    return replace(first, kind=Dependence.INDEX)


def _picked(call: Call) -> Fact:
    """GatherND in which each row picks from itself."""
    data, index = call.require(0), call.facts[1]
    assert index is not None
    if call.integer("batch_dims", 0) or index.kind is not Dependence.INDEX or (data.axis, data.per_row) != (0, 1):
        raise Mixes("it uses the numbers of rows as values")
    return rows(index.axis, index.per_row)


def _all(call: Call) -> Fact:
    """Gather of all rows in their order."""
    data, index = call.require(0), call.facts[1]
    assert index is not None
    axis = from_front(call.integer("axis", 0), call.rank(0))
    if index.kind is not Dependence.NUMBERS or (data.axis, data.per_row) != (axis, 1) or call.rank(1) != 1:
        raise Mixes("it uses the numbers of rows as values")
    return rows(axis, index.per_row)


def about_numbers(facts: Sequence[Fact | None]) -> bool:
    """Whether an op reads numbers of rows."""
    kinds = {Dependence.NUMBERS, Dependence.PLACED, Dependence.INDEX}
    return any(fact is not None and fact.kind in kinds for fact in facts)
