"""The HTTP side described as OpenAPI 3.1, for people and for tools that make clients and tests of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxsplit
from onnxsplit.tensors import MAX_RANK
from runtime.gateway.http.bodies import SILENCE_S
from runtime.gateway.protocol import DATATYPES

Json = dict[str, Any]

_ERRORS = {
    400: "The request makes no sense; the message says where.",
    401: "A token is needed (only where the server was started with tokens).",
    403: "Not from there: another site's page, another host's shared memory.",
    404: "No such model, version or region.",
    408: f"The body stopped arriving for {SILENCE_S:g} s.",
    413: "Larger than allowed.",
    500: "A stage could not execute the request, or the server has a bug.",
    501: "The protocol has it, this server has not.",
    503: "Refused now: no room, no hope to be in time, no node, or the end is near. Try again.",
    504: "The request's time ran out.",
}


def description(versions: Mapping[str, Sequence[str]]) -> Json:
    """The document.

    Args:
        versions: of each model that is loaded.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "onnxsplit",
            "version": onnxsplit.__version__,
            "description": "Open Inference Protocol v2 with Triton's extensions for binary tensors, configuration, "
            "statistics, the repository and system shared memory.",
        },
        "security": [{}, {"bearer": []}],
        "paths": _paths(),
        "components": {
            "schemas": {
                **_SCHEMAS,
                "Model": {"type": "string", "enum": list(versions)},
                "Version": {"type": "string", "enum": sorted({n for numbers in versions.values() for n in numbers})},
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths() -> Json:
    paths: Json = {
        "/v2": {"get": _operation("The server", _of("Server"))},
        "/v2/health/live": {"get": _operation("Whether the process answers", None)},
        "/v2/health/ready": {"get": _operation("Whether all models execute requests", None, 503)},
        "/v2/models/stats": {"get": _operation("Counts of all models and their stages", _of("Statistics"))},
        "/v2/repository/index": {
            "post": _operation(
                "All models", {"type": "array", "items": _of("Entry")}, *_BODY, body={"schema": _of("IndexRequest")}
            )
        },
    }
    for part in ("", "/versions/{version}"):
        place = f"/v2/models/{{model}}{part}"
        given: tuple[str, ...] = ("model", "version") if part else ("model",)
        infer = _operation("Run a request", _of("Answer"), 404, 500, 503, 504, *_BODY, given=given)
        infer["responses"]["200"]["headers"] = {
            "Inference-Header-Content-Length": {
                "description": "Length of the JSON, when tensors follow it as bytes.",
                "schema": {"type": "string", "pattern": "^[0-9]+$"},
            }
        }
        infer["responses"]["200"]["content"]["application/octet-stream"] = {}
        infer["requestBody"] = {
            "required": True,
            "description": "JSON; or, with the header Inference-Header-Content-Length, JSON of that many bytes and "
            "tensors behind it.",
            "content": {"application/json": {"schema": _of("Request")}},
        }
        paths[f"{place}/infer"] = {"post": infer}
        paths[place] = {"get": _operation("Inputs and outputs", _of("Metadata"), 404, given=given)}
        paths[f"{place}/ready"] = {"get": _operation("Whether it executes requests", None, 404, 503, given=given)}
        paths[f"{place}/config"] = {"get": _operation("As Triton's ModelConfig", {"type": "object"}, 404, given=given)}
        paths[f"{place}/stats"] = {"get": _operation("Counts", _of("Statistics"), 404, given=given)}
        paths[f"{place}/trace/setting"] = _absent("Trace settings", given)
    for verb in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": _operation(
                f"{verb.capitalize()} a model", None, 404, 500, 503, *_BODY, given=("model",),
                body={"schema": {"type": "object"}},
            )
        }  # fmt: skip
    paths["/v2/systemsharedmemory/region/{region}/register"] = {
        "post": _operation(
            "Name a region of shared memory", None, 404, *_BODY, given=("region",), body={"schema": _of("Region")}
        )
    }
    for kind in ("system", "cuda"):
        for part in ("", "/region/{region}"):
            place = f"/v2/{kind}sharedmemory{part}"
            given = ("region",) if part else ()
            regions = {"type": "array", "items": {"type": "object"}}
            paths[f"{place}/status"] = {
                "get": _operation("The regions", regions, *([404] if part else []), given=given)
            }
            paths[f"{place}/unregister"] = {"post": _operation("Forget regions", None, given=given)}
    paths["/v2/cudasharedmemory/region/{region}/register"] = {
        "post": _operation("Refused", None, 501, given=("region",))
    }
    paths["/v2/trace/setting"] = _absent("Trace settings")
    paths["/v2/logging"] = _absent("Log settings")
    paths["/metrics"] = {"get": _text("For Prometheus", "text/plain")}
    paths["/openapi.json"] = {"get": _operation("This document", {"type": "object"})}
    paths["/"] = {"get": _text("A page to look at", "text/html")}
    paths["/example/{model}"] = {
        "get": _operation("A request that can be sent to it", None, 404, 500, given=("model",))
    }
    paths["/example/{model}"]["get"]["responses"]["200"]["content"] = {"application/octet-stream": {}}
    return paths


_BODY = (400, 408, 413)


def _operation(
    summary: str, schema: Json | None, *errors: int, given: tuple[str, ...] = (), body: Json | None = None
) -> Json:
    found: Json = {"summary": summary, "responses": {"200": {"description": "Done."}}}
    if schema is not None:
        found["responses"]["200"]["content"] = {"application/json": {"schema": schema}}
    for status in sorted({401, 403, *errors}):
        found["responses"][str(status)] = {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": _of("Error")}},
        }
    if given:
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _GIVEN[name]} for name in given]
    if body is not None:
        needed = "$ref" in body["schema"] and bool(_SCHEMAS[body["schema"]["$ref"].rpartition("/")[2]]["required"])
        found["requestBody"] = {"required": needed, "content": {"application/json": body}}
    return found


def _absent(summary: str, given: tuple[str, ...] = ()) -> Json:
    refused = {verb: _operation(f"{summary}: refused", None, 501, given=given) for verb in ("get", "post")}
    for operation in refused.values():
        del operation["responses"]["200"]
    return refused


def _text(summary: str, media: str) -> Json:
    found = _operation(summary, None)
    found["responses"]["200"]["content"] = {media: {"schema": {"type": "string"}}}
    return found


def _of(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...] = (), **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


_GIVEN = {"model": _of("Model"), "version": _of("Version"), "region": {"type": "string", "minLength": 1}}
_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_DATATYPE: Json = {"type": "string", "enum": list(DATATYPES.values())}
_DURATION = _object(("count", "ns"), count=_COUNT, ns=_COUNT)
_PART = {"type": "object", "additionalProperties": _DURATION}
_PARAMETERS: Json = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSOR = _object(
    ("name", "datatype", "shape"), name=_TEXT, datatype=_DATATYPE, shape={"type": "array", "items": {"type": "integer"}}
)

_SCHEMAS: Json = {
    "Error": _object(("error",), error=_TEXT),
    "Server": _object(
        ("name", "version", "extensions"), name=_TEXT, version=_TEXT, extensions={"type": "array", "items": _TEXT}
    ),
    "Metadata": _object(
        ("name", "versions", "platform", "inputs", "outputs"),
        name=_TEXT,
        versions={"type": "array", "items": _TEXT},
        platform=_TEXT,
        inputs={"type": "array", "items": _TENSOR},
        outputs={"type": "array", "items": _TENSOR},
    ),
    "Request": _object(
        ("inputs",),
        id=_TEXT,
        parameters=_PARAMETERS,
        inputs={
            "type": "array",
            "items": _object(
                ("name", "shape", "datatype"),
                name=_TEXT,
                shape={"type": "array", "items": _COUNT, "maxItems": MAX_RANK},
                datatype=_DATATYPE,
                parameters=_PARAMETERS,
                data={"type": "array", "description": "Elements in row-major order, flat or nested."},
            ),
        },
        outputs={"type": "array", "items": _object(("name",), name=_TEXT, parameters=_PARAMETERS)},
    ),
    "Answer": _object(
        ("model_name", "model_version", "outputs"),
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        outputs={
            "type": "array",
            "items": {
                **_TENSOR,
                "properties": {**_TENSOR["properties"], "data": {"type": "array"}, "parameters": {"type": "object"}},
            },
        },
    ),
    "IndexRequest": _object(ready={"type": "boolean"}),
    "Entry": _object(
        ("name", "version", "state", "reason"),
        name=_TEXT,
        version=_TEXT,
        state={"type": "string", "enum": ["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]},
        reason=_TEXT,
    ),
    "Region": _object(
        ("key", "byte_size"),
        key={"type": "string", "pattern": "^/?[^/.]{1,200}$"},
        offset={"type": "integer", "minimum": 0},
        byte_size={"type": "integer", "minimum": 1},
    ),
    "Statistics": _object(
        ("model_stats",),
        model_stats={
            "type": "array",
            "items": _object(
                ("name", "version", "inference_count", "execution_count", "inference_stats", "batch_stats"),
                name=_TEXT,
                version=_TEXT,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats=_PART,
                batch_stats={"type": "array", "items": {"type": "object"}},
            ),
        },
    ),
}
