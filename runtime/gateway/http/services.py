"""The endpoints of services over HTTP: ``POST PATH/NAME``."""

from __future__ import annotations

import logging
from typing import Any

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from onnxsplit.errors import OnnxsplitError, one_line
from runtime.gateway.http.bodies import Bodies, Body, headers_of
from runtime.gateway.services.pool import ServicePool
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")
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
            begun = False
            try:
                async for data, more in call.parts():
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": head.status, "headers": kept})
                    await send({"type": "http.response.body", "body": data, "more_body": more})
            except OnnxsplitError as error:
                if not begun:
                    raise
                # The connection is closed, by which the client notices that the response is not whole.
                name, reason = self._pool.description.name, one_line(error)
                log_event(_log, logging.WARNING, "a response ended early", service=name, reason=reason)


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
