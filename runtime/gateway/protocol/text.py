"""Requests for texts, as clients of Triton's backends for language models send them. Pure.

The names of inputs and outputs are those of its vLLM backend, and of TensorRT-LLM's where that has others. A value may
come as a tensor with one element, as a parameter of the request, or in the JSON text ``sampling_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.tensors import Array
from runtime.gateway.errors import Unsupported
from runtime.gateway.openai.protocol import CompletionRequest, NotServed
from runtime.gateway.protocol.inference import InferRequest, InferResponse, RequestedOutput

TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
"""The names of the prompt and of the text."""

MOST_BYTES = 4 << 20
"""The most bytes of a request for a text."""

INPUTS = {
    TEXT_INPUT: "BYTES",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
    "sampling_parameters": "BYTES",
    "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
    "max_tokens": "INT32",
    "min_tokens": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "random_seed": "UINT64",
    "stop_words": "BYTES",
}
"""The inputs and their datatypes. All but the prompt are optional."""

OUTPUTS = {
    TEXT_OUTPUT: "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""The outputs and their datatypes. All but the text are there only if the request asks for them."""

_FLAGS = [name for name, datatype in INPUTS.items() if datatype == "BOOL"]
_OTHER_NAMES = {"random_seed": "seed", "stop_words": "stop", "min_length": "min_tokens"}
_NOT_HERE = {"model", "prompt", "echo", "stream_options", "logprobs", "response_format"}  # of a completion's fields
_KNOWN = {*CompletionRequest.__struct_fields__} - _NOT_HERE
_SERVED = sorted(_KNOWN - {*NotServed.__struct_fields__} - {"best_of", "n", "stream"})
_EMPTY: tuple[object, ...] = (None, "", [], [""])
_MESSAGE_CHARACTERS = 300


class TextRequest(Struct, frozen=True):
    """A request for a text.

    Attributes:
        id: the client's name for it.
        completion: what is to be completed, and how.
        stream: whether the text is sent as it comes.
        prepend: whether the text begins with the prompt.
        reports: the outputs wanted besides the text.
    """

    id: str
    completion: CompletionRequest
    stream: bool
    prepend: bool
    reports: frozenset[str]


class TextAnswer(Struct, frozen=True):
    """A part of a text, or all of it.

    Attributes:
        text: the new text.
        reason: why it has ended; None if it continues.
        prompt_tokens: the number of tokens of the prompt.
        tokens: the number of new tokens.
    """

    text: str
    reason: str | None
    prompt_tokens: int
    tokens: int


def of_tensors(request: InferRequest) -> TextRequest:
    """The request that tensors and parameters describe. An output that it names is reported as if its flag were set.

    Raises:
        InputError: as :func:`of_values`, or a tensor has not exactly one element, or there is no output of a name.
        Unsupported: an output is to be written into shared memory.
    """
    values = {name: _value(name, array) for name, array in request.inputs.items()}
    unknown = [output.name for output in request.outputs if output.name not in OUTPUTS]
    if unknown:
        raise InputError(f"a text has no output {shown(unknown[0])}; it has {', '.join(OUTPUTS)}")
    if any(output.region_slice is not None for output in request.outputs):
        raise Unsupported("a text cannot be written into shared memory; let the response hold it")
    if request.sequence is not None:
        raise InputError("a text does not belong to a sequence; leave sequence_id out")
    text = of_values(values, request.parameters, request.id)
    if request.timeout_ns is not None:
        text.completion.timeout = min(request.timeout_ns / 1e9, text.completion.timeout or math.inf)
    return replace(text, reports=text.reports | {output.name for output in request.outputs})


def _value(name: str, array: Array) -> Any:
    values = array.reshape(-1).tolist()
    if name == "stop_words":
        return values
    if len(values) != 1:
        raise InputError(f"input {shown(name)} has the shape {list(array.shape)}; it takes one element")
    return values[0]


def of_values(values: Mapping[str, Any], parameters: Mapping[str, Any], request_id: str = "") -> TextRequest:
    """The request that named values describe.

    Args:
        values: the inputs.
        parameters: the parameters of the request. Where ``sampling_parameters`` is given, only flags are taken from
            them.
        request_id: the client's name for the request.

    Raises:
        InputError: the prompt is missing, a name is unknown, or a value is not allowed.
    """
    rest = dict(values)
    prompt = rest.pop(TEXT_INPUT, None)
    if not isinstance(prompt, str) or not prompt:
        raise InputError(f"{TEXT_INPUT} must be one text that is not empty, but it is {shown(prompt)}")
    given = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    flags = {name: _flag(name, rest.pop(name, given.pop(name, None))) for name in _FLAGS}
    sampling = rest.pop("sampling_parameters", None)
    fields = {**(given if sampling is None else _decoded(sampling)), **rest}
    stream, exclude = bool(flags["stream"]), flags["exclude_input_in_output"]
    if stream and exclude is False:
        raise InputError("exclude_input_in_output is false, but a stream never repeats the prompt; leave it out")
    return TextRequest(
        id=request_id,
        completion=_completion(prompt, fields),
        stream=stream,
        prepend=not stream and not exclude,
        reports=frozenset(name for name in OUTPUTS if flags.get(f"return_{name}")),
    )


def _flag(name: str, value: object) -> bool | None:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if value is None or isinstance(value, bool):
        return value
    raise InputError(f"{name} must be true or false, not {shown(value)}")


def _decoded(text: object) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text if isinstance(text, str) else "", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        reason = one_line(error, _MESSAGE_CHARACTERS)
        raise InputError(f"sampling_parameters must be the text of a JSON object: {reason}") from error


def _completion(prompt: str, fields: Mapping[str, Any]) -> CompletionRequest:
    """The request of OpenAI's API that asks for the same. Numbers may be texts, as clients of Triton send them."""
    named = {_OTHER_NAMES.get(name, name): value for name, value in fields.items() if value not in _EMPTY}
    unknown = [name for name in named if name not in _KNOWN]
    if unknown:
        raise InputError(f"{shown(unknown[0])} is not served for texts; served are {', '.join(_SERVED)}")
    try:
        completion = msgspec.convert({**named, "prompt": prompt}, CompletionRequest, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"an option of the text does not fit: {one_line(error, _MESSAGE_CHARACTERS)}") from error
    completion.check()
    if completion.choices > 1:
        raise InputError(f"n is {completion.choices}; a request of this protocol gets one text")
    return completion


def response(request: TextRequest, answer: TextAnswer, model: str, version: str) -> InferResponse:
    """The response with a part of a text."""
    arrays: dict[str, Array] = {
        TEXT_OUTPUT: np.array([answer.text], dtype=object),
        "finish_reason": np.array([str(answer.reason)], dtype=object),
        "num_input_tokens": np.array([answer.prompt_tokens], dtype=np.uint32),
        "num_output_tokens": np.array([answer.tokens], dtype=np.uint32),
    }
    outputs = {name: array for name, array in arrays.items() if name == TEXT_OUTPUT or name in request.reports}
    requested = tuple(RequestedOutput(name, True) for name in outputs)
    return InferResponse(request.id, model, version, outputs, requested)
