"""Inferences over HTTP. Most requests are inferences, so they skip Starlette's layers, but not the access control."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from onnxsplit.errors import InputError, OnnxsplitError, shown
from runtime.gateway.access import AccessControl
from runtime.gateway.errors import Unauthorized, clear_frames
from runtime.gateway.http import codec
from runtime.gateway.http.bodies import Bodies, Body, coding_of, compress, headers_of
from runtime.gateway.http.responses import error_response, send_answer
from runtime.gateway.service import IncomingRequest, Service, Undecoded
from runtime.gateway.threads import takes_long

HEADER_LENGTH = "inference-header-content-length"
_HEADER_LENGTH = HEADER_LENGTH.encode()
_DIGITS = 18
_Answer = tuple[list[bytes | memoryview], list[tuple[bytes, bytes]]]
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
        """Answer one request.

        Raises:
            OnnxsplitError: As :meth:`answer`.
        """
        answer = await self.answer(scope, receive)
        if answer is not None:
            await send_answer(send, *answer)

    async def answer(self, scope: Scope, receive: Receive) -> _Answer | None:
        """Receive a request and execute it.

        Returns:
            The body and the headers of the response; None if the client has gone away.

        Raises:
            OnnxsplitError: The request failed.
        """
        headers = headers_of(scope)
        return await self._bodies.answer(
            headers, scope, receive, lambda body: self._answer(scope["path_params"], headers, body)
        )

    async def _answer(self, path: dict[str, str], headers: dict[str, str], body: Body) -> _Answer:
        length = _header_length(headers)
        name, number = path["model"], path.get("version", "")
        request = IncomingRequest(body, (name, number, length, len(body)), codec.answer, headers)
        known = self._service.recall(request) or Undecoded(
            name, number, lambda read: codec.parse(body, length, read), len(body) if length is None else length
        )
        pieces, json_length = await self._service.infer(request, known)
        if json_length is None:
            answers = [(b"content-type", b"application/json")]
        else:
            answers = [(b"content-type", b"application/octet-stream"), (_HEADER_LENGTH, b"%d" % json_length)]
        if coding := coding_of(headers.get("accept-encoding", "")):
            long = takes_long(parsed_bytes=sum(map(len, pieces)))
            pieces = await self._service.workers.run(long, compress, pieces, coding)
            answers.append((b"content-encoding", coding.encode()))
        return pieces, answers


class AccessControlled:
    """An ASGI application behind the access control.

    Args:
        app: Answers all requests except inferences.
        inferences: Answers inferences.
        access: Decides which requests are allowed.
        probes: Paths that probes without a token may ask, and whether the answer is 200 or 503. It says no more.
    """

    def __init__(
        self,
        app: ASGIApp,
        inferences: InferenceEndpoint,
        access: AccessControl,
        probes: Mapping[str, Callable[[], bool]],
    ) -> None:
        self._app = app
        self._access = access
        self._inferences = inferences
        self._probes = probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        try:
            self._access.check_site(_all(scope, b"host"), _all(scope, b"origin"), scope["target"])
            self._access.check(_all(scope, b"authorization"))
        except OnnxsplitError as error:
            refusal = error_response(error, path)
            if isinstance(error, Unauthorized) and scope["method"] in ("GET", "HEAD") and path in self._probes:
                refusal = Response(status_code=200 if self._probes[path]() else 503)
            await refusal(scope, receive, send)
            return
        match = _INFER.fullmatch(path) if scope["method"] == "POST" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = match.groupdict("")
        try:
            answer = await self._inferences.answer(scope, receive)
        except Exception as error:
            response = error_response(error)
            clear_frames(error)
        else:
            if answer is not None:
                await send_answer(send, *answer)
            return
        await response(scope, receive, send)


def _all(scope: Scope, name: bytes) -> list[str]:
    """The values of all headers of a name."""
    return [value.decode("latin-1") for header, value in scope["headers"] if header == name]


def _header_length(headers: dict[str, str]) -> int | None:
    length = headers.get(HEADER_LENGTH)
    if length is None:
        return None
    if not length.isascii() or not length.isdecimal() or len(length) > _DIGITS:
        raise InputError(f"Inference-Header-Content-Length is {shown(length)}; it must be a number of bytes")
    return int(length)
