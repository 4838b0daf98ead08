"""The Open Inference Protocol, independent of HTTP and gRPC: types and requests. Pure.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extensions of it (binary tensors,
classification, statistics, model configuration, system shared memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array, dtype_name

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "string": "BYTES",
}  # fmt: skip
"""The protocol's name of each ONNX type; the protocol lacks the other types."""
_ONNX = {datatype: dtype for dtype, datatype in DATATYPES.items()}


class RegionSlice(Struct, frozen=True):
    """A part of a region of shared memory: the region's name, the offset in it, and the number of bytes."""

    region: str
    offset: int
    size_bytes: int


class RequestedOutput(Struct, frozen=True):
    """An output that a client requests.

    Attributes:
        name: Name of the output.
        binary: True for bytes behind the JSON, False for JSON. gRPC always sends bytes.
        region_slice: Shared memory into which the output is written instead; None to send it.
        classes: Number of greatest entries to send, as ``value:index``, instead of the values; 0 for the values.
    """

    name: str
    binary: bool = False
    region_slice: RegionSlice | None = None
    classes: int = 0


class SequencePlace(Struct, frozen=True):
    """The place of a request in a sequence of requests, for which the server keeps the states of the model.

    Attributes:
        id: The client's name for the sequence: a number above 0, or a text.
        start: Whether the sequence starts with this request.
        end: Whether it ends with this request.
    """

    id: int | str
    start: bool = False
    end: bool = False


class InferRequest(Struct, frozen=True):
    """A request to execute a model.

    Attributes:
        id: The client's name for the request; the response repeats it.
        inputs: Arrays by input name.
        outputs: The requested outputs, in this order; empty for all outputs of the model.
        all_binary: True when outputs that are not named are requested as bytes.
        timeout_ns: Time limit for the answer; None for no limit.
        priority: 1 for the most important requests, higher numbers for others, 0 for an ordinary one.
        sequence: The sequence that the request belongs to; None for none.
        parameters: Parameters that the protocol does not define.
    """

    id: str
    inputs: dict[str, Array]
    outputs: tuple[RequestedOutput, ...] = ()
    all_binary: bool = False
    timeout_ns: int | None = None
    priority: int = 0
    sequence: SequencePlace | None = None
    parameters: dict[str, Any] = {}


class InferResponse(Struct, frozen=True):
    """A response before it is encoded.

    Attributes:
        id: The client's name for the request; may be empty.
        model: Name of the model.
        version: Number of the version.
        outputs: Arrays by output name.
        requested: The outputs that the response holds, in this order, and how.
    """

    id: str
    model: str
    version: str
    outputs: dict[str, Array]
    requested: tuple[RequestedOutput, ...]


ReadRegion = Callable[[RegionSlice], bytes | bytearray]
"""Reads a part of a region of shared memory."""


def dtype_of(name: str, datatype: str) -> str:
    """ONNX's name of one of the protocol's types. ``name`` is the tensor's, for the message.

    Raises:
        InputError: The protocol has no such type.
    """
    if datatype not in _ONNX:
        raise InputError(f"tensor {shown(name)} has datatype {shown(datatype)}; allowed: {', '.join(_ONNX)}")
    return _ONNX[datatype]


def datatype_of(array: Array) -> str:
    """The protocol's name of an array's type, which must be one of :data:`DATATYPES`."""
    return DATATYPES[dtype_name(array.dtype) or ""]
