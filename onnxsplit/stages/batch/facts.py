"""What is known of a tensor when a batch is split: does it carry rows, and along which axis?

A tensor carries rows when its axis is as long as ``per_row`` times the number of rows, and the part of it that belongs
to a row depends on that row of the inputs alone:

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
"""Shapes of the tensors of one graph, at one binding of the free dimensions."""


class Dependence(Enum):
    """How a tensor depends on the batch."""

    SAME = "it is the same for every batch"
    ROWS = "it carries the rows"
    NUMBERS = "its entries are the numbers of the rows, from 0"
    PLACED = "what belongs to a row depends on the number of the row"
    INDEX = "along its last axis, the number of the row comes first, and then what the row says"
    SIZE = "it depends on the number of rows alone, and its numbers are known"
    MIXED = "it cannot be split"


@dataclass(frozen=True)
class Fact:
    """What is known of one tensor.

    Attributes:
        kind: how it depends on the batch.
        axis: the axis of the rows, counted from the front, where there are rows.
        per_row: entries along that axis for each row.
        values: its numbers, where they are few and known; always for ``SIZE``.
        why: for ``MIXED``, what mixes the rows.
    """

    kind: Dependence
    axis: int = 0
    per_row: int = 1
    values: Values | None = field(default=None, compare=False)
    why: str = field(default="", compare=False)


SAME = Fact(Dependence.SAME)

HAVE_AXIS = frozenset([Dependence.ROWS, Dependence.NUMBERS, Dependence.PLACED, Dependence.INDEX])
"""Kinds of tensors that are as long as the batch along an axis."""


def rows(axis: int, per_row: int = 1) -> Fact:
    """A tensor that carries rows."""
    return Fact(Dependence.ROWS, axis, per_row)


def known(numbers: Values) -> Fact:
    """A tensor whose numbers are known."""
    return Fact(Dependence.SAME if is_plain(numbers) else Dependence.SIZE, values=numbers)


class Mixes(Exception):
    """An op mixes rows, or it cannot be told that it does not. The text says how, without the op's name."""


@dataclass(frozen=True)
class Call:
    """One op with what is known of its inputs, as its rule sees it.

    Attributes:
        node: the op.
        opset: version of its domain.
        facts: by input; None for an omitted one.
        shapes: of the inputs, None where unknown.
    """

    node: onnx.NodeProto
    opset: int
    facts: Sequence[Fact | None]
    shapes: Sequence[tuple[int, ...] | None]

    def fact(self, index: int) -> Fact | None:
        """What is known of an input; None when it is omitted."""
        return self.facts[index] if index < len(self.facts) else None

    def carries(self, index: int) -> bool:
        """True when an input carries rows."""
        fact = self.fact(index)
        return fact is not None and fact.kind is Dependence.ROWS

    def require(self, index: int) -> Fact:
        """The fact of an input that must carry rows."""
        fact = self.fact(index)
        if fact is None or fact.kind is not Dependence.ROWS:
            raise Mixes(f"input {index} does not carry the rows that other inputs carry")
        return fact

    def others_same(self, *indices: int) -> None:
        """Refuse inputs other than these that are not the same for every batch."""
        for index, fact in enumerate(self.facts):
            if index in indices or fact is None or fact.kind is Dependence.SAME:
                continue
            if fact.kind is Dependence.SIZE:
                raise Mixes("it computes with the number of rows")
            raise Mixes(f"rows reach its input {index}, from where they act on all rows")

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of an input."""
        shape, fact = self.shapes[index], self.facts[index]
        if shape is None and fact is not None and fact.values is not None:
            return tuple(fact.values.shape)
        if shape is None:
            raise Mixes(f"the shape of its input {self.node.input[index]!r} is not known")
        return shape

    def rank(self, index: int) -> int:
        """The rank of an input."""
        return len(self.shape(index))

    def dims(self, index: int) -> list[Linear | int]:
        """The shape of an input for any number of rows."""
        dims: list[Linear | int] = list(self.shape(index))
        fact = self.facts[index]
        if fact is not None and fact.kind in HAVE_AXIS:
            dims[fact.axis] = linear(fact.per_row, 0)
        return dims

    def numbers(self, index: int) -> list[Linear | int]:
        """The known numbers of an input, in order."""
        fact = self.fact(index)
        if fact is None or fact.values is None:
            raise Mixes(f"the numbers in its input {index} are not known")
        return list(fact.values.flat)

    def ints(self, index: int) -> list[int]:
        """The known numbers of an input, none of which may depend on the number of rows."""
        numbers = self.numbers(index)
        if any(isinstance(item, Linear) for item in numbers):
            raise Mixes(f"its input {index} depends on the number of rows")
        return [int(item) for item in numbers]  # type: ignore[arg-type]

    def has(self, index: int) -> bool:
        """True when an input is given."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def attribute(self, name: str, default: object = None) -> object:
        """The value of an attribute."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def integer(self, name: str, default: int) -> int:
        """The value of an integer attribute."""
        value = self.attribute(name, default)
        assert isinstance(value, int)
        return value

    def integers(self, name: str) -> list[int] | None:
        """The value of an attribute that lists integers."""
        value = self.attribute(name)
        return None if value is None else [int(item) for item in value]  # type: ignore[attr-defined]

    def listed(self, name: str, index: int) -> list[int] | None:
        """Integers that old opsets give as an attribute and new ones as an input; None when not given."""
        if self.has(index):
            return self.ints(index)
        return self.integers(name)


def from_front(axis: int, rank: int) -> int:
    """An axis, counted from the front."""
    if not -rank <= axis < max(rank, 1):
        raise Mixes(f"it names the axis {axis} of {rank}")
    return axis + rank if axis < 0 else axis


def without_values(fact: Fact) -> Fact:
    """The same, with nothing known of its numbers."""
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
"""Types of numbers that are followed; shapes are computed in no others."""


def stored(tensor: onnx.TensorProto, most: int) -> Values | None:
    """The numbers of a small stored tensor; None for a large one, one kept elsewhere, or one without numbers."""
    count = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if count > most or tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.data_type not in _FOLLOWED:
        return None
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError):
        return None
    return np.array(array.tolist(), dtype=object).reshape(array.shape)
