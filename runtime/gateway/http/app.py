"""The HTTP side of the gateway: Open Inference Protocol v2 with Triton's extensions, metrics, and the page.

Inferences have a module of their own, :mod:`runtime.gateway.http.inference`. Everything else is built on Starlette.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from onnxsplit.errors import InputError, OnnxsplitError, one_line, shown
from runtime.gateway.access import AccessControl
from runtime.gateway.errors import TooLarge, UnknownRegion, Unsupported
from runtime.gateway.http import openapi, page, services
from runtime.gateway.http.bodies import Bodies
from runtime.gateway.http.generate import GenerateEndpoint
from runtime.gateway.http.inference import HEADER_LENGTH, AccessControlled, InferenceEndpoint
from runtime.gateway.http.responses import json_response, on_error, on_http_error, readiness
from runtime.gateway.models import metadata, recuts
from runtime.gateway.openai.routes import OpenAIEndpoint
from runtime.gateway.protocol.documents import (
    ChangeRequest,
    IndexEntry,
    IndexRequest,
    RegionStatus,
    RegisterRequest,
    Statistics,
    VersionState,
)
from runtime.gateway.protocol.recuts import RecutRequest
from runtime.gateway.service import Service
from runtime.gateway.services.pool import ServicePool
from runtime.gateway.shared_memory import Region
from runtime.gateway.telemetry import metrics
from runtime.gateway.telemetry.sampler import Sampler
from runtime.gateway.texts import Texts

_DOCUMENT_BYTES = 1 << 20  # largest body without tensors
_MESSAGE_CHARACTERS = 500

_Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class HttpApp:
    """The HTTP side of a service.

    Args:
        service: The models.
        bodies: Receives the bodies of requests.
        access: Decides which requests are allowed.
        sampler: Provides the statistics and the state that the page shows.
        openai: Answers clients of OpenAI's API.
        texts: Completes texts for clients of Triton.
        pools: The workers of services.
    """

    def __init__(
        self,
        service: Service,
        bodies: Bodies,
        access: AccessControl,
        sampler: Sampler,
        openai: OpenAIEndpoint,
        texts: Texts,
        pools: tuple[ServicePool, ...] = (),
    ) -> None:
        self._service = service
        self._pools = pools
        self._repository = service.repository
        self._regions = service.regions
        self._bodies = bodies
        self._access = access
        self._sampler = sampler
        self._openai = openai
        self._texts = texts

    def app(self) -> ASGIApp:
        """The ASGI application."""
        infer = InferenceEndpoint(self._service, self._bodies)
        routes: list[BaseRoute] = [
            Route(path, endpoint, methods=methods.split()) for methods, path, endpoint in self._endpoints()
        ]
        routes.sort(key=lambda route: "{" in getattr(route, "path", ""))  # /v2/models/stats is not a model
        routes += [Route(f"{path}/infer", infer, methods=["POST"]) for path in _MODEL_PATHS]
        whole, streamed = (
            GenerateEndpoint(self._texts, self._bodies, self._service.workers, stream=stream)
            for stream in (False, True)
        )
        for path in _MODEL_PATHS:
            routes.append(Route(f"{path}/generate", whole, methods=["POST"]))
            routes.append(Route(f"{path}/generate_stream", streamed, methods=["POST"]))
        routes += [*self._openai.routes(), *services.routes(self._pools, self._bodies)]
        app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: on_http_error, OnnxsplitError: on_error, Exception: on_error},
        )
        probes = {"/v2/health/live": lambda: True, "/v2/health/ready": lambda: self._repository.ready}
        return AccessControlled(app, infer, self._access, probes)

    def _endpoints(self) -> list[tuple[str, str, _Endpoint]]:
        """Methods, path and endpoint of everything but inferences."""
        no_traces, no_logs = _unsupported("trace settings"), _unsupported("log settings")
        system, cuda, region = "/v2/systemsharedmemory", "/v2/cudasharedmemory", "/region/{region}"
        endpoints: list[tuple[str, str, _Endpoint]] = [
            ("GET", "/v2", self._server),
            ("GET", "/v2/health/live", self._live),
            ("GET", "/v2/health/ready", self._ready),
            ("GET", "/v2/models/stats", self._all_stats),
            ("POST", "/v2/repository/index", self._index),
            ("POST", "/v2/repository/models/{model}/load", self._load),
            ("POST", "/v2/repository/models/{model}/unload", self._unload),
            ("POST", "/v2/repository/models/{model}/recut", self._recut),
            ("POST", f"{system}{region}/register", self._register),
            ("POST", f"{cuda}{region}/register", _unsupported("CUDA shared memory")),
            ("GET POST", "/v2/trace/setting", no_traces),
            ("GET POST", "/v2/logging", no_logs),
            ("GET", "/metrics", self._metrics),
            ("GET", "/openapi.json", self._openapi),
            ("GET", "/", self._page),
            ("GET", "/events", self._events),
            ("GET", "/slowest", self._slowest),
            ("GET", "/example/{model}", self._example),
        ]
        for path in _MODEL_PATHS:
            endpoints += [
                ("GET", path, self._metadata),
                ("GET", f"{path}/ready", self._model_ready),
                ("GET", f"{path}/config", self._config),
                ("GET", f"{path}/stats", self._stats),
                ("GET", f"{path}/generations", self._generations),
                ("GET POST", f"{path}/trace/setting", no_traces),
            ]
        for part in ("", region):
            endpoints += [
                ("GET", f"{system}{part}/status", self._region_status),
                ("POST", f"{system}{part}/unregister", self._unregister),
                ("GET", f"{cuda}{part}/status", self._cuda_status),
                ("POST", f"{cuda}{part}/unregister", self._cuda_unregister),
            ]
        return endpoints

    # Server and models

    async def _server(self, _: Request) -> Response:
        return json_response(metadata.server(shared_memory=self._regions.enabled))

    async def _live(self, _: Request) -> Response:
        return Response()

    async def _ready(self, _: Request) -> Response:
        return readiness(None if self._repository.ready else self._sampler.why_not())

    async def _model_ready(self, request: Request) -> Response:
        version, _ = self._service.find(*_model_and_version(request))
        return readiness(None if version.ready else version.why_not())

    async def _metadata(self, request: Request) -> Response:
        version, stage = self._service.find(*_model_and_version(request))
        return json_response(metadata.metadata(version, self._repository.loaded_numbers(version.model), stage))

    async def _config(self, request: Request) -> Response:
        version, stage = self._service.find(*_model_and_version(request))
        return json_response(metadata.config(version, stage))

    async def _stats(self, request: Request) -> Response:
        return json_response(Statistics(self._sampler.statistics(*_model_and_version(request))))

    async def _all_stats(self, _: Request) -> Response:
        return json_response(Statistics(self._sampler.statistics("")))

    # Repository

    async def _index(self, request: Request) -> Response:
        only_ready = (await self._document(request, IndexRequest)).ready
        return json_response(
            [
                IndexEntry(v.model, v.number, v.state, v.reason)
                for v in self._repository
                if not only_ready or v.state is VersionState.READY
            ]
        )

    async def _load(self, request: Request) -> Response:
        parameters = (await self._document(request, ChangeRequest)).parameters
        if parameters != {}:
            raise InputError(f"a model is loaded without parameters; given: {shown(parameters)}")
        await self._repository.load(request.path_params["model"])
        return Response()

    async def _unload(self, request: Request) -> Response:
        await self._document(request, ChangeRequest)
        await self._repository.unload(request.path_params["model"])
        return Response()

    async def _recut(self, request: Request) -> Response:
        wanted = await self._document(request, RecutRequest)
        version = self._repository.loaded(request.path_params["model"])
        return json_response(await recuts.recut(version, wanted))

    async def _generations(self, request: Request) -> Response:
        version, _ = self._service.find(*_model_and_version(request))
        return json_response(recuts.generations(version))

    # Shared memory

    async def _region_status(self, request: Request) -> Response:
        regions = self._regions.status(request.path_params.get("region", ""))
        return json_response([RegionStatus(r.name, r.key, r.offset, r.size_bytes) for r in regions.values()])

    async def _register(self, request: Request) -> Response:
        region = await self._document(request, RegisterRequest)
        self._regions.register(Region(request.path_params["region"], region.key, region.offset, region.byte_size))
        return Response()

    async def _unregister(self, request: Request) -> Response:
        self._regions.unregister(request.path_params.get("region", ""))
        return Response()

    async def _cuda_status(self, request: Request) -> Response:
        name = request.path_params.get("region", "")
        if name:
            raise UnknownRegion(f"region {name!r} is not registered; CUDA shared memory is not supported")
        return json_response([])

    async def _cuda_unregister(self, _: Request) -> Response:
        return Response()  # no region can be registered

    # Metrics, description and page

    async def _metrics(self, _: Request) -> Response:
        text, content_type = metrics.exposition(self._sampler)
        return Response(text, headers={"content-type": content_type})

    async def _openapi(self, _: Request) -> Response:
        numbers = {model: self._repository.loaded_numbers(model) for model in self._repository.models}
        loaded = {model: versions for model, versions in numbers.items() if versions}
        return json_response(openapi.description(loaded, services.operations(self._pools)))

    async def _page(self, _: Request) -> Response:
        return Response(page.html(), media_type="text/html", headers=page.headers())

    async def _events(self, request: Request) -> Response:
        kind, headers = "text/event-stream", {"cache-control": "no-store"}
        if request.method == "HEAD":
            return Response(media_type=kind, headers=headers)
        return StreamingResponse(self._sampler.events(), media_type=kind, headers=headers)

    async def _slowest(self, _: Request) -> Response:
        answer = json_response(self._sampler.slowest())
        answer.headers["cache-control"] = "no-store"
        return answer

    async def _example(self, request: Request) -> Response:
        version = self._repository.find(request.path_params["model"])
        pieces, length = await self._service.workers.run(True, page.example, version)
        return Response(b"".join(pieces), media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})

    async def _document(self, request: Request, kind: type[T]) -> T:
        """The JSON document in a body. An empty body is an empty object.

        Raises:
            InputError: The body is not such a document.
            TooLarge: It is larger than allowed.
        """
        try:
            body = await self._bodies.read(request.headers, request.scope, request.receive)
            if len(body) > _DOCUMENT_BYTES:
                raise TooLarge(f"the body has {len(body)} bytes; at most {_DOCUMENT_BYTES} are allowed here")
            return msgspec.json.decode(body or b"{}", type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InputError(f"the body does not fit the protocol: {one_line(error, _MESSAGE_CHARACTERS)}") from error
        finally:
            self._bodies.release(request.scope)


_MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def _model_and_version(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _unsupported(what: str) -> _Endpoint:
    async def refuse(_: Request) -> Response:
        raise Unsupported(f"this server does not have {what}")

    return refuse
