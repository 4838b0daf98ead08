"""Narrow borders: a float32 tensor crosses between stages in fewer bits, by standard ops inside the stages.

    a stage that writes x: ... -> x -> Cast -> x.float16        one that reads x: x.float16 -> Cast -> x -> ...

``float16`` casts: values above 65504 become infinities. ``int8`` rounds to 255 steps for each block of 64 values:

    step    = max |x| / 127 of the block                  scale: float32, one for each block
    number  = round(x / step), from -127 to 127           reader: number * step

A block lies within one row: it never holds values of two rows of a batch, so rows stay independent. A row is padded to
whole blocks, and the padding does not cross. A block with a NaN or an infinity has the scale NaN, so all its values
become NaN at the reader; they are never wrong silently. The runtime sees ordinary tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsplit.model.protobuf import nested_graphs
from onnxsplit.model.shapes import value_info
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.plan_borders import Form
from onnxsplit.tensors import Array

BLOCK = 64
"""Values that share a scale."""

_STEPS = np.float32(1 / 127)
_LEAST_STEP = np.float32(1.2e-38)  # above the denormal numbers: a block of zeros divides by it
_FLOAT16_OPSET, _INT8_OPSET = 6, 11  # the first ones with Cast to a number of a type, and with Round and Pad by inputs
_ALLOWZERO_OPSET = 14  # the first one whose Reshape can keep a dimension of size zero anywhere


@dataclass(frozen=True)
class NarrowTensor:
    """A tensor that crosses in a narrower form.

    Attributes:
        tensor: its name.
        form: ``float16`` or ``int8``.
        wire: the names of the tensors that cross instead.
        spec: its type and shape.
        rows: the number of leading axes that no block of ``int8`` crosses.
    """

    tensor: str
    form: Form
    wire: tuple[str, ...]
    spec: TensorSpec
    rows: int = 1

    @property
    def wire_specs(self) -> dict[str, TensorSpec]:
        """Types and shapes of the tensors that cross instead. The first one has the tensor's shape."""
        first = TensorSpec(dtype=self.form, shape=self.spec.shape, batch_axis=self.spec.batch_axis)
        rest = TensorSpec(dtype="float32", shape=("?", 1))
        return {self.wire[0]: first} | dict.fromkeys(self.wire[1:], rest)


def forms_offered(opset: int | None, shape: Shape | None, rows: int) -> tuple[Form, ...]:
    """The narrower forms that a tensor can cross in.

    Args:
        opset: the version of ONNX's own ops in the model; None if it imports none.
        shape: the tensor's shape; None if the rank is unknown.
        rows: the number of leading axes that no block may cross.
    """
    forms: list[Form] = []
    if opset is not None and opset >= _FLOAT16_OPSET:
        forms.append("float16")
    if opset is not None and opset >= _INT8_OPSET and shape is not None and len(shape) > rows:
        forms.append("int8")
    return tuple(forms)


def wire_bytes(form: Form, size: Sequence[int], rows: int) -> tuple[int, ...]:
    """Bytes of each of the tensors that cross for a float32 tensor of this size."""
    count = math.prod(size)
    if form != "int8":
        return ((4 if form == "float32" else 2) * count,)
    row = math.prod(size[rows:])
    return (count, 4 * math.prod(size[:rows]) * -(-row // BLOCK))


def round_trip(form: Form, array: Array, rows: int) -> Array:
    """A tensor as its readers get it."""
    with np.errstate(over="ignore", invalid="ignore"):
        if form == "float16":
            return array.astype(np.float16).astype(np.float32)
        if not array.size:
            return array
        scaled, step = _scaled(array, rows)
        scale = step + np.float32(0) * scaled.sum(axis=1, keepdims=True)
        return _unpadded(np.rint(np.nan_to_num(scaled)) * scale, array, rows)


def numbers(array: Array, rows: int) -> Array:
    """The numbers of a tensor that is not empty, as they cross in the form ``int8``."""
    with np.errstate(invalid="ignore"):
        return _unpadded(np.rint(np.nan_to_num(_scaled(array, rows)[0])).astype(np.int8), array, rows)


def _scaled(array: Array, rows: int) -> tuple[Array, Array]:
    """The blocks of a tensor, a row for each, in steps of theirs; and the steps."""
    flat = array.reshape(math.prod(array.shape[:rows]), -1)
    blocks = np.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK))).reshape(-1, BLOCK)
    step = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) * _STEPS, _LEAST_STEP)
    return blocks / step, step


def _unpadded(blocks: Array, array: Array, rows: int) -> Array:
    """Blocks as a tensor of the shape of ``array``."""
    count = math.prod(array.shape[:rows])
    back = blocks.reshape(count, -1)[:, : array.size // count]
    return np.ascontiguousarray(back).reshape(array.shape)


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Every name of a tensor in a graph and in the bodies of its ops."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    names |= {tensor.name for tensor in graph.initializer}
    names |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        names.update((*node.input, *node.output))
        for body in nested_graphs(node):
            names |= names_in(body)
    return names


def wire_names(tensor: str, form: Form, taken: Collection[str]) -> tuple[str, ...]:
    """New names for the tensors that cross instead of a tensor."""
    first = _free(f"{tensor}.{form}", taken)
    return (first,) if form == "float16" else (first, _free(f"{tensor}.scale", taken))


def narrow_stage(
    model: onnx.ModelProto,
    written: Sequence[NarrowTensor],
    read: Sequence[NarrowTensor],
    taken: Collection[str],
) -> None:
    """Let a stage write and read some tensors in narrower forms; the protobuf is changed in place.

    The stage still writes each tensor in full too, for callers that request it.

    Args:
        model: the stage.
        written: the tensors that it writes.
        read: the tensors that it reads.
        taken: the names that new tensors inside the stage must not have.
    """
    used = {*taken, *(name for narrow in (*written, *read) for name in narrow.wire)}
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = model.graph
    before: list[onnx.NodeProto] = []
    for narrow in read:
        place = next(number for number, value in enumerate(graph.input) if value.name == narrow.tensor)
        values = [value_info(name, spec) for name, spec in narrow.wire_specs.items()]
        inputs = [*graph.input[:place], *values, *graph.input[place + 1 :]]
        del graph.input[:]
        graph.input.extend(inputs)
        before += _Ops(narrow, opset, used).reader()
    nodes = [*before, *graph.node]
    for narrow in written:
        graph.output.extend(value_info(name, spec) for name, spec in narrow.wire_specs.items())
        nodes += _Ops(narrow, opset, used).writer()
    del graph.node[:]
    graph.node.extend(nodes)


class _Ops:
    """Makes the ops that convert one tensor."""

    def __init__(self, narrow: NarrowTensor, opset: int, used: set[str]) -> None:
        self._narrow, self._opset, self._used = narrow, opset, used
        self._nodes: list[onnx.NodeProto] = []

    def writer(self) -> list[onnx.NodeProto]:
        """The ops from the tensor to those that cross."""
        tensor, wire = self._narrow.tensor, self._narrow.wire
        if self._narrow.form == "float16":
            self._add("Cast", [tensor], wire[0], to=TensorProto.FLOAT16)
            return self._nodes
        flat = tensor if self._whole_blocks else self._padded(tensor)
        blocks = self._add("Reshape", [flat, self._numbers(-1, BLOCK)])
        largest = self._reduced("ReduceMax", 18, self._add("Abs", [blocks]))
        step = self._add("Mul", [largest, self._float(_STEPS)])
        step = self._add("Max", [step, self._float(_LEAST_STEP)])
        scaled = self._add("Div", [blocks, step])
        # NaN where the block has a NaN or an infinity, else 0
        nothing = self._add("Mul", [self._reduced("ReduceSum", 13, scaled), self._float(np.float32(0))])
        self._add("Add", [step, nothing], wire[1])
        numbers = self._add("Cast", [self._add("Round", [scaled])], to=TensorProto.INT8)
        self._restored(numbers, flat, tensor, wire[0])
        return self._nodes

    def reader(self) -> list[onnx.NodeProto]:
        """The ops from the tensors that cross to the tensor."""
        tensor, wire = self._narrow.tensor, self._narrow.wire
        numbers = self._add("Cast", [wire[0]], None if len(wire) > 1 else tensor, to=TensorProto.FLOAT)
        if self._narrow.form == "float16":
            return self._nodes
        flat = numbers if self._whole_blocks else self._padded(numbers)
        blocks = self._add("Reshape", [flat, self._numbers(-1, BLOCK)])
        self._restored(self._add("Mul", [blocks, wire[1]]), flat, wire[0], tensor)
        return self._nodes

    @property
    def _whole_blocks(self) -> bool:
        """Whether a row surely has a whole number of blocks."""
        count = 1
        for size in reversed((self._narrow.spec.shape or ())[self._narrow.rows :]):
            if not isinstance(size, int):
                return False
            count *= size
            if count and count % BLOCK == 0:
                return True
        return False

    def _padded(self, tensor: str) -> str:
        """The tensor as one row for each entry along the leading axes, with zeros up to a whole number of blocks."""
        flat = self._add("Flatten", [tensor], axis=self._narrow.rows)
        missing = self._add("Mod", [self._add("Neg", [self._width(flat)]), self._numbers(BLOCK)])
        pads = self._add("Concat", [self._numbers(0, 0, 0), missing], axis=0)
        return self._add("Pad", [flat, pads])

    def _restored(self, blocks: str, flat: str, like: str, out: str) -> None:
        """Give blocks the shape of a tensor, without the padding of ``flat``."""
        if not self._whole_blocks:
            rows = self._shaped(blocks, flat)
            width = self._width(self._add("Flatten", [like], axis=self._narrow.rows))
            blocks = self._add("Slice", [rows, self._numbers(0), width, self._numbers(1)])
        self._shaped(blocks, like, out)

    def _shaped(self, tensor: str, like: str, out: str | None = None) -> str:
        keeps_zeros = {"allowzero": 1} if self._opset >= _ALLOWZERO_OPSET else {}
        return self._add("Reshape", [tensor, self._add("Shape", [like])], out, **keeps_zeros)

    def _width(self, flat: str) -> str:
        """The size of the second axis, as a tensor with one number."""
        return self._add("Slice", [self._add("Shape", [flat]), self._numbers(1), self._numbers(2)])

    def _reduced(self, op_type: str, axes_are_input: int, blocks: str) -> str:
        """One value for each block."""
        if self._opset >= axes_are_input:
            return self._add(op_type, [blocks, self._numbers(1)], keepdims=1)
        return self._add(op_type, [blocks], axes=[1], keepdims=1)

    def _numbers(self, *numbers: int) -> str:
        return self._constant(np.array(numbers, np.int64))

    def _float(self, value: np.float32) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: Array) -> str:
        return self._add("Constant", [], value=numpy_helper.from_array(array))

    def _add(self, op_type: str, inputs: Sequence[str], out: str | None = None, **attributes: Any) -> str:
        """Add an op; returns the name of its output."""
        name = _free(f"{self._narrow.tensor}.{self._narrow.form}.op{len(self._nodes)}", self._used)
        self._used.add(name)
        self._nodes.append(helper.make_node(op_type, inputs, [out or name], name=name, **attributes))
        return out or name


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the first free one that begins with it."""
    return next(one for one in _numbered(name) if one not in taken)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}.{number}"
        number += 1
