"""The gateway's gRPC side: ``inference.GRPCInferenceService``."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError, OnnxsplitError, one_line, shown
from runtime.errors import Busy
from runtime.gateway import metadata
from runtime.gateway.access import AccessControl
from runtime.gateway.budget import Budget, Gate
from runtime.gateway.errors import UnknownRegion, Unsupported, forget_frames, status_of, words
from runtime.gateway.grpc import codec as grpc_codec
from runtime.gateway.repository import VersionState
from runtime.gateway.service import Service
from runtime.gateway.shared_memory import Region
from runtime.gateway.telemetry.sampler import Sampler
from runtime.intake import MOST_TIMEOUT_S
from runtime.logs import log_event

_log = logging.getLogger("runtime.gateway")
_WORDS = 500
_IN_STREAM = 64  # requests of a stream that are under way at once
_QUESTIONS = 64  # messages of other calls that may be arriving at once
_STREAMS = 64  # that may be open at once
_LONG_BYTES = 256 << 10  # of a message that is taken apart beside the event loop

_Handler = Callable[[Any, Any], Awaitable[Any]]


class GrpcServicer:
    """The gRPC side of a service.

    Every message is read by the handlers here, not before them: so a client is known to be allowed before anything
    is read, and all messages together stay within the budget.

    Args:
        service: what it serves.
        budget: of the bytes of all requests.
        access: decides who may ask.
        sampler: knows the statistics.
    """

    def __init__(self, service: Service, budget: Budget, access: AccessControl, sampler: Sampler) -> None:
        self._service = service
        self._repository = service.repository
        self._regions = service.regions
        self._budget = budget
        self._access = access
        self._sampler = sampler
        self._streams = 0

    def add_to(self, server: Any) -> None:
        """Have a gRPC server call this."""
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        handlers = {}
        asked = Gate(_QUESTIONS)  # of their own, so that no inference keeps anybody from asking how the server is
        for method in service.methods:
            handler = getattr(self, method.name)
            if method.name == "ModelStreamInfer":
                found = grpc.stream_stream_rpc_method_handler(self._streaming(handler), None, _encode)
            else:
                kind = message_factory.GetMessageClass(method.input_type)
                infers = method.name == "ModelInfer"
                once = (
                    self._once(handler, self._budget.gate) if infers else self._once(self._parsed(handler, kind), asked)
                )
                found = grpc.stream_unary_rpc_method_handler(once, None, _encode)
            handlers[method.name] = found
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _once(self, handler: _Handler, gate: Gate) -> Any:
        """A handler of one message, given as bytes, that shows its errors as gRPC has them."""

        async def run(_: Any, context: Any) -> Any:
            held = 0
            try:
                self._admit(context)
                async with gate.passing():
                    message = await context.read()
                    if not isinstance(message, bytes):
                        raise InputError("the call ended without a message")
                    self._budget.take(len(message))
                    held = len(message)
                return await handler(message, context)
            except Exception as error:
                failure = _failure(error)
                message = None
            finally:
                self._budget.give(held)
            return await context.abort(*failure)

        return run

    def _parsed(self, handler: Any, kind: Any) -> Any:
        """A handler of a message."""

        async def run(message: bytes, context: Any) -> Any:
            try:
                request = kind.FromString(message)
            except DecodeError as error:
                raise InputError(f"the message is no {kind.DESCRIPTOR.name}") from error
            return await handler(request, context)

        return run

    def _streaming(self, handler: Any) -> Any:
        """A handler of many messages."""

        async def run(_: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._admit(context)
                if self._streams >= _STREAMS:
                    raise Busy(f"{self._streams} streams are open, which is all there may be; try again later")
                self._streams += 1
                try:
                    async for said in handler(context):
                        yield said
                finally:
                    self._streams -= 1
                return
            except Exception as error:
                failure = _failure(error)
            await context.abort(*failure)

        return run

    def _admit(self, context: Any) -> None:
        shown = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        self._access.check([value if isinstance(value, str) else "" for value in shown])

    # Inference

    async def ModelInfer(self, message: bytes, context: Any) -> Any:  # noqa: N802
        """One request."""
        left_s = context.time_remaining()
        within = left_s is not None and left_s < MOST_TIMEOUT_S  # some clients name a time that never comes
        request, raw = await self._split(message)
        return await self._infer(request, raw, len(message), int(left_s * 1e9) if within else None, context)

    async def _split(self, message: bytes) -> tuple[Any, list[memoryview]]:
        if len(message) <= _LONG_BYTES:
            return grpc_codec.split(message)
        return await asyncio.get_running_loop().run_in_executor(self._service.workers, grpc_codec.split, message)

    async def _infer(self, request: Any, raw: list[memoryview], size: int, timeout_ns: int | None, context: Any) -> Any:
        headers = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return await self._service.infer(
            request.model_name,
            request.model_version,
            lambda read: grpc_codec.parse(request, raw, read),
            grpc_codec.answer,
            long_bytes=size - sum(map(len, raw)),
            large_bytes=size,
            timeout_ns=timeout_ns,
            headers=headers,
        )

    async def ModelStreamInfer(self, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Many requests; their answers come in order, an error among them as a message."""
        running: deque[asyncio.Task[Any]] = deque()
        more = asyncio.Event()
        room = asyncio.Semaphore(_IN_STREAM)
        over = False

        async def take() -> None:
            nonlocal over
            try:
                while isinstance(message := await context.read(), bytes):
                    running.append(asyncio.ensure_future(self._streamed(message, context)))
                    del message  # held by whom it is for alone
                    more.set()
                    await room.acquire()
            finally:
                over = True
                more.set()

        taking = asyncio.ensure_future(take())
        try:
            while True:
                while running:
                    said, held = await running[0]
                    running.popleft()
                    try:
                        yield said
                    finally:
                        self._budget.give(held)
                    room.release()
                if over:
                    return
                more.clear()
                await more.wait()
        finally:
            taking.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            for left in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(left, tuple):
                    self._budget.give(left[1])

    async def _streamed(self, message: bytes, context: Any) -> tuple[Any, int]:
        """The answer to a message of a stream, and how many bytes are held for it until it is sent."""
        request = pb.ModelInferRequest()
        try:
            with self._budget.holding(len(message)):
                request, raw = await self._split(message)
                said = await self._infer(request, raw, len(message), None, context)
            held = said.ByteSize()
            self._budget.take(held)
        except Exception as error:
            _, text = _failure(error)
            name, number = request.model_name, request.model_version
            said = pb.ModelInferResponse(model_name=name, model_version=number, id=request.id)
            return pb.ModelStreamInferResponse(error_message=text, infer_response=said), 0
        if request.parameters["triton_enable_empty_final_response"].bool_param:
            said.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=said), held

    # What it is

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """All models execute requests."""
        return pb.ServerReadyResponse(ready=self._repository.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model executes requests."""
        version, _ = self._service.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=version.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The server."""
        return json_format.ParseDict(metadata.server(shared_memory=self._regions.enabled), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model's inputs and outputs."""
        version, stage = self._service.find(request.name, request.version)
        loaded = [other.number for other in self._repository.versions(version.model) if other.batcher is not None]
        return json_format.ParseDict(metadata.metadata(version, loaded, stage), pb.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A model's configuration."""
        version, stage = self._service.find(request.name, request.version)
        config = json_format.ParseDict(metadata.config(version, stage), model_config_pb2.ModelConfig())
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What was counted."""
        found = {"model_stats": self._sampler.statistics(request.name, request.version)}
        return json_format.ParseDict(found, pb.ModelStatisticsResponse())

    # The repository

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """All models."""
        said = pb.RepositoryIndexResponse()
        for v in self._repository:
            if not request.ready or v.state is VersionState.READY:
                said.models.add(name=v.model, version=v.number, state=v.state.value, reason=v.reason)
        return said

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Start a model."""
        if request.parameters:
            given = shown(list(request.parameters))
            raise InputError(f"a plan is loaded as it lies, without parameters; given: {given}")
        await self._repository.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """End a model."""
        await self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    # Shared memory

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The regions."""
        said = pb.SystemSharedMemoryStatusResponse()
        for name, region in self._regions.status(request.name).items():
            entry = said.regions[name]
            entry.name, entry.key = name, region.key
            entry.offset, entry.byte_size = region.offset, region.size_bytes
        return said

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Open one."""
        self._regions.register(Region(request.name, request.key, request.offset, request.byte_size))
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Close one, or all."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """There are none."""
        if request.name:
            raise UnknownRegion(f"region {shown(request.name)} is not registered; CUDA shared memory is not supported")
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("CUDA shared memory: this server does not have it")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """None is registered, so none is left."""
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("trace settings: this server does not have them")

    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refused."""
        raise Unsupported("log settings: this server does not have them")


def _encode(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


def _failure(error: Exception) -> tuple[Any, str]:
    """What ends a call for an error: gRPC's code, and words. Nothing of the call is kept by the error."""
    if not isinstance(error, OnnxsplitError):
        log_event(_log, logging.ERROR, "a bug", error=type(error).__name__, reason=one_line(error, _WORDS))
    forget_frames(error)
    return getattr(grpc.StatusCode, status_of(error).grpc), words(error)
