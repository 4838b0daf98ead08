"""Errors in the form of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``.

status  type                        code
400     invalid_request_error       context_length_exceeded for a prompt that is too long
401     invalid_request_error       invalid_api_key
403     permission_error            forbidden
404     not_found_error             model_not_found
429     rate_limit_error            rate_limit_exceeded
503     service_unavailable_error   service_unavailable
504     timeout_error               timeout
500     server_error                internal_error
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from msgspec import Struct

from onnxsplit.errors import InputError, one_line
from runtime.errors import Busy
from runtime.gateway.errors import UnknownModel, client_message, status_of

_BUSY = 429
_KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    _BUSY: ("rate_limit_error", "rate_limit_exceeded"),
    499: ("server_error", "cancelled"),
    501: ("invalid_request_error", "not_served"),
    503: ("service_unavailable_error", "service_unavailable"),
    504: ("timeout_error", "timeout"),
}
_INTERNAL = ("server_error", "internal_error")
_FIELDS = {"tokens": "prompt", "stop_tokens": "stop_token_ids"}
"""The fields of options that have another name in this API."""
_PLACE = re.compile(r" - at `\$\.?(?P<place>[^`]*)`")
_PATHS = re.compile(r"/(v1(/.*)?|tokenize|detokenize)", re.DOTALL)
_MESSAGE_CHARACTERS = 500

T = TypeVar("T")


class FieldError(InputError):
    """A field of a request is wrong, or is not served. HTTP 400.

    Args:
        param: the field.
        message: what was found, what is allowed, and what to do.
        code: what programs know it by.
    """

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ErrorObject(Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(Struct, frozen=True):
    """The body of the answer to a request that failed, and a chunk of a stream that fails."""

    error: ErrorObject


def is_openai_path(path: str) -> bool:
    """Whether errors of requests for a path have this form."""
    return _PATHS.fullmatch(path) is not None


def http_status(error: BaseException) -> int:
    """The HTTP status of an error."""
    return _BUSY if isinstance(error, Busy) else status_of(error).http


def error_answer(error: BaseException) -> ErrorAnswer:
    """The answer for an error."""
    status = http_status(error)
    kind, code = _KINDS.get(status, _INTERNAL)
    param = None
    if isinstance(error, FieldError):
        param, code = error.param or None, error.code
    elif isinstance(error, InputError) and error.option:
        param = _FIELDS.get(error.option, error.option)
    elif isinstance(error, UnknownModel):
        param, code = "model", "model_not_found"
    return ErrorAnswer(ErrorObject(client_message(error), kind, param, code))


def status_answer(status: int, message: str) -> ErrorAnswer:
    """The answer for a status of HTTP itself, such as an unknown path."""
    kind, code = _KINDS.get(status, _INTERNAL)
    return ErrorAnswer(ErrorObject(message, kind, None, code))


def decoded(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """Decode the body of a request.

    Raises:
        FieldError: a field has a wrong type or value.
        InputError: the body is not JSON.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = one_line(error, _MESSAGE_CHARACTERS)
        place = _PLACE.search(text)
        if place is None:  # a field is missing
            missing = re.search(r"missing required field `(\w+)`", text)
            raise FieldError(missing[1] if missing else "", f"the body does not fit: {text}") from error
        raise FieldError(place["place"], f"{place['place'] or 'the body'}: {text[: place.start()]}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not JSON: {one_line(error, _MESSAGE_CHARACTERS)}") from error
