"""Responses of the HTTP side. Every error has the status of its class, and the form of the API that was called.

{"error": "..."}                                     Open Inference Protocol
{"error": {"message", "type", "param", "code"}}      OpenAI's API: paths below /v1, /tokenize, /detokenize
"""

from __future__ import annotations

import json
import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from onnxsplit.errors import OnnxsplitError, one_line, shown
from runtime.gateway.errors import Unauthorized, client_message, status_of
from runtime.gateway.openai.errors import error_answer, http_status, is_openai_path, status_answer
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")
_RETRY_S = "1"
_MESSAGE_CHARACTERS = 500
_SCHEMES = ('Basic realm="onnxsplit, any name, the token as password"', "Bearer")
# Each has a header of its own: Chromium takes a header for one scheme, and does not ask for a token if more follows.

JOINED_BYTES = 64 << 10
"""A body up to this size is copied together, and then behind its head; a larger one is sent from where it lies."""

SEND_BYTES = 1 << 20
"""Most bytes of a response that are sent at once."""


def json_response(document: object) -> Response:
    """A document as JSON."""
    return Response(msgspec.json.encode(document), media_type="application/json")


def readiness(why_not: str | None) -> Response:
    """200 when ready, otherwise 503 with the reason."""
    return Response() if why_not is None else JSONResponse({"error": why_not}, 503, {"retry-after": _RETRY_S})


def error_response(error: Exception, path: str = "") -> Response:
    """The response to a request of a path that failed."""
    openai = is_openai_path(path)
    status = http_status(error) if openai else status_of(error).http
    if status == 500 and not isinstance(error, OnnxsplitError):
        reason = one_line(error, _MESSAGE_CHARACTERS)
        log_event(_log, logging.ERROR, "a bug", error=type(error).__name__, reason=reason)
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["retry-after"] = _RETRY_S
    if status in (408, 499):
        headers["connection"] = "close"  # the server does not wait for the rest of the body
    if openai and status in (500, 504):
        headers["x-should-retry"] = "false"  # OpenAI's clients would repeat what killed nodes or took too long
    body = msgspec.json.encode(error_answer(error)) if openai else json.dumps({"error": client_message(error)})
    response = Response(body, status, headers, "application/json")
    if isinstance(error, Unauthorized):
        for scheme in _SCHEMES:
            response.headers.append("www-authenticate", scheme)
    return response


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of every error of ours."""
    return error_response(error, request.scope["path"])


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    call = f"{request.method} {shown(request.scope['path'])}"
    text = f"{call}: {error.detail.lower()}; /openapi.json lists all paths"
    headers = dict(error.headers or {})
    if is_openai_path(request.scope["path"]):
        body = msgspec.json.encode(status_answer(error.status_code, text))
        return Response(body, error.status_code, headers, "application/json")
    return JSONResponse({"error": text}, error.status_code, headers)


async def send_answer(send: Send, pieces: list[bytes | memoryview], headers: list[tuple[bytes, bytes]]) -> None:
    """Send a response: a small body at once, a large one in steps, between which other requests go on."""
    size = sum(map(len, pieces))
    headers.append((b"content-length", b"%d" % size))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if size <= JOINED_BYTES:
        await send({"type": "http.response.body", "body": b"".join(pieces)})
        return
    for piece in pieces:
        for start in range(0, len(piece), SEND_BYTES):
            await send({"type": "http.response.body", "body": piece[start : start + SEND_BYTES], "more_body": True})
    await send({"type": "http.response.body", "body": b""})
