"""Places of the inputs and outputs of an ONNX Runtime session that stay from run to run."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxsplit.errors import ModelError, one_line
from onnxsplit.tensors import ONNX_TYPE_NUMBER, Array, numpy_dtype

SMALL_BYTES = 16 << 10
"""Inputs up to this size are copied to a fixed place, because every message has another address."""


class Binding:
    """The places of a session's inputs and outputs, which stay from run to run until they are bound again.

    Every input and output must be bound before the first run. Arrays are kept alive while they are bound. Large ones of
    :meth:`feed` and :meth:`fill` usually lie elsewhere in the next run; they are kept until the run has ended, and must
    be bound again before the next one.
    """

    def __init__(self, raw: Any, inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
        self._raw = raw
        self._binding = raw.io_binding()
        self._types = {**inputs, **outputs}
        self._arrays: dict[str, Array] = {}
        self._passing: list[Array] = []  # that are bound for the next run only
        self._order: dict[str, None] = {}  # the outputs in the order in which they were first bound

    def read(self, name: str, array: Array) -> None:
        """Read an input in place from a contiguous array."""
        if self._arrays.get(name) is not array:
            self._binding.bind_input(name, "cpu", 0, self._number(name), array.shape, address(array))
            self._arrays[name] = array

    def feed(self, name: str, array: Array) -> None:
        """Give an input, as a contiguous array. A small one is copied to the place that it had in the last run."""
        if array.nbytes > SMALL_BYTES:
            self.read(name, array)
            self._passing.append(self._arrays.pop(name))
            return
        kept = self._arrays.get(name)
        if kept is None or kept.shape != array.shape:
            self.read(name, np.array(array))
        elif kept is not array:
            kept[...] = array

    def read_value(self, name: str, value: Any) -> None:
        """Read an input from an output that an earlier run has returned in :meth:`made`."""
        self._arrays.pop(name, None)
        self._binding.bind_ortvalue_input(name, value)

    def write(self, name: str, array: Array) -> None:
        """Write an output in place into a contiguous array of exactly its type and shape."""
        if self._arrays.get(name) is not array:
            self._binding.bind_output(name, "cpu", 0, self._number(name), array.shape, address(array))
            self._arrays[name] = array
            self._order[name] = None

    def fill(self, name: str, array: Array) -> None:
        """Write an output as :meth:`write` does, into an array that usually lies elsewhere in the next run."""
        self.write(name, array)
        if array.nbytes > SMALL_BYTES:
            self._passing.append(self._arrays.pop(name))

    def make(self, name: str) -> None:
        """Let ONNX Runtime make the memory of an output. Call it before every run whose output is to be kept."""
        self._arrays.pop(name, None)
        self._binding.bind_output(name, "cpu")
        self._order[name] = None

    def run(self) -> None:
        """Run the model once.

        Raises:
            ModelError: ONNX Runtime could not run the model, or an output has another shape than its array.
        """
        try:
            self._raw.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ModelError(first_lines(error)) from error
        finally:
            self._passing.clear()

    def made(self) -> dict[str, Any]:
        """All outputs of the last run, as values for :meth:`read_value` and :func:`view_of`."""
        return dict(zip(self._order, self._binding.get_outputs(), strict=True))

    def _number(self, name: str) -> int:
        return ONNX_TYPE_NUMBER[self._types[name]]  # type: ignore[index]


def address(array: Array) -> int:
    """The address of an array's first byte."""
    address: int = array.__array_interface__["data"][0]
    return address


def view_of(value: Any, kind: str | None) -> Array:
    """An array in the memory of an ``OrtValue``; the value lives as long as the array."""
    assert kind is not None
    shape, dtype = value.shape(), numpy_dtype(kind)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    memory.owner = value  # type: ignore[attr-defined]
    return np.ndarray(shape, dtype, memory)  # type: ignore[arg-type]


def first_lines(error: Exception) -> str:
    """The message of an error of ONNX Runtime, as one line of bounded length."""
    text = one_line(error)
    return text if len(text) <= 600 else text[:600] + " ..."
