"""Inference requests and responses as protobuf messages. Pure.

The message types are those of ``tritonclient``; a second definition of them in one process would collide with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import Array
from runtime.gateway.errors import TooLarge
from runtime.gateway.protocol.inference import InferRequest, InferResponse, ReadRegion, SequencePlace, datatype_of
from runtime.gateway.protocol.parameters import (
    MOST_JSON_BYTES,
    MOST_TENSORS,
    from_region,
    priority,
    region_slice_of,
    requested_output,
    sequence,
    timeout_ns,
)
from runtime.gateway.protocol.tensor_data import check_count, check_rank, from_bytes, from_items, to_bytes

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_RAW_CONTENTS = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_RAW_OUTPUT = bytes([pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2])
_FIXED_BYTES = {1: 8, 5: 4}  # sizes of the fixed-size wire types
_MOST_FIELDS = 4 * MOST_TENSORS
_MESSAGE_CHARACTERS = 200
_PROTOCOL_PARAMETERS = {"timeout", "priority", "sequence_id", "sequence_start", "sequence_end"}


def parameters_of(message: Any) -> dict[str, Any]:
    """The parameters of a message as plain values."""
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in message.items()}


class SplitRequest(NamedTuple):
    """A ``ModelInferRequest`` without its ``raw_input_contents``, and those as views of the bytes."""

    message: Any
    raw: list[memoryview]


def split(whole: bytes) -> SplitRequest:
    """Parse a ``ModelInferRequest`` without copying its ``raw_input_contents``.

    Protobuf would copy them twice: into the message, and again whenever they are read.

    Raises:
        InputError: The bytes are not such a message, or it has too many fields.
        TooLarge: There are too many bytes outside ``raw_input_contents``.
    """
    view, rest, raw = memoryview(whole), [], []
    at = rest_start = fields = 0
    try:
        while at < len(view):
            start = at
            fields += 1
            key, at = _varint(view, at)
            size, at = _varint(view, at) if key & 7 in (0, 2) else (_FIXED_BYTES[key & 7], at)
            at += size if key & 7 else 0
            if at > len(view) or fields > _MOST_FIELDS:
                raise InputError(
                    f"the message has more than {_MOST_FIELDS} fields" if at <= len(view) else "the message is cut off"
                )
            if key == _RAW_CONTENTS:
                rest.append(view[rest_start:start])
                raw.append(view[at - size : at])
                rest_start = at
        rest.append(view[rest_start:])
        if (size := sum(map(len, rest))) > MOST_JSON_BYTES:
            raise TooLarge(
                f"the message has {size} bytes outside raw_input_contents; at most {MOST_JSON_BYTES} are allowed: send "
                "tensors in raw_input_contents"
            )
        return SplitRequest(pb.ModelInferRequest.FromString(b"".join(rest)), raw)
    except (DecodeError, KeyError, IndexError) as error:
        raise InputError(f"the message is not a ModelInferRequest: {one_line(error, _MESSAGE_CHARACTERS)}") from error


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number in protobuf's variable-length encoding, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, at


def sequence_of(message: Any) -> SequencePlace | None:
    """The sequence that a message belongs to, which is known before its tensors are decoded.

    Raises:
        InputError: As :func:`~runtime.gateway.protocol.parameters.sequence`.
    """
    return sequence(parameters_of(message.parameters))


def parse(message: Any, raw: Sequence[bytes | memoryview], read: ReadRegion) -> InferRequest:
    """Decode a request.

    Args:
        message: The message that :func:`split` returned.
        raw: Its ``raw_input_contents``.
        read: Reads shared memory.

    Raises:
        InputError: The message is not a valid request. The error says where and why.
    """
    if max(len(message.inputs), len(message.outputs)) > MOST_TENSORS:
        raise InputError(f"the request has {len(message.inputs)} inputs; at most {MOST_TENSORS} are allowed")
    taken = 0
    inputs: dict[str, Array] = {}
    for tensor in message.inputs:
        name = tensor.name
        check_rank(name, len(tensor.shape))
        shape = tuple(tensor.shape)
        if name in inputs:
            raise InputError(f"input {shown(name)} is given twice")
        parameters = parameters_of(tensor.parameters)
        region_slice = region_slice_of(name, parameters)
        if (raw or region_slice is not None) and tensor.HasField("contents"):
            raise InputError(f"input {shown(name)} has contents as well as bytes; give one of them")
        if region_slice is not None:
            inputs[name] = from_region(name, tensor.datatype, shape, region_slice, read)
        elif not raw:
            inputs[name] = _typed(name, tensor, shape)
        elif taken < len(raw):
            inputs[name] = from_bytes(name, tensor.datatype, shape, raw[taken])
            taken += 1
        else:
            raise InputError(f"raw_input_contents has {len(raw)} tensors, none for input {shown(name)}")
    if taken < len(raw):
        raise InputError(f"raw_input_contents has {len(raw)} tensors, and {taken} inputs take one")
    parameters = parameters_of(message.parameters)
    return InferRequest(
        id=message.id,
        inputs=inputs,
        outputs=tuple(
            requested_output(output.name, parameters_of(output.parameters), binary=True) for output in message.outputs
        ),
        timeout_ns=timeout_ns(parameters),
        priority=priority(parameters),
        sequence=sequence(parameters),
        parameters={name: value for name, value in parameters.items() if name not in _PROTOCOL_PARAMETERS},
    )


def _typed(name: str, tensor: Any, shape: tuple[int, ...]) -> Array:
    """A tensor whose elements are fields of the message instead of bytes."""
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InputError(
            f"input {shown(name)} of datatype {shown(tensor.datatype)} can only be given in raw_input_contents"
        )
    values: Sequence[Any] = getattr(tensor.contents, field)
    given = sum(len(getattr(tensor.contents, other)) for other in set(_CONTENTS.values()))
    if given != len(values):
        raise InputError(
            f"input {shown(name)} of datatype {shown(tensor.datatype)} takes its elements from {field} alone"
        )
    check_count(name, tensor.datatype, shape, len(values))
    if tensor.datatype == "BYTES":
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise InputError(f"a string of input {shown(name)} is not UTF-8: {error.reason}") from error
    return from_items(name, tensor.datatype, shape, values)


def answer(response: InferResponse) -> Any:
    """Encode a ``ModelInferResponse``. Outputs that are requested in shared memory have no contents in it."""
    message = _described(response)
    for contents in _contents(response):
        message.raw_output_contents.append(bytes(contents))
    return message


def encode(response: InferResponse) -> bytes:
    """The bytes of :func:`answer`. The outputs are copied once; protobuf would copy them three times."""
    pieces: list[bytes | memoryview] = [_described(response).SerializeToString()]
    for contents in _contents(response):
        pieces += [_RAW_OUTPUT, _as_varint(len(contents)), contents]
    return b"".join(pieces)


def _described(response: InferResponse) -> Any:
    """A response without contents."""
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for output in response.requested:
        array = response.outputs[output.name]
        message.outputs.add(name=output.name, datatype=datatype_of(array), shape=array.shape)
    return message


def _contents(response: InferResponse) -> list[bytes | memoryview]:
    return [
        b"" if output.region_slice is not None else to_bytes(response.outputs[output.name])
        for output in response.requested
    ]


def _as_varint(value: int) -> bytes:
    """A number in protobuf's variable-length encoding."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
