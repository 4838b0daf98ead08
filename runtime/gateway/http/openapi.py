"""The HTTP side as an OpenAPI 3.1 document, for people and for tools that generate clients and tests.

The schemas are made from the types that the server decodes and encodes, and the paths from the table below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

import onnxsplit
from runtime.gateway.http.bodies import SILENCE_S
from runtime.gateway.http.codec import RequestBody, ResponseBody
from runtime.gateway.openai.errors import ErrorAnswer
from runtime.gateway.openai.objects import (
    ChatObject,
    CompletionObject,
    DetokenizeAnswer,
    ModelList,
    ModelObject,
    TokenizeAnswer,
)
from runtime.gateway.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from runtime.gateway.protocol.documents import (
    ChangeRequest,
    ErrorMessage,
    GenerateAnswer,
    GenerateRequest,
    IndexEntry,
    IndexRequest,
    Json,
    ModelMetadata,
    RegionStatus,
    RegisterRequest,
    ServerMetadata,
    Statistics,
)
from runtime.gateway.protocol.recuts import Generations, RecutDocument, RecutRequest

_ERRORS = {
    400: "The request is not valid; the message says where.",
    401: "A token is needed (only where the server was started with tokens).",
    403: "Not allowed from there: another site's page, or another host's shared memory.",
    404: "There is no such model, version or region.",
    408: f"The body stopped arriving for {SILENCE_S:g} s.",
    409: "The plan is being changed already, or cannot be changed to that one.",
    413: "The request is larger than allowed.",
    429: "Too many requests wait; try again after Retry-After.",
    500: "A stage could not execute the request, or the server has a bug.",
    501: "The protocol has this, the server does not.",
    503: "Refused for now: the queue is full, the deadline cannot be met, no node is ready, or the server is stopping.",
    504: "The request's time ran out.",
}
_ALWAYS = (401, 403)
_BODY = (400, 408, 413)
_CHANGE = (*_BODY, 404, 500, 503)
_TEXT = (404, 500, 503, 504)

_BYTES = "application/octet-stream"
_EVENTS = "text/event-stream"
_MODEL = "/v2/models/{model}"
_VERSION = f"{_MODEL}/versions/{{version}}"
_REGION = "/region/{region}"
_INFER_BODY = (
    "JSON; or, with the header Inference-Header-Content-Length, JSON of that many bytes followed by tensors as bytes."
)
_INFER_HEADERS = {
    "Inference-Header-Content-Length": {
        "description": "Length of the JSON, when tensors follow it as bytes.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    }
}


class _Operation(NamedTuple):
    """One operation: a summary, the response (a type, a media type or nothing), errors, and the type of its body.

    The response of one that ``streams`` is a stream of events, if the request asks for it.
    """

    verb: str
    path: str
    summary: str
    response: Any = None
    errors: tuple[int, ...] = ()
    body: Any = None
    error: Any = ErrorMessage
    streams: bool = False


def _text(path: str, summary: str, response: Any, body: Any, *, streams: bool = False) -> _Operation:
    """An operation of OpenAI's API with a body."""
    errors = (*_BODY, 404, 429, 500, 503, 504) if streams else (*_BODY, 404, 429, 500, 503)
    return _Operation("post", path, summary, response, errors, body, ErrorAnswer, streams)


def _refused(summary: str, *paths: str) -> list[_Operation]:
    return [_Operation(verb, path, f"{summary}: refused", None, (501,)) for path in paths for verb in ("get", "post")]


_OPERATIONS = [
    _Operation("get", "/v2", "Describe the server", ServerMetadata),
    _Operation("get", "/v2/health/live", "Say whether the process answers"),
    _Operation("get", "/v2/health/ready", "Say whether all models execute requests", None, (503,)),
    _Operation("get", "/v2/models/stats", "Give statistics of all models and their stages", Statistics),
    _Operation("post", "/v2/repository/index", "List all models", list[IndexEntry], _BODY, IndexRequest),
    *[
        operation
        for path in (_MODEL, _VERSION)
        for operation in (
            _Operation(
                "post", f"{path}/infer", "Execute a request", ResponseBody, (*_BODY, 404, 500, 503, 504), RequestBody
            ),
            _Operation(
                "post", f"{path}/generate", "Complete a text", GenerateAnswer, (*_BODY, *_TEXT), GenerateRequest
            ),
            _Operation(
                "post", f"{path}/generate_stream", "Complete a text, as server-sent events", "text/event-stream",
                (*_BODY, *_TEXT), GenerateRequest,
            ),
            _Operation("get", path, "Describe inputs and outputs", ModelMetadata, (404,)),
            _Operation("get", f"{path}/ready", "Say whether the model executes requests", None, (404, 503)),
            _Operation("get", f"{path}/config", "Give the configuration as Triton's ModelConfig", Json, (404,)),
            _Operation("get", f"{path}/stats", "Give statistics", Statistics, (404,)),
            _Operation("get", f"{path}/generations", "List the plans that have nodes", Generations, (404, 503)),
            *_refused("Trace settings", f"{path}/trace/setting"),
        )
    ],
    _Operation("post", "/v2/repository/models/{model}/load", "Load a model", None, _CHANGE, ChangeRequest),
    _Operation(
        "post", "/v2/repository/models/{model}/recut", "Change the plan of a model while it serves", RecutDocument,
        (*_CHANGE, 409), RecutRequest,
    ),
    _Operation("post", "/v2/repository/models/{model}/unload", "Unload a model", None, _CHANGE, ChangeRequest),
    _Operation(
        "post", f"/v2/systemsharedmemory{_REGION}/register", "Register a region of shared memory", None,
        (*_BODY, 404), RegisterRequest,
    ),
    *[
        operation
        for path in ("/v2/systemsharedmemory", "/v2/cudasharedmemory")
        for operation in (
            _Operation("get", f"{path}/status", "List the regions", list[RegionStatus]),
            _Operation("get", f"{path}{_REGION}/status", "Describe a region", list[RegionStatus], (404,)),
            _Operation("post", f"{path}/unregister", "Unregister all regions"),
            _Operation("post", f"{path}{_REGION}/unregister", "Unregister a region"),
        )
    ],
    _Operation("post", f"/v2/cudasharedmemory{_REGION}/register", "Refused", None, (501,)),
    *_refused("Trace settings", "/v2/trace/setting"),
    *_refused("Log settings", "/v2/logging"),
    _Operation("get", "/v1/models", "List the models that complete texts", ModelList, error=ErrorAnswer),
    _Operation("get", "/v1/models/{id}", "Describe a model", ModelObject, (404,), error=ErrorAnswer),
    _text("/v1/completions", "Complete a text", CompletionObject, CompletionRequest, streams=True),
    _text("/v1/chat/completions", "Answer a conversation", ChatObject, ChatRequest, streams=True),
    _text("/tokenize", "Give the tokens of a text", TokenizeAnswer, TokenizeRequest),
    _text("/detokenize", "Give the text of tokens", DetokenizeAnswer, DetokenizeRequest),
    _Operation("get", "/metrics", "Give metrics for Prometheus", "text/plain"),
    _Operation("get", "/openapi.json", "Give this document", Json),
    _Operation("get", "/", "Show the server in a browser", "text/html"),
    _Operation("get", "/example/{model}", "Give a request that can be sent to the model", _BYTES, (404, 500)),
]  # fmt: skip


def description(versions: Mapping[str, Sequence[str]], services: tuple[Json, Json] = ({}, {})) -> Json:
    """The OpenAPI document.

    Args:
        versions: The loaded versions of each loaded model.
        services: The paths of services, and the schemas that they refer to.
    """
    types = {one: None for op in _OPERATIONS for one in (op.response, op.body, op.error) if _is_type(one)}
    references, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(types, references, strict=True))
    paths: Json = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.verb] = _described(operation, by_type, schemas)
    numbers = sorted({number for numbers in versions.values() for number in numbers})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "onnxsplit",
            "version": onnxsplit.__version__,
            "description": "Open Inference Protocol v2 with Triton's extensions for binary tensors, configuration, "
            "statistics, the repository and system shared memory; and OpenAI's API for models that complete texts.",
        },
        "security": [{}, {"bearer": []}],
        "paths": paths | services[0],
        "components": {
            "schemas": {
                **schemas,
                **services[1],
                "Model": {"type": "string", "enum": list(versions)},
                "Version": {"type": "string", "enum": numbers},
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _is_type(response: Any) -> bool:
    return response is not None and not isinstance(response, str)


def _described(operation: _Operation, by_type: Mapping[Any, Json], schemas: Mapping[str, Json]) -> Json:
    """An operation as OpenAPI has it."""
    document: Json = {"summary": operation.summary, "responses": {}}
    if operation.errors != (501,):
        document["responses"]["200"] = _success(operation.response, by_type)
    for status in sorted({*_ALWAYS, *operation.errors}):
        document["responses"][str(status)] = {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": by_type[operation.error]}},
        }
    if names := re.findall(r"{(\w+)}", operation.path):
        document["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name]} for name in names
        ]
    if operation.body is not None:
        schema = by_type[operation.body]
        required = bool(schemas[schema["$ref"].rpartition("/")[2]].get("required"))
        document["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    if operation.streams:
        document["responses"]["200"]["content"][_EVENTS] = {}
    if operation.body is RequestBody:
        document["requestBody"]["description"] = _INFER_BODY
        document["responses"]["200"]["headers"] = _INFER_HEADERS
        document["responses"]["200"]["content"][_BYTES] = {}
    return document


def _success(response: Any, by_type: Mapping[Any, Json]) -> Json:
    document: Json = {"description": "Done."}
    if _is_type(response):
        document["content"] = {"application/json": {"schema": by_type[response]}}
    elif response is not None:
        document["content"] = {response: {} if response == _BYTES else {"schema": {"type": "string"}}}
    return document


_PATH_PARAMETERS = {
    "model": {"$ref": "#/components/schemas/Model"},
    "version": {"$ref": "#/components/schemas/Version"},
    "region": {"type": "string", "minLength": 1},
    "id": {"type": "string", "minLength": 1},
}
