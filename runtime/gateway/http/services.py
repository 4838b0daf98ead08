"""The endpoints of services over HTTP: ``POST PATH/NAME``."""

from __future__ import annotations

from typing import Any

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from runtime.gateway.http.bodies import Bodies, Body, headers_of
from runtime.gateway.http.responses import SEND_BYTES
from runtime.gateway.services.pool import ServicePool

_OWN_HEADERS = (b"connection", b"transfer-encoding", b"date", b"server", b"keep-alive")
_OWN_REQUEST_HEADERS = (*_OWN_HEADERS, b"authorization", b"content-encoding", b"content-length", b"expect")


class EndpointRoute:
    """An ASGI endpoint of a service. A client that goes away cancels its call.

    Args:
        pool: the workers of the service.
        endpoint: the name of the endpoint.
        bodies: receives the bodies of requests.
    """

    def __init__(self, pool: ServicePool, endpoint: str, bodies: Bodies) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def answer(body: Body) -> None:
            await self._answer(scope, body, send)

        await self._bodies.answer(headers_of(scope), scope, receive, answer)

    async def _answer(self, scope: Scope, body: Body, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name not in _OWN_REQUEST_HEADERS]
        async with self._pool.call(self._endpoint, scope["path"], scope["query_string"], headers, body) as call:
            head = await call.head()
            kept = [(name, value) for name, value in head.headers if name.lower() not in _OWN_HEADERS]
            await send({"type": "http.response.start", "status": head.status, "headers": kept})
            async for data, more in call.bodies():
                await _send_body(send, data, more=more)


async def _send_body(send: Send, data: bytes, *, more: bool) -> None:
    """Send a part of a response in steps, between which other requests go on."""
    view = memoryview(data)
    for start in range(0, max(1, len(view)), SEND_BYTES):
        step = view[start : start + SEND_BYTES]
        last = start + SEND_BYTES >= len(view)
        await send({"type": "http.response.body", "body": step, "more_body": more or not last})


def routes(pools: tuple[ServicePool, ...], bodies: Bodies) -> list[BaseRoute]:
    """The routes of all endpoints of services."""
    return [
        Route(pool.description.path_of(endpoint), EndpointRoute(pool, endpoint.name, bodies), methods=["POST"])
        for pool in pools
        for endpoint in pool.description.endpoints
    ]


def operations(pools: tuple[ServicePool, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The endpoints of services as OpenAPI has them: the paths, and the schemas that they refer to."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for pool in pools:
        schemas |= pool.description.schemas
        for endpoint in pool.description.endpoints:
            kind, schema = endpoint.response
            body = {"schema": endpoint.request}
            paths[pool.description.path_of(endpoint)] = {
                "post": {
                    "summary": endpoint.summary or f"{pool.description.name}.{endpoint.name}",
                    "tags": [pool.description.name],
                    "requestBody": {"content": {"application/json": body, "multipart/form-data": body}},
                    "responses": {"200": {"description": "Done.", "content": {kind: {"schema": schema}}}},
                }
            }
    return paths, schemas
