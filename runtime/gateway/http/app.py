"""The gateway's HTTP side: Open Inference Protocol v2 with Triton's extensions, metrics, the page.

Built on Starlette; every answer is one send, and every error is ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onnxsplit.errors import InputError, OnnxsplitError, one_line, shown
from runtime.errors import Cancelled
from runtime.gateway import metadata
from runtime.gateway.access import AccessControl
from runtime.gateway.errors import (
    NotLoaded,
    TooLarge,
    Unauthorized,
    UnknownRegion,
    Unsupported,
    forget_frames,
    status_of,
    words,
)
from runtime.gateway.http import codec as http_codec
from runtime.gateway.http import openapi, page
from runtime.gateway.http.bodies import STOPPING, Bodies, coding_of, compress
from runtime.gateway.repository import VersionState
from runtime.gateway.service import Service
from runtime.gateway.shared_memory import Region
from runtime.gateway.telemetry import metrics
from runtime.gateway.telemetry.sampler import Sampler
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")
_HEADER_LENGTH = "inference-header-content-length"
_RETRY_S = "1"
_SEND_BYTES = 1 << 20  # of an answer at once
_OBJECT_BYTES = 1 << 20  # of JSON that describes no tensors
_DIGITS = 18
_WORDS = 500
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")


class HttpApp:
    """The HTTP side of a service.

    Args:
        service: what it serves.
        bodies: takes requests in.
        access: decides who may ask.
        sampler: knows what the page shows.
    """

    def __init__(self, service: Service, bodies: Bodies, access: AccessControl, sampler: Sampler) -> None:
        self._service = service
        self._repository = service.repository
        self._regions = service.regions
        self._bodies = bodies
        self._access = access
        self._sampler = sampler

    def app(self) -> ASGIApp:
        """The ASGI application."""
        model = "/v2/models/{model}"
        routes: list[BaseRoute] = []

        def add(methods: str, path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> None:
            routes.append(Route(path, endpoint, methods=methods.split()))

        for place in (model, f"{model}/versions/{{version}}"):
            routes.append(Route(f"{place}/infer", _App(self._infer), methods=["POST"]))
            add("GET", f"{place}/ready", self._model_ready)
            add("GET", f"{place}/config", self._config)
            add("GET", f"{place}/stats", self._stats)
            add("GET", place, self._metadata)
            add("GET POST", f"{place}/trace/setting", _unsupported("trace settings"))
        add("GET", "/v2", self._server)
        add("GET", "/v2/health/live", self._live)
        add("GET", "/v2/health/ready", self._ready)
        add("GET", "/v2/models/stats", self._all_stats)
        add("POST", "/v2/repository/index", self._index)
        add("POST", "/v2/repository/models/{model}/load", self._load)
        add("POST", "/v2/repository/models/{model}/unload", self._unload)
        for what in ("/v2/systemsharedmemory", "/v2/systemsharedmemory/region/{region}"):
            add("GET", f"{what}/status", self._region_status)
            add("POST", f"{what}/unregister", self._unregister)
        add("POST", "/v2/systemsharedmemory/region/{region}/register", self._register)
        for what in ("/v2/cudasharedmemory", "/v2/cudasharedmemory/region/{region}"):
            add("GET", f"{what}/status", self._cuda_status)
            add("POST", f"{what}/unregister", self._cuda_unregister)
        add("POST", "/v2/cudasharedmemory/region/{region}/register", _unsupported("CUDA shared memory"))
        for path, what in (("/v2/trace/setting", "trace settings"), ("/v2/logging", "log settings")):
            add("GET POST", path, _unsupported(what))
        add("GET", "/metrics", self._metrics)
        add("GET", "/openapi.json", self._openapi)
        add("GET", "/", self._page)
        add("GET", "/events", self._events)
        add("GET", "/example/{model}", self._example)
        routes.sort(key=lambda route: "{" in getattr(route, "path", ""))  # /v2/models/stats is no model
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _not_found, OnnxsplitError: _answer_error, Exception: _answer_error},
        )
        return _Guarded(app, self._infer, self._access)

    # Inference

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = scope["path_params"]
        task = asyncio.current_task()
        gone = False

        def abandon() -> None:
            nonlocal gone
            gone = True
            if task is not None:
                task.cancel()

        try:
            body = await self._bodies.read(headers, scope, receive)
            scope["abandon"] = abandon
            length = _header_length(headers)
            pieces, json_bytes = await self._service.infer(
                path["model"],
                path.get("version", ""),
                lambda read: http_codec.parse(body, length, read),
                http_codec.answer,
                long_bytes=len(body) if length is None else length,
                large_bytes=len(body),
                headers=headers,
            )
            said = [(b"content-type", b"application/json" if json_bytes is None else b"application/octet-stream")]
            if json_bytes is not None:
                said.append((_HEADER_LENGTH.encode(), str(json_bytes).encode()))
            if coding := coding_of(headers.get("accept-encoding", "")):
                pieces = await self._compressed(pieces, coding)
                said.append((b"content-encoding", coding.encode()))
        except asyncio.CancelledError as error:
            if gone:
                return
            raise NotLoaded(STOPPING) from error
        finally:
            scope.pop("abandon", None)
            self._bodies.release(scope)
        said.append((b"content-length", str(sum(map(len, pieces))).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": said})
        await _send_body(send, pieces)

    async def _compressed(self, pieces: list[bytes | memoryview], coding: str) -> list[bytes | memoryview]:
        if sum(map(len, pieces)) <= _SEND_BYTES:
            return compress(pieces, coding)
        return await asyncio.get_running_loop().run_in_executor(self._service.workers, compress, pieces, coding)

    # What it is

    async def _server(self, _: Request) -> Response:
        return _json(metadata.server(shared_memory=self._regions.enabled))

    async def _live(self, _: Request) -> Response:
        return Response()

    async def _ready(self, _: Request) -> Response:
        return _readiness(None if self._repository.ready else self._sampler.why_not())

    async def _model_ready(self, request: Request) -> Response:
        version, _ = self._service.find(*_named(request))
        return _readiness(version.why_not())

    async def _metadata(self, request: Request) -> Response:
        version, stage = self._service.find(*_named(request))
        loaded = [other.number for other in self._repository.versions(version.model) if other.batcher is not None]
        return _json(metadata.metadata(version, loaded, stage))

    async def _config(self, request: Request) -> Response:
        version, stage = self._service.find(*_named(request))
        return _json(metadata.config(version, stage))

    async def _stats(self, request: Request) -> Response:
        return _json({"model_stats": self._sampler.statistics(*_named(request))})

    async def _all_stats(self, _: Request) -> Response:
        return _json({"model_stats": self._sampler.statistics("")})

    # The repository

    async def _index(self, request: Request) -> Response:
        only_ready = (await self._json(request)).get("ready", False)
        if not isinstance(only_ready, bool):
            raise InputError(f"ready is {shown(only_ready)}; it is true or false")
        return _json(
            [
                {"name": v.model, "version": v.number, "state": v.state.value, "reason": v.reason}
                for v in self._repository
                if not only_ready or v.state is VersionState.READY
            ]
        )

    async def _load(self, request: Request) -> Response:
        given = (await self._json(request)).get("parameters", {})
        if not isinstance(given, dict) or given:
            raise InputError(f"a plan is loaded as it lies, without parameters; given: {shown(given)}")
        await self._repository.load(request.path_params["model"])
        return Response()

    async def _unload(self, request: Request) -> Response:
        await self._json(request)
        await self._repository.unload(request.path_params["model"])
        return Response()

    # Shared memory

    async def _region_status(self, request: Request) -> Response:
        regions = self._regions.status(request.path_params.get("region", ""))
        return _json(
            [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.size_bytes} for r in regions.values()]
        )

    async def _register(self, request: Request) -> Response:
        said = await self._json(request)
        key, offset, size = said.get("key"), said.get("offset", 0), said.get("byte_size")
        if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
            raise InputError("a region needs key (text), byte_size and offset (numbers of bytes)")
        self._regions.register(Region(request.path_params["region"], key, offset, size))
        return Response()

    async def _unregister(self, request: Request) -> Response:
        self._regions.unregister(request.path_params.get("region", ""))
        return Response()

    async def _cuda_status(self, request: Request) -> Response:
        name = request.path_params.get("region", "")
        if name:
            raise UnknownRegion(f"region {name!r} is not registered; CUDA shared memory is not supported")
        return _json([])

    async def _cuda_unregister(self, _: Request) -> Response:
        return Response()  # none is registered, so none is left

    # To look at

    async def _metrics(self, _: Request) -> Response:
        text, content_type = metrics.exposition(self._sampler)
        return Response(text, headers={"content-type": content_type})

    async def _openapi(self, _: Request) -> Response:
        loaded: dict[str, list[str]] = {}
        for version in self._repository:
            if version.batcher is not None:
                loaded.setdefault(version.model, []).append(version.number)
        return _json(openapi.description(loaded))

    async def _page(self, _: Request) -> Response:
        return Response(page.html(), media_type="text/html", headers=page.headers())

    async def _events(self, request: Request) -> Response:
        kind, headers = "text/event-stream", {"cache-control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type=kind, headers=headers)
        return StreamingResponse(self._sampler.events(), media_type=kind, headers=headers)

    async def _example(self, request: Request) -> Response:
        version = self._repository.find(request.path_params["model"])
        pieces, length = await asyncio.get_running_loop().run_in_executor(None, page.example, version)
        return Response(
            b"".join(pieces),
            media_type="application/octet-stream",
            headers={} if length is None else {_HEADER_LENGTH: str(length)},
        )

    async def _json(self, request: Request) -> dict[str, Any]:
        """The object in a small body; an empty body is an empty object."""
        try:
            body = await self._bodies.read(request.headers, request.scope, request.receive)
            if len(body) > _OBJECT_BYTES:
                raise TooLarge(f"the body has {len(body)} bytes; at most {_OBJECT_BYTES} are allowed here")
            found = msgspec.json.decode(body) if body else {}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InputError(f"the body is no JSON: {one_line(error, _WORDS)}") from error
        finally:
            self._bodies.release(request.scope)
        if not isinstance(found, dict):
            raise InputError(f"the body is a JSON {type(found).__name__}; an object is expected")
        return found


class _App:
    """An endpoint that speaks ASGI itself; a class, since Starlette wraps functions."""

    def __init__(self, run: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(scope, receive, send)


class _Guarded:
    """An application behind a access. Inferences, which are most of what is asked, skip its layers."""

    def __init__(self, app: ASGIApp, infer: ASGIApp, access: AccessControl) -> None:
        self._app = app
        self._access = access
        self._infer = infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        try:
            self._access.check_site(headers.getlist("host"), headers.getlist("origin"), scope["target"])
            self._access.check(headers.getlist("authorization"))
        except OnnxsplitError as error:
            await _error_response(error)(scope, receive, send)
            return
        found = _INFER.fullmatch(scope["path"]) if scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = found.groupdict("")
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._infer(scope, receive, sent)
            return
        except Exception as error:
            if begun:  # an answer that broke off is no other answer
                raise
            response = _error_response(error)
            forget_frames(error)
        await response(scope, receive, send)


def _header_length(headers: Headers) -> int | None:
    length = headers.get(_HEADER_LENGTH)
    if length is None:
        return None
    if not length.isascii() or not length.isdecimal() or len(length) > _DIGITS:
        raise InputError(f"Inference-Header-Content-Length is {shown(length)}; it is a number of bytes")
    return int(length)


async def _send_body(send: Send, pieces: list[bytes | memoryview]) -> None:
    """Send an answer's body: a small one at once, a large one in steps, so that others have their turn in between."""
    if sum(map(len, pieces)) <= _SEND_BYTES:
        await send({"type": "http.response.body", "body": b"".join(pieces)})
        return
    for piece in pieces:
        for start in range(0, len(piece), _SEND_BYTES):
            await send({"type": "http.response.body", "body": piece[start : start + _SEND_BYTES], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _readiness(why_not: str | None) -> Response:
    """Ready; or why not."""
    return Response() if why_not is None else JSONResponse({"error": why_not}, 503, {"retry-after": _RETRY_S})


def _unsupported(what: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(_: Request) -> Response:
        raise Unsupported(f"{what}: this server does not have them")

    return refuse


async def _not_found(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {shown(request.scope['path'])}"
    text = f"{asked}: {error.detail.lower()}; /openapi.json lists what there is"
    return JSONResponse({"error": text}, error.status_code, dict(error.headers or {}))


async def _answer_error(_: Request, error: Exception) -> Response:
    return _error_response(error)


def _error_response(error: Exception) -> Response:
    status = status_of(error).http
    if status == 500 and not isinstance(error, OnnxsplitError):
        log_event(_log, logging.ERROR, "a bug", error=type(error).__name__, reason=one_line(error, _WORDS))
    headers: dict[str, str] = {}
    if status == 503:
        headers["retry-after"] = _RETRY_S
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = 'Basic realm="onnxsplit, any name, the token as password", Bearer'
    if status in (408, 499) or isinstance(error, Cancelled):
        headers["connection"] = "close"  # the rest of the body is not waited for
    return Response(json.dumps({"error": words(error)}), status, headers, "application/json")
