"""Inference requests and responses in HTTP bodies: JSON, optionally followed by tensors as bytes. Pure.

    body    | {"inputs": [{"name", "shape", "datatype", "parameters": {"binary_data_size": 8}}, ...]} | 8 bytes | ...
    header    Inference-Header-Content-Length: the length of the JSON, when bytes follow it

Source: Triton's extension for binary tensor data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import MAX_RANK, Array
from runtime.gateway.errors import TooLarge
from runtime.gateway.protocol.documents import Datatype, described
from runtime.gateway.protocol.inference import InferRequest, InferResponse, ReadRegion, RequestedOutput, datatype_of
from runtime.gateway.protocol.parameters import (
    MOST_JSON_BYTES,
    MOST_TENSORS,
    flag,
    from_region,
    priority,
    region_slice_of,
    requested_output,
    sequence,
    timeout_ns,
    whole_number,
)
from runtime.gateway.protocol.tensor_data import from_bytes, from_json, to_bytes, to_json

_Shape = Annotated[Raw, described(type="array", items={"type": "integer", "minimum": 0}, maxItems=MAX_RANK)]
_Data = Annotated[Raw, described(type="array", description="Elements in row-major order, flat or nested.")]
_Parameters = Annotated[Raw, described(type="object", additionalProperties={"type": ["string", "number", "boolean"]})]


class RequestInput(Struct):
    """An input of a request. Its elements are in data, behind the JSON, or in shared memory."""

    name: str
    shape: _Shape
    datatype: Datatype
    data: _Data | UnsetType = UNSET
    parameters: _Parameters | UnsetType = UNSET


class RequestOutput(Struct):
    """An output that a request names."""

    name: str
    parameters: _Parameters | UnsetType = UNSET


class RequestBody(Struct):
    """The JSON of an inference request. Without outputs, all outputs of the model are requested."""

    inputs: list[RequestInput]
    outputs: list[RequestOutput] | None = None
    id: str | None = None
    parameters: _Parameters | UnsetType = UNSET


class ResponseOutput(Struct):
    """An output in a response. Its elements are in data, behind the JSON, or in shared memory."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    parameters: dict[str, int] | UnsetType = UNSET
    data: _Data | UnsetType = UNSET


class ResponseBody(Struct):
    """The JSON of an inference response."""

    model_name: str
    model_version: str
    outputs: list[ResponseOutput]
    id: str | UnsetType = UNSET


_MOST_PARAMETERS_BYTES = 64 << 10  # JSON of a request's or a tensor's parameters
_MOST_SHAPE_BYTES = 4 << 10  # JSON of one shape
_LONG_BYTES = 1 << 20  # JSON whose tensors are counted before it is decoded
_MESSAGE_CHARACTERS = 500

_BODY_DECODER = msgspec.json.Decoder(RequestBody)
_PARAMETERS_DECODER = msgspec.json.Decoder(dict[str, Any] | None)
_SHAPE_DECODER = msgspec.json.Decoder(list[int])
_PROTOCOL_PARAMETERS = {
    "timeout", "priority", "binary_data_output", "sequence_id", "sequence_start", "sequence_end",
}  # fmt: skip


def parse(body: bytes | bytearray | memoryview, header_length: int | None, read: ReadRegion) -> InferRequest:
    """Decode a request.

    Args:
        body: The whole body. Inputs may be views of it.
        header_length: Length of the JSON when bytes follow it; otherwise None.
        read: Reads shared memory.

    Raises:
        InputError: The body is not a valid request. The message says where and why.
        TooLarge: The JSON is larger than allowed.
    """
    whole = memoryview(body)
    if header_length is not None and not 0 < header_length <= len(whole):
        raise InputError(f"Inference-Header-Content-Length is {header_length}, and the body has {len(whole)} bytes")
    _check_size(whole[:header_length])
    try:
        request = _BODY_DECODER.decode(whole[:header_length])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the request does not fit the protocol: {one_line(error, _MESSAGE_CHARACTERS)}") from error
    rest = whole[len(whole) if header_length is None else header_length :]
    if max(len(request.inputs), len(request.outputs or ())) > MOST_TENSORS:
        raise InputError(f"the request has {len(request.inputs)} inputs; at most {MOST_TENSORS} are allowed")
    inputs: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in inputs:
            raise InputError(f"input {shown(tensor.name)} is given twice")
        inputs[tensor.name], rest = _input(tensor, rest, read)
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the inputs; no input claims them as binary_data_size")
    parameters = _parameters("the parameters of the request", request.parameters)
    return InferRequest(
        id=request.id or "",
        inputs=inputs,
        outputs=tuple(_output(output, parameters) for output in request.outputs or ()),
        all_binary=flag(parameters, "binary_data_output"),
        timeout_ns=timeout_ns(parameters),
        priority=priority(parameters),
        sequence=sequence(parameters),
        parameters={name: value for name, value in parameters.items() if name not in _PROTOCOL_PARAMETERS},
    )


def _check_size(text: memoryview) -> None:
    """Refuse JSON that would take too much time or memory to decode.

    Raises:
        TooLarge: It has too many bytes.
        InputError: It names too many tensors.
    """
    if len(text) > MOST_JSON_BYTES:
        raise TooLarge(
            f"the JSON of the request has {len(text)} bytes; at most {MOST_JSON_BYTES} are allowed: send tensors as "
            "binary data"
        )
    if len(text) > _LONG_BYTES and (names := bytes(text).count(b'"name"')) > 2 * MOST_TENSORS:
        raise InputError(f"the request names {names} tensors; at most {MOST_TENSORS} are allowed")


def _small(what: str, text: Raw, most_bytes: int, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode a part of a request that has a bounded size.

    Raises:
        InputError: It is too large, or not what the decoder expects.
    """
    size = len(memoryview(text))
    if size > most_bytes:
        raise InputError(f"{what} have {size} bytes of JSON; at most {most_bytes} are allowed")
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{what} do not fit the protocol: {one_line(error, _MESSAGE_CHARACTERS)}") from error


def _parameters(what: str, text: Raw | UnsetType) -> dict[str, Any]:
    """Parameters of a request or of a tensor; empty when they are missing or null."""
    if text is UNSET:
        return {}
    return _small(what, text, _MOST_PARAMETERS_BYTES, _PARAMETERS_DECODER) or {}


def _input(tensor: RequestInput, rest: memoryview, read: ReadRegion) -> tuple[Array, memoryview]:
    """An input, and the bytes of the body that follow it."""
    name = tensor.name
    parameters = _parameters(f"the parameters of input {shown(name)}", tensor.parameters)
    shape = _small(f"the sizes in the shape of input {shown(name)}", tensor.shape, _MOST_SHAPE_BYTES, _SHAPE_DECODER)
    region_slice = region_slice_of(name, parameters)
    size = whole_number(parameters, "binary_data_size")
    if sum((region_slice is not None, size is not None, tensor.data is not UNSET)) != 1:
        raise InputError(
            f"input {shown(name)} needs exactly one of: data, the parameter binary_data_size, a region of shared memory"
        )
    if region_slice is not None:
        return from_region(name, tensor.datatype, shape, region_slice, read), rest
    if size is not None:
        if not 0 <= size <= len(rest):
            raise InputError(
                f"input {shown(name)} claims {shown(size)} bytes of binary data, and {len(rest)} are there"
            )
        return from_bytes(name, tensor.datatype, shape, rest[:size]), rest[size:]
    assert isinstance(tensor.data, Raw)
    return from_json(name, tensor.datatype, shape, tensor.data), rest


def _output(output: RequestOutput, request_parameters: dict[str, Any]) -> RequestedOutput:
    parameters = _parameters(f"the parameters of output {shown(output.name)}", output.parameters)
    binary = parameters.get("binary_data", request_parameters.get("binary_data_output", False))
    return requested_output(output.name, parameters, binary=binary is True)


def answer(response: InferResponse) -> tuple[list[bytes | memoryview], int | None]:
    """Encode a response. Outputs that are requested in shared memory are described only.

    Returns:
        The pieces of the body, and the length of the JSON when bytes follow it.
    """
    described_outputs: list[ResponseOutput] = []
    pieces: list[bytes | memoryview] = []
    for output in response.requested:
        array = response.outputs[output.name]
        entry = ResponseOutput(output.name, datatype_of(array), array.shape)
        if output.region_slice is None and output.binary:
            piece = to_bytes(array)
            entry.parameters = {"binary_data_size": len(piece)}
            pieces.append(piece)
        elif output.region_slice is None:
            entry.data = to_json(output.name, array)
        described_outputs.append(entry)
    body = ResponseBody(response.model, response.version, described_outputs, response.id or UNSET)
    head = msgspec.json.encode(body)
    return [head, *pieces], len(head) if pieces else None


def ask(inputs: Mapping[str, Array]) -> tuple[list[bytes | memoryview], int]:
    """Encode a request, as a client does: the pieces of the body, and the length of the JSON."""
    pieces = [to_bytes(array) for array in inputs.values()]
    tensors = [
        {
            "name": name,
            "datatype": datatype_of(array),
            "shape": array.shape,
            "parameters": {"binary_data_size": len(piece)},
        }
        for (name, array), piece in zip(inputs.items(), pieces, strict=True)
    ]
    head = msgspec.json.encode({"inputs": tensors})
    return [head, *pieces], len(head)
