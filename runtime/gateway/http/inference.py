"""Inferences over HTTP. Most requests are inferences, so they skip Starlette's layers, but not the access control."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onnxsplit.errors import InputError, OnnxsplitError, shown
from runtime.gateway.access import AccessControl
from runtime.gateway.errors import clear_frames
from runtime.gateway.http import codec
from runtime.gateway.http.bodies import Bodies, Body, coding_of, compress
from runtime.gateway.http.responses import error_response, send_body
from runtime.gateway.service import Service
from runtime.gateway.threads import takes_long

HEADER_LENGTH = "inference-header-content-length"
_DIGITS = 18
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")


class InferenceEndpoint:
    """The ASGI endpoint ``/v2/models/M/infer``. Path parameters are in ``scope["path_params"]``.

    Args:
        service: Executes the requests.
        bodies: Receives their bodies.
    """

    def __init__(self, service: Service, bodies: Bodies) -> None:
        self._service = service
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive a request, execute it and send the response.

        Raises:
            OnnxsplitError: The request failed, and nothing was sent.
        """
        headers = Headers(scope=scope)
        answer = await self._bodies.answer(
            scope, receive, lambda body: self._answer(scope["path_params"], headers, body)
        )
        if answer is None:
            return
        pieces, response_headers = answer
        response_headers.append((b"content-length", str(sum(map(len, pieces))).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": response_headers})
        await send_body(send, pieces)

    async def _answer(
        self, path: dict[str, str], headers: Headers, body: Body
    ) -> tuple[list[bytes | memoryview], list[tuple[bytes, bytes]]]:
        """The body and the headers of the response."""
        pieces, json_length = await self._infer(path, headers, body)
        answers = [(b"content-type", b"application/json" if json_length is None else b"application/octet-stream")]
        if json_length is not None:
            answers.append((HEADER_LENGTH.encode(), str(json_length).encode()))
        if coding := coding_of(headers.get("accept-encoding", "")):
            long = takes_long(parsed_bytes=sum(map(len, pieces)))
            pieces = await self._service.workers.run(long, compress, pieces, coding)
            answers.append((b"content-encoding", coding.encode()))
        return pieces, answers

    async def _infer(
        self, path: dict[str, str], headers: Headers, body: Body
    ) -> tuple[list[bytes | memoryview], int | None]:
        length = _header_length(headers)
        return await self._service.infer(
            path["model"],
            path.get("version", ""),
            lambda read: codec.parse(body, length, read),
            codec.answer,
            parsed_bytes=len(body) if length is None else length,
            copied_bytes=len(body),
            headers=headers,
        )


class AccessControlled:
    """An ASGI application behind the access control.

    Args:
        app: Answers all requests except inferences.
        infer: Answers inferences.
        access: Decides which requests are allowed.
    """

    def __init__(self, app: ASGIApp, infer: ASGIApp, access: AccessControl) -> None:
        self._app = app
        self._access = access
        self._infer = infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        try:
            self._access.check_site(headers.getlist("host"), headers.getlist("origin"), scope["target"])
            self._access.check(headers.getlist("authorization"))
        except OnnxsplitError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        match = _INFER.fullmatch(scope["path"]) if scope["method"] == "POST" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = match.groupdict("")
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._infer(scope, receive, sent)
            return
        except Exception as error:
            if begun:  # a second response cannot follow a part of the first
                raise
            response = error_response(error)
            clear_frames(error)
        await response(scope, receive, send)


def _header_length(headers: Headers) -> int | None:
    length = headers.get(HEADER_LENGTH)
    if length is None:
        return None
    if not length.isascii() or not length.isdecimal() or len(length) > _DIGITS:
        raise InputError(f"Inference-Header-Content-Length is {shown(length)}; it must be a number of bytes")
    return int(length)
