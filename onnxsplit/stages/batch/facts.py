"""Facts about tensors when a batch is split: whether a tensor carries rows, and along which axis.

A tensor carries rows if one of its axes is ``per_row`` times as long as the number of rows, and the part of the tensor
that belongs to a row depends on that row of the inputs only:

    axis   | row 0, 0 | row 0, 1 | row 1, 0 | row 1, 1 | ...        per_row = 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import onnx

from onnxsplit.stages.batch.linear import Linear, Values, is_plain, linear

Sizes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors of one graph by name, at one binding of the free dimensions."""


class Dependence(Enum):
    """How a tensor depends on the batch."""

    SAME = "it is the same for every batch"
    ROWS = "it carries the rows"
    NUMBERS = "its entries are the numbers of the rows, from 0"
    PLACED = "its part for each row depends on the number of the row"
    INDEX = "along its last axis, the first entry is the number of the row, and the others come from the row"
    SIZE = "it depends on the number of rows alone, and its numbers are known"
    MIXED = "it cannot be split"


@dataclass(frozen=True)
class Fact:
    """What is known about one tensor.

    Attributes:
        kind: how the tensor depends on the batch.
        axis: the axis of the rows, counted from the front, if the kind has one.
        per_row: the number of entries along that axis for each row.
        values: the tensor's numbers if they are few and known; always given for ``SIZE``.
        why: what mixes the rows, for ``MIXED``.
    """

    kind: Dependence
    axis: int = 0
    per_row: int = 1
    values: Values | None = field(default=None, compare=False)
    why: str = field(default="", compare=False)


SAME = Fact(Dependence.SAME)

HAVE_AXIS = frozenset([Dependence.ROWS, Dependence.NUMBERS, Dependence.PLACED, Dependence.INDEX])
"""The kinds of tensors that have an axis as long as the batch, or a multiple of it."""


def rows(axis: int, per_row: int = 1) -> Fact:
    """The fact of a tensor that carries rows along an axis."""
    return Fact(Dependence.ROWS, axis, per_row)


def known(numbers: Values) -> Fact:
    """The fact of a tensor whose numbers are known."""
    return Fact(Dependence.SAME if is_plain(numbers) else Dependence.SIZE, values=numbers)


class Mixes(Exception):
    """An op mixes rows, or it is not known to keep them apart. The text says how, without the op's name."""


@dataclass(frozen=True)
class Call:
    """One op with the facts of its inputs, as its rule takes it.

    Attributes:
        node: the op.
        opset: the version of its domain.
        facts: the fact of each input; None for an omitted input.
        shapes: the shape of each input; None if it is not known.
    """

    node: onnx.NodeProto
    opset: int
    facts: Sequence[Fact | None]
    shapes: Sequence[tuple[int, ...] | None]

    def fact(self, index: int) -> Fact | None:
        """The fact of an input; None if it is omitted."""
        return self.facts[index] if index < len(self.facts) else None

    def carries(self, index: int) -> bool:
        """Whether an input carries rows."""
        fact = self.fact(index)
        return fact is not None and fact.kind is Dependence.ROWS

    def require(self, index: int) -> Fact:
        """The fact of an input that must carry rows.

        Raises:
            Mixes: the input does not carry rows.
        """
        fact = self.fact(index)
        if fact is None or fact.kind is not Dependence.ROWS:
            raise Mixes(f"input {index} does not carry the rows that other inputs carry")
        return fact

    def others_same(self, *indices: int) -> None:
        """Require that all inputs except these are the same for every batch.

        Raises:
            Mixes: another input depends on the batch.
        """
        for index, fact in enumerate(self.facts):
            if index in indices or fact is None or fact.kind is Dependence.SAME:
                continue
            if fact.kind is Dependence.SIZE:
                raise Mixes("it computes with the number of rows")
            raise Mixes(f"rows reach its input {index}, which acts on all rows")

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of an input.

        Raises:
            Mixes: the shape is not known.
        """
        shape, fact = self.shapes[index], self.facts[index]
        if shape is None and fact is not None and fact.values is not None:
            return tuple(fact.values.shape)
        if shape is None:
            raise Mixes(f"the shape of its input {self.node.input[index]!r} is not known")
        return shape

    def rank(self, index: int) -> int:
        """The rank of an input; raises as :meth:`shape`."""
        return len(self.shape(index))

    def dims(self, index: int) -> list[Linear | int]:
        """The shape of an input, in which the axis of the rows depends on the number of rows."""
        dims: list[Linear | int] = list(self.shape(index))
        fact = self.facts[index]
        if fact is not None and fact.kind in HAVE_AXIS:
            dims[fact.axis] = linear(fact.per_row, 0)
        return dims

    def numbers(self, index: int) -> list[Linear | int]:
        """The known numbers of an input, in order.

        Raises:
            Mixes: the numbers are not known.
        """
        fact = self.fact(index)
        if fact is None or fact.values is None:
            raise Mixes(f"the numbers in its input {index} are not known")
        return list(fact.values.flat)

    def ints(self, index: int) -> list[int]:
        """The known numbers of an input, which must not depend on the number of rows.

        Raises:
            Mixes: the numbers are not known, or depend on the number of rows.
        """
        numbers = self.numbers(index)
        if any(isinstance(item, Linear) for item in numbers):
            raise Mixes(f"its input {index} depends on the number of rows")
        return [int(item) for item in numbers]  # type: ignore[arg-type]

    def has(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def attribute(self, name: str, default: object = None) -> object:
        """The value of an attribute, or ``default`` if the op does not have it."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def integer(self, name: str, default: int) -> int:
        """The value of an integer attribute, or ``default`` if the op does not have it."""
        value = self.attribute(name, default)
        assert isinstance(value, int)
        return value

    def integers(self, name: str) -> list[int] | None:
        """The value of an attribute that lists integers; None if the op does not have it."""
        value = self.attribute(name)
        return None if value is None else [int(item) for item in value]  # type: ignore[attr-defined]

    def listed(self, name: str, index: int) -> list[int] | None:
        """Integers that old opsets give as an attribute and new ones as an input; None if they are not given."""
        if self.has(index):
            return self.ints(index)
        return self.integers(name)


def from_front(axis: int, rank: int) -> int:
    """An axis counted from the front, for an axis that may be negative.

    Raises:
        Mixes: a tensor of this rank has no such axis.
    """
    if not -rank <= axis < max(rank, 1):
        raise Mixes(f"it names the axis {axis} of {rank}")
    return axis + rank if axis < 0 else axis


def without_values(fact: Fact) -> Fact:
    """The same fact without known numbers."""
    if fact.kind is Dependence.SIZE:
        return Fact(Dependence.MIXED, why="a body computes with the number of rows")
    return replace(fact, values=None)


_FOLLOWED = frozenset(
    [
        onnx.TensorProto.BOOL,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
    ]
)
"""Element types of the numbers that are followed; models compute shapes in no other types."""


def stored(tensor: onnx.TensorProto, most: int) -> Values | None:
    """The numbers of a stored tensor; None if it is large, is external data, or has a type that is not followed."""
    count = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if count > most or tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.data_type not in _FOLLOWED:
        return None
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError):
        return None
    return np.array(array.tolist(), dtype=object).reshape(array.shape)
