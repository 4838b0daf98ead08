"""Values of the small constants that say how ops move and cut axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnxsplit.model.external_data import is_external, load_external
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import tensor_bytes
from onnxsplit.tensors import Array

_MOST_BYTES = 4096
_MOST_STEPS = 32
_VALUES = ("value_int", "value_ints", "value_float", "value_floats")
_SAME_VALUES = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"})


class Constants:
    """The constants of a graph: their shapes, and the values of small ones."""

    def __init__(self, graph: OpGraph) -> None:
        self._graph = graph
        self._values: dict[str, Array | None] = {}
        self._tensors: dict[str, onnx.TensorProto] = {
            tensor.name: tensor for tensor in graph.source.proto.graph.initializer
        }

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant that is stored in the model; None for any other tensor."""
        tensor = self._stored(name)
        return None if tensor is None else tuple(tensor.dims)

    def numbers(self, name: str) -> list[int] | None:
        """The values of a small constant as integers in one row; None if it is large, not constant, or computed."""
        array = self._value(name)
        if array is None or array.dtype.kind not in "iufb":
            return None
        flat: list[Any] = array.reshape(-1).tolist()
        return [int(value) for value in flat] if all(np.isfinite(value) for value in flat) else None

    def _stored(self, name: str) -> onnx.TensorProto | None:
        """The stored tensor of an initializer or of a Constant."""
        if name in self._tensors:
            return self._tensors[name]
        index = self._graph.producer.get(name)
        if index is None or self._graph.ops[index].op_type != "Constant":
            return None
        held: list[onnx.TensorProto] = [a.t for a in self._graph.ops[index].node.attribute if a.name == "value"]
        return held[0] if held else None

    def _value(self, name: str, steps: int = _MOST_STEPS) -> Array | None:
        """The value of a constant that is stored, or made of stored ones by few ops."""
        if name not in self._values:
            self._values[name] = self._computed(name, steps) if steps > 0 else None
        return self._values[name]

    def _computed(self, name: str, steps: int) -> Array | None:
        tensor = self._stored(name)
        if tensor is not None:
            return self._loaded(tensor)
        index = self._graph.producer.get(name)
        if index is None:
            return None
        op = self._graph.ops[index]
        if op.op_type == "Constant":
            held = next((a for a in op.node.attribute if a.name in _VALUES), None)
            return None if held is None else np.asarray(onnx.helper.get_attribute_value(held))
        if op.op_type in _SAME_VALUES and op.node.input:
            return self._value(op.node.input[0], steps - 1)
        if op.op_type == "Concat":
            parts = [self._value(part, steps - 1) for part in op.node.input]
            known = [part.reshape(-1) for part in parts if part is not None]
            whole = len(known) == len(parts) and 0 < sum(part.size for part in known) <= _MOST_BYTES
            return np.concatenate(known) if whole else None
        return None

    def _loaded(self, tensor: onnx.TensorProto) -> Array | None:
        """The value of a small tensor."""
        if tensor_bytes(tensor) > _MOST_BYTES or tensor.data_type == onnx.TensorProto.STRING:
            return None
        if is_external(tensor):
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            load_external(self._graph.source.place, [copy])
            tensor = copy
        try:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError):  # the data do not fit the shape; ONNX Runtime will refuse the model
            return None
