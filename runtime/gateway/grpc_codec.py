"""Requests and answers as gRPC carries them. Pure: protobuf messages in and out.

The messages are those of ``tritonclient``: a second copy of them in one process would collide with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError
from onnxsplit.tensors import Array, dtype_name
from runtime.gateway.http_codec import place_of, timeout_ns
from runtime.gateway.protocol import (
    DATATYPES,
    InferRequest,
    Read,
    Wanted,
    from_bytes,
    from_items,
    to_bytes,
)

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_OURS = {"timeout", "priority", "sequence_id", "sequence_start", "sequence_end"}


def parameters_of(message: Any) -> dict[str, Any]:
    """The parameters of a message as plain values."""
    return {name: getattr(value, value.WhichOneof("parameter_choice") or "", None) for name, value in message.items()}


def parse(message: Any, raw: Sequence[bytes], read: Read) -> InferRequest:
    """A request of a ``ModelInferRequest``.

    Args:
        message: as received.
        raw: its ``raw_input_contents``, which protobuf copies each time it is asked for them.
        read: gives what lies in shared memory.

    Raises:
        InputError: it makes no sense; says where and why.
    """
    taken = 0
    inputs: dict[str, Array] = {}
    for tensor in message.inputs:
        name, shape = tensor.name, tuple(tensor.shape)
        if name in inputs:
            raise InputError(f"input {name!r} is given twice")
        parameters = parameters_of(tensor.parameters)
        place = place_of(name, parameters)
        if place is not None:
            inputs[name] = from_bytes(name, tensor.datatype, shape, read(place))
        elif not raw:
            inputs[name] = _typed(name, tensor, shape)
        elif taken < len(raw):
            inputs[name] = from_bytes(name, tensor.datatype, shape, raw[taken])
            taken += 1
        else:
            raise InputError(f"raw_input_contents has {len(raw)} tensors, none for input {name!r}")
    if taken < len(raw):
        raise InputError(f"raw_input_contents has {len(raw)} tensors, and {taken} inputs take one")
    said = parameters_of(message.parameters)
    return InferRequest(
        id=message.id,
        inputs=inputs,
        wanted=tuple(_wanted(output) for output in message.outputs),
        timeout_ns=timeout_ns(said),
        parameters={name: value for name, value in said.items() if name not in _OURS},
    )


def _typed(name: str, tensor: Any, shape: tuple[int, ...]) -> Array:
    """A tensor whose elements are numbers of the message, not bytes."""
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InputError(f"input {name!r} of datatype {tensor.datatype!r} can only be given in raw_input_contents")
    values = list(getattr(tensor.contents, field))
    found = sum(len(getattr(tensor.contents, other)) for other in set(_CONTENTS.values()))
    if found != len(values):
        raise InputError(f"input {name!r} of datatype {tensor.datatype} takes its elements from {field} alone")
    if tensor.datatype == "BYTES":
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise InputError(f"a string of input {name!r} is not UTF-8: {error.reason}") from error
    return from_items(name, tensor.datatype, shape, values)


def _wanted(output: Any) -> Wanted:
    parameters = parameters_of(output.parameters)
    classes = parameters.get("classification") or 0
    if not isinstance(classes, int) or classes < 0:
        raise InputError(f"classification of output {output.name!r} is {classes!r}; it is how many classes to give")
    return Wanted(output.name, True, place_of(output.name, parameters), classes)


def answer(
    request: InferRequest,
    model: str,
    version: str,
    outputs: Mapping[str, Array],
    wanted: Sequence[Wanted],
) -> Any:
    """A ``ModelInferResponse``. Outputs that went to shared memory are described only, and have no contents."""
    said = pb.ModelInferResponse(model_name=model, model_version=version, id=request.id)
    for output in wanted:
        array = outputs[output.name]
        said.outputs.add(name=output.name, datatype=DATATYPES[dtype_name(array.dtype) or ""], shape=array.shape)
        if output.place is None:
            said.raw_output_contents.append(bytes(to_bytes(array)))
        else:
            said.raw_output_contents.append(b"")
    return said
