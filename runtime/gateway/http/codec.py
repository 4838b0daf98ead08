"""Requests and answers as HTTP carries them: JSON, and tensors as bytes behind it. Pure.

    body    | {"inputs": [{"name", "shape", "datatype", "parameters": {"binary_data_size": 8}}, ...]} | 8 bytes | ...
    header    Inference-Header-Content-Length: the length of the JSON, when bytes follow it

Source: Triton's extension for binary tensor data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import Array, dtype_name
from runtime.gateway.errors import TooLarge
from runtime.gateway.parameters import (
    MOST_JSON_BYTES,
    MOST_TENSORS,
    _flag,
    _number,
    from_region,
    region_slice_of,
    timeout_ns,
)
from runtime.gateway.protocol import (
    DATATYPES,
    InferRequest,
    Read,
    RequestedOutput,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)

Parameters = dict[str, Any]


class _Input(Struct):
    name: str
    shape: Raw
    datatype: str
    data: Raw | UnsetType = UNSET
    parameters: Raw | UnsetType = UNSET


class _Output(Struct):
    name: str
    parameters: Raw | UnsetType = UNSET


class _Body(Struct):
    inputs: list[_Input]
    outputs: list[_Output] | None = None
    id: str | None = None
    parameters: Raw | UnsetType = UNSET


_MOST_PARAMETERS_BYTES = 64 << 10  # of the JSON of a request's parameters, and of each tensor's
_MOST_SHAPE_BYTES = 4 << 10  # of the JSON of one shape
_LONG = 1 << 20
_WORDS = 500

_DECODER = msgspec.json.Decoder(_Body)
_PARAMETERS = msgspec.json.Decoder(Parameters | None)
_SHAPE = msgspec.json.Decoder(list[int])
_OURS = {"timeout", "priority", "binary_data_output", "sequence_id", "sequence_start", "sequence_end"}


def parse(body: bytes | bytearray | memoryview, header_length: int | None, read: Read) -> InferRequest:
    """A request.

    Args:
        body: the whole of it; the inputs may be views of it.
        header_length: of the JSON, when bytes follow it.
        read: gives what lies in shared memory.

    Raises:
        InputError: it is none; says where and why.
    """
    whole = memoryview(body)
    if header_length is not None and not 0 < header_length <= len(whole):
        raise InputError(f"Inference-Header-Content-Length is {header_length}, and the body has {len(whole)} bytes")
    _check_size(whole[:header_length])
    try:
        said = _DECODER.decode(whole[:header_length])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the request is not as the protocol has it: {one_line(error, _WORDS)}") from error
    rest = whole[len(whole) if header_length is None else header_length :]
    if max(len(said.inputs), len(said.outputs or ())) > MOST_TENSORS:
        raise InputError(f"the request has {len(said.inputs)} inputs; at most {MOST_TENSORS} are allowed")
    inputs: dict[str, Array] = {}
    for tensor in said.inputs:
        if tensor.name in inputs:
            raise InputError(f"input {shown(tensor.name)} is given twice")
        inputs[tensor.name], rest = _input(tensor, rest, read)
    if len(rest):
        raise InputError(f"{len(rest)} bytes follow the inputs; no input claims them as binary_data_size")
    parameters = _parameters("the parameters of the request", said.parameters)
    return InferRequest(
        id=said.id or "",
        inputs=inputs,
        wanted=tuple(_wanted(output, parameters) for output in said.outputs or ()),
        all_binary=_flag(parameters, "binary_data_output"),
        timeout_ns=timeout_ns(parameters),
        parameters={name: value for name, value in parameters.items() if name not in _OURS},
    )


def _check_size(text: memoryview) -> None:
    """Refuse a JSON that would take too long, or too much memory, to look at.

    Raises:
        TooLarge, InputError: saying what is allowed.
    """
    if len(text) > MOST_JSON_BYTES:
        raise TooLarge(
            f"the JSON of the request has {len(text)} bytes; at most {MOST_JSON_BYTES} are allowed: send tensors as "
            "binary data"
        )
    if len(text) > _LONG and (names := bytes(text).count(b'"name"')) > 2 * MOST_TENSORS:
        raise InputError(f"the request names {names} tensors; at most {MOST_TENSORS} are allowed")


def _small(what: str, text: Raw, most_bytes: int, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Decode a part of a request that has a bounded size.

    Raises:
        InputError: it is too large, or not what the decoder takes.
    """
    size = len(memoryview(text))
    if size > most_bytes:
        raise InputError(f"{what} have {size} bytes of JSON; at most {most_bytes} are allowed")
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{what} are not as the protocol has them: {one_line(error, _WORDS)}") from error


def _parameters(what: str, text: Raw | UnsetType) -> Parameters:
    """Parameters of a request or of a tensor; none given, or null, are none."""
    if text is UNSET:
        return {}
    return _small(what, text, _MOST_PARAMETERS_BYTES, _PARAMETERS) or {}


def _input(tensor: _Input, rest: memoryview, read: Read) -> tuple[Array, memoryview]:
    """An input, and the bytes that follow it."""
    name = tensor.name
    parameters = _parameters(f"the parameters of input {shown(name)}", tensor.parameters)
    shape = _small(f"the sizes in the shape of input {shown(name)}", tensor.shape, _MOST_SHAPE_BYTES, _SHAPE)
    place = region_slice_of(name, parameters)
    size = _number(parameters, "binary_data_size")
    if sum((place is not None, size is not None, tensor.data is not UNSET)) != 1:
        raise InputError(
            f"input {shown(name)} needs exactly one of: data, the parameter binary_data_size, a region of shared memory"
        )
    if place is not None:
        return from_region(name, tensor.datatype, shape, place, read), rest
    if size is not None:
        if not 0 <= size <= len(rest):
            raise InputError(
                f"input {shown(name)} claims {shown(size)} bytes of binary data, and {len(rest)} are there"
            )
        return from_bytes(name, tensor.datatype, shape, rest[:size]), rest[size:]
    assert isinstance(tensor.data, Raw)
    return from_json(name, tensor.datatype, shape, tensor.data), rest


def _wanted(output: _Output, request: Parameters) -> RequestedOutput:
    parameters = _parameters(f"the parameters of output {shown(output.name)}", output.parameters)
    classes = _number(parameters, "classification") or 0
    if classes < 0:
        raise InputError(
            f"classification of output {shown(output.name)} is {shown(classes)}; it is how many classes to give"
        )
    binary = parameters.get("binary_data", request.get("binary_data_output", False))
    return RequestedOutput(output.name, binary is True, region_slice_of(output.name, parameters), classes)


def answer(
    request: InferRequest,
    model: str,
    version: str,
    outputs: Mapping[str, Array],
    wanted: Sequence[RequestedOutput],
) -> tuple[list[bytes | memoryview], int | None]:
    """An answer: the pieces of the body, and the length of the JSON when bytes follow it.

    Outputs that go to shared memory are described only.
    """
    described: list[dict[str, Any]] = []
    pieces: list[bytes | memoryview] = []
    for output in wanted:
        array = outputs[output.name]
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": DATATYPES[dtype_name(array.dtype) or ""],
            "shape": array.shape,
        }
        if output.region_slice is None and output.binary:
            piece = to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(piece)}
            pieces.append(piece)
        elif output.region_slice is None:
            entry["data"] = to_json(output.name, array)
        described.append(entry)
    said: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        said["id"] = request.id
    head = msgspec.json.encode(said)
    return [head, *pieces], len(head) if pieces else None


def ask(inputs: Mapping[str, Array]) -> tuple[list[bytes | memoryview], int]:
    """A request as a client makes it: the pieces of the body, and the length of the JSON."""
    pieces = [to_bytes(array) for array in inputs.values()]
    said = {
        "inputs": [
            {
                "name": name,
                "datatype": DATATYPES[dtype_name(array.dtype) or ""],
                "shape": array.shape,
                "parameters": {"binary_data_size": len(piece)},
            }
            for (name, array), piece in zip(inputs.items(), pieces, strict=True)
        ]
    }
    head = msgspec.json.encode(said)
    return [head, *pieces], len(head)
