"""The gateway's gRPC side: ``inference.GRPCInferenceService``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError, OnnxsplitError
from runtime.gateway import describe, grpc_codec
from runtime.gateway.errors import UnknownRegion, Unsupported, status_of
from runtime.gateway.guard import Guard
from runtime.gateway.regions import Region
from runtime.gateway.repository import State
from runtime.gateway.service import Service
from runtime.gateway.watcher import Watcher

_IN_STREAM = 64  # requests of a stream that are under way at once

Handler = Callable[[Any, Any, Any], Awaitable[Any]]


def _checked(handler: Handler) -> Handler:
    """A handler that shows its errors as gRPC has them."""

    async def run(self: Any, request: Any, context: Any) -> Any:
        try:
            self._admit(context)
            return await handler(self, request, context)
        except OnnxsplitError as error:
            code = getattr(grpc.StatusCode, status_of(error).grpc)
            await context.abort(code, str(error))

    return run


class Rpc(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The gRPC side of a service.

    Args:
        service: what it serves.
        guard: decides who may ask.
        watcher: knows the statistics.
    """

    def __init__(self, service: Service, guard: Guard, watcher: Watcher) -> None:
        self._service = service
        self._repository = service.repository
        self._regions = service.regions
        self._guard = guard
        self._watcher = watcher

    def _admit(self, context: Any) -> None:
        shown = dict(context.invocation_metadata() or ()).get("authorization")
        self._guard.check(shown if isinstance(shown, str) or shown is None else "")

    # Inference

    @_checked
    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """One request."""
        left = context.time_remaining()
        return await self._infer(request, None if left is None else int(left * 1e9), context)

    async def _infer(self, request: Any, timeout_ns: int | None, context: Any) -> Any:
        headers = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        raw = list(request.raw_input_contents)
        return await self._service.infer(
            request.model_name,
            request.model_version,
            lambda read: grpc_codec.parse(request, raw, read),
            grpc_codec.answer,
            size_bytes=sum(map(len, raw)),
            timeout_ns=timeout_ns,
            headers=headers,
        )

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Many requests; their answers come in order, an error among them as a message."""
        try:
            self._admit(context)
        except OnnxsplitError as error:
            await context.abort(getattr(grpc.StatusCode, status_of(error).grpc), str(error))
        running: deque[asyncio.Task[Any]] = deque()
        more = asyncio.Event()
        room = asyncio.Semaphore(_IN_STREAM)
        over = False

        async def take() -> None:
            nonlocal over
            try:
                async for request in requests:
                    await room.acquire()
                    running.append(asyncio.ensure_future(self._streamed(request, context)))
                    more.set()
            finally:
                over = True
                more.set()

        taking = asyncio.ensure_future(take())
        try:
            while True:
                while running:
                    yield await running[0]
                    running.popleft()
                    room.release()
                if over:
                    return
                more.clear()
                await more.wait()
        finally:
            taking.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(taking, *running, return_exceptions=True)

    async def _streamed(self, request: Any, context: Any) -> Any:
        try:
            said = await self._infer(request, None, context)
        except OnnxsplitError as error:
            name, number = request.model_name, request.model_version
            said = pb.ModelInferResponse(model_name=name, model_version=number, id=request.id)
            return pb.ModelStreamInferResponse(error_message=str(error), infer_response=said)
        if request.parameters["triton_enable_empty_final_response"].bool_param:
            said.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=said)

    # What it is

    @_checked
    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The process answers."""
        return pb.ServerLiveResponse(live=True)

    @_checked
    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """All models execute requests."""
        return pb.ServerReadyResponse(ready=self._repository.ready)

    @_checked
    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model executes requests."""
        version, _ = self._service.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=version.ready)

    @_checked
    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The server."""
        return json_format.ParseDict(describe.server(), pb.ServerMetadataResponse())

    @_checked
    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model's inputs and outputs."""
        version, stage = self._service.find(request.name, request.version)
        loaded = [other.number for other in self._repository.versions(version.model) if other.entrance is not None]
        return json_format.ParseDict(describe.metadata(version, loaded, stage), pb.ModelMetadataResponse())

    @_checked
    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model's configuration."""
        version, stage = self._service.find(request.name, request.version)
        config = json_format.ParseDict(describe.config(version, stage), model_config_pb2.ModelConfig())
        return pb.ModelConfigResponse(config=config)

    @_checked
    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What was counted."""
        found = {"model_stats": self._watcher.statistics(request.name, request.version)}
        return json_format.ParseDict(found, pb.ModelStatisticsResponse())

    # The repository

    @_checked
    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """All models."""
        said = pb.RepositoryIndexResponse()
        for v in self._repository:
            if not request.ready or v.state is State.READY:
                said.models.add(name=v.model, version=v.number, state=v.state.value, reason=v.reason)
        return said

    @_checked
    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Start a model."""
        if request.parameters:
            given = ", ".join(request.parameters)
            raise InputError(f"a plan is loaded as it lies; the parameters {given} are not supported")
        await self._repository.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    @_checked
    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """End a model."""
        await self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    # Shared memory

    @_checked
    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The regions."""
        said = pb.SystemSharedMemoryStatusResponse()
        for name, region in self._regions.status(request.name).items():
            entry = said.regions[name]
            entry.name, entry.key = name, region.key
            entry.offset, entry.byte_size = region.offset, region.size_bytes
        return said

    @_checked
    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Open one."""
        self._regions.register(Region(request.name, request.key, request.offset, request.byte_size))
        return pb.SystemSharedMemoryRegisterResponse()

    @_checked
    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Close one, or all."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    @_checked
    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """There are none."""
        if request.name:
            raise UnknownRegion(f"region {request.name!r} is not registered; CUDA shared memory is not supported")
        return pb.CudaSharedMemoryStatusResponse()

    @_checked
    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("CUDA shared memory: this server does not have it")

    @_checked
    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """None is registered, so none is left."""
        return pb.CudaSharedMemoryUnregisterResponse()

    @_checked
    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("trace settings: this server does not have them")

    @_checked
    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("log settings: this server does not have them")
