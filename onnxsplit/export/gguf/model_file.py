"""A model under construction: ops and small tensors in memory, large weights at once in the file of data beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxsplit.errors import ExportError
from onnxsplit.export.gguf.weights import Form, GGUFWeights
from onnxsplit.tensors import Array

MICROSOFT = "com.microsoft"
OPSET = 23
_IR_VERSION = 11
_ALIGNMENT = 64
_SMALL_BYTES = 1024  # tensors up to this size are kept in the model


class StreamedModel:
    """A model whose weights go to ``FILE.data`` as they are made. Methods add an op and return the name of its output.

    Args:
        file: the model file.
        weights: where weights are read.
    """

    def __init__(self, file: Path, weights: GGUFWeights) -> None:
        self._file, self._data = file, file.with_name(f"{file.name}.data")
        self._weights = weights
        self._size = 0  # of the data so far
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._data.touch()

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An input of the model."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        """An output of the model."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def op(self, kind: str, reads: Sequence[str], *writes: str, domain: str = "", **attributes: Any) -> str:
        """An op, named after the first tensor that it writes."""
        self._nodes.append(helper.make_node(kind, reads, writes, f"{writes[0]}/{kind}", domain=domain, **attributes))
        return writes[0]

    def constant(self, name: str, array: Array) -> str:
        """A tensor."""
        if array.nbytes <= _SMALL_BYTES:
            self._tensors[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        else:
            self.room(name, array.dtype, array.shape)[...] = array
        return name

    def norm(self, x: str, weight: str, size: int, out: str, epsilon: float) -> str:
        """Root mean square normalisation of the last axis."""
        scale = self.constant(weight, self._weights.vector(weight, size))
        return self.op("RMSNormalization", [x, scale], out, axis=-1, epsilon=epsilon)

    def rows(self, ids: str, weight: str, rows: int, columns: int, form: Form, out: str) -> str:
        """The rows of a matrix with the given numbers."""
        if form.bits is None or columns % form.block:
            return self.op("Gather", [self._floats(weight, rows, columns), ids], out)
        numbers, scales, *zeros = self._blocks(weight, rows, columns, form)
        flat = f"{weight}.rows"  # the same bytes, without an axis of blocks
        self._tensors[flat] = onnx.TensorProto(name=flat)
        self._tensors[flat].CopyFrom(self._tensors[numbers])
        self._tensors[flat].name = flat
        count, blocks, block_bytes = self._tensors[numbers].dims
        self._tensors[flat].dims[:] = [count, blocks * block_bytes]
        sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block, "bits": form.bits}
        return self.op("GatherBlockQuantized", [flat, ids, scales, *zeros], out, domain=MICROSOFT, **sizes)

    def linear(self, x: str, weight: str, rows: int, columns: int, form: Form, out: str) -> str:
        """A linear map from ``columns`` to ``rows`` numbers, with its bias where the file has one."""
        bias = f"{weight.removesuffix('weight')}bias"
        product = f"{out}/product" if bias in self._weights else out
        if form.bits is not None:
            sizes = {"K": columns, "N": rows, "bits": form.bits, "block_size": form.block, "accuracy_level": 4}
            reads = [x, *self._blocks(weight, rows, columns, form)]
            self.op("MatMulNBits", reads, product, domain=MICROSOFT, **sizes)
        elif weight in self._tensors:  # the table of the embedding, once more
            self.op("MatMul", [x, self.op("Transpose", [weight], f"{out}/weight", perm=[1, 0])], product)
        else:
            transposed = f"{weight}.transposed"
            room = self.room(transposed, np.dtype(np.float32), (columns, rows))
            for place, floats in self._weights.chunks(weight, rows, columns):
                room[:, place] = floats.T
            self.op("MatMul", [x, transposed], product)
        if bias in self._weights:
            self.op("Add", [product, self.constant(bias, self._weights.vector(bias, rows))], out)
        return out

    def save(self, name: str) -> None:
        """Write the model."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._tensors.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="onnxsplit")
        self._file.write_bytes(model.SerializeToString())

    def _floats(self, weight: str, rows: int, columns: int) -> str:
        if weight not in self._tensors:
            room = self.room(weight, np.dtype(np.float32), (rows, columns))
            for place, floats in self._weights.chunks(weight, rows, columns):
                room[place] = floats
        return weight

    def _blocks(self, weight: str, rows: int, columns: int, form: Form) -> tuple[str, ...]:
        """The numbers, the scales and maybe the zero points of a matrix; all are written once."""
        assert form.bits is not None
        names = (f"{weight}.numbers", f"{weight}.scales", f"{weight}.zeros")[: 3 if form.zeros else 2]
        if names[0] not in self._tensors:
            count = -(-columns // form.block)
            bytes_of = np.dtype(np.uint8)
            rooms = [self.room(names[0], bytes_of, (rows, count, form.block * form.bits // 8))]
            rooms.append(self.room(names[1], np.dtype(np.float32), (rows, count)))
            rooms += [self.room(name, bytes_of, (rows, count)) for name in names[2:]]
            for place, parts in self._weights.blocks(weight, rows, columns, form):
                for room, part in zip(rooms, parts, strict=True):
                    room[place] = part
        return names

    def room(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """A tensor in the file of data, as its memory map."""
        start = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        length = int(np.prod(shape)) * dtype.itemsize
        self._reserve(start, length)
        self._size = start + length
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": self._data.name, "offset": start, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor
        return np.memmap(self._data, dtype, "r+", start, shape)

    def _reserve(self, start: int, length: int) -> None:
        """Give a part of the file of data its room on the disk: a map of a full disk ends the process.

        Raises:
            ExportError: there is no room for it.
        """
        with self._data.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), start, length)
            except OSError as error:
                raise ExportError(
                    f"cannot write {length} bytes of weights to {self._data.name}: {error.strerror}; nothing was "
                    "written. Free some room, or choose another disk with -o"
                ) from error
