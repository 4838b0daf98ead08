"""The gateway's gRPC side: ``inference.GRPCInferenceService``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import msgspec
from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from onnxsplit.errors import InputError, OnnxsplitError, one_line, shown
from runtime.errors import Busy
from runtime.gateway.access import AccessControl
from runtime.gateway.budget import Budget
from runtime.gateway.errors import UnknownRegion, Unsupported, clear_frames, client_message, status_of
from runtime.gateway.grpc import codec
from runtime.gateway.grpc.stream import InferStream
from runtime.gateway.models import metadata
from runtime.gateway.protocol.documents import Statistics, VersionState
from runtime.gateway.protocol.inference import InferResponse
from runtime.gateway.receive_limit import ReceiveLimit
from runtime.gateway.service import IncomingRequest, Service, Undecoded
from runtime.gateway.shared_memory import Region
from runtime.gateway.telemetry.sampler import Sampler
from runtime.gateway.texts import Texts
from runtime.gateway.threads import takes_long
from runtime.logs import log_event
from runtime.requests.normalize import MOST_TIMEOUT_S

_log = logging.getLogger("runtime.gateway")
_MESSAGE_CHARACTERS = 500
_MOST_ARRIVING = 64  # messages of calls other than inferences that arrive at once
_PROBES = ("ServerLive", "ServerReady")  # calls of probes, which need no token
_MOST_STREAMS = 64  # open at once

T = TypeVar("T")
_Handler = Callable[[Any, Any], Awaitable[Any]]


class GrpcServicer:
    """The gRPC side of a service.

    The handlers read every message themselves, so that access is checked before anything is read and all messages
    together stay within the budget.

    Args:
        service: The models.
        budget: Memory for all requests.
        access: Decides which requests are allowed.
        sampler: Provides the statistics.
        texts: Completes texts.
    """

    def __init__(self, service: Service, budget: Budget, access: AccessControl, sampler: Sampler, texts: Texts) -> None:
        self._service = service
        self._repository = service.repository
        self._regions = service.regions
        self._budget = budget
        self._access = access
        self._sampler = sampler
        self._texts = texts
        self._streams = 0

    def add_to(self, server: Any) -> None:
        """Register the handlers with a gRPC server."""
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        handlers = {}
        # A separate limit, so that clients can ask for the server's state while inferences arrive.
        arriving = ReceiveLimit(_MOST_ARRIVING)
        for method in service.methods:
            handler = getattr(self, method.name)
            if method.name == "ModelStreamInfer":
                method_handler = grpc.stream_stream_rpc_method_handler(self._streaming(handler), None, _encode)
            elif method.name == "ModelInfer":
                once = self._once(handler, self._budget.receive_limit)
                method_handler = grpc.stream_unary_rpc_method_handler(once, None, _encode)
            else:
                kind = message_factory.GetMessageClass(method.input_type)
                once = self._once(self._parsed(handler, kind), arriving, open_to_all=method.name in _PROBES)
                method_handler = grpc.stream_unary_rpc_method_handler(once, None, _encode)
            handlers[method.name] = method_handler
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _once(self, handler: _Handler, receive_limit: ReceiveLimit, *, open_to_all: bool = False) -> Any:
        """A gRPC handler of calls with one message. It gives ``handler`` the bytes, and ends with a code for errors.

        Args:
            handler: Answers a message.
            receive_limit: Limits the messages that arrive at the same time.
            open_to_all: True for a call that needs no token.
        """

        async def run(_: Any, context: Any) -> Any:
            held = 0
            try:
                if not open_to_all:
                    self._admit(context)
                message = await receive_limit.receive(context.read)
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
        """A handler that parses the bytes into a message of ``kind`` first."""

        async def run(message: bytes, context: Any) -> Any:
            try:
                request = kind.FromString(message)
            except DecodeError as error:
                raise InputError(f"the message is not a {kind.DESCRIPTOR.name}") from error
            return await handler(request, context)

        return run

    def _streaming(self, handler: Any) -> Any:
        """A gRPC handler of calls with a stream of messages."""

        async def run(_: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._admit(context)
                if self._streams >= _MOST_STREAMS:
                    raise Busy(f"{self._streams} streams are open, which is the limit; try again later")
                self._streams += 1
                try:
                    async for response in handler(context):
                        yield response
                finally:
                    self._streams -= 1
                return
            except Exception as error:
                failure = _failure(error)
            await context.abort(*failure)

        return run

    def _admit(self, context: Any) -> None:
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        self._access.check([value if isinstance(value, str) else "" for value in given])

    # Inference

    async def ModelInfer(self, message: bytes, context: Any) -> Any:  # noqa: N802
        """Execute one request."""
        left_s = context.time_remaining()
        limited = left_s is not None and left_s < MOST_TIMEOUT_S  # some clients send a time in the far future
        request = self._incoming(message, codec.encode, context, int(left_s * 1e9) if limited else None)
        known = self._service.recall(request) or _undecoded(message, await self._split(message))
        return await self._service.infer(request, known)

    async def _split(self, message: bytes) -> codec.SplitRequest:
        return await self._service.workers.run(takes_long(parsed_bytes=len(message)), codec.split, message)

    def _incoming(
        self, message: bytes, encode: Callable[[InferResponse], T], context: Any, timeout_ns: int | None
    ) -> IncomingRequest[T]:
        headers = {}
        if self._service.traces:
            headers = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return IncomingRequest(message, ("ModelInfer", len(message)), encode, headers, timeout_ns)

    async def ModelStreamInfer(self, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Execute a stream of requests. An error is a message among the responses."""

        async def infer(message: bytes, split: codec.SplitRequest) -> Any:
            request = self._incoming(message, codec.answer, context, None)
            return await self._service.infer(request, _undecoded(message, split))

        stream = InferStream(
            context.read,
            self._split,
            infer,
            self._texts,
            self._service.workers,
            self._budget,
            lambda error: _failure(error)[1],
        )
        async with aclosing(stream.responses()) as responses:
            async for response in responses:
                yield response

    # Server and models

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say that the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say whether all models execute requests."""
        return pb.ServerReadyResponse(ready=self._repository.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say whether a model executes requests."""
        version, _ = self._service.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=version.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Describe the server."""
        return _message(metadata.server(shared_memory=self._regions.enabled), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Describe a model's inputs and outputs."""
        version, stage = self._service.find(request.name, request.version)
        loaded = self._repository.loaded_numbers(version.model)
        return _message(metadata.metadata(version, loaded, stage), pb.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Give a model's configuration."""
        version, stage = self._service.find(request.name, request.version)
        config = _message(metadata.config(version, stage), model_config_pb2.ModelConfig())
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Give statistics of a model, of a stage, or of all."""
        statistics = Statistics(self._sampler.statistics(request.name, request.version))
        return _message(statistics, pb.ModelStatisticsResponse())

    # Repository

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List all models."""
        response = pb.RepositoryIndexResponse()
        for v in self._repository:
            if not request.ready or v.state is VersionState.READY:
                response.models.add(name=v.model, version=v.number, state=v.state.value, reason=v.reason)
        return response

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Load a model."""
        if request.parameters:
            given = shown(list(request.parameters))
            raise InputError(f"a model is loaded without parameters; given: {given}")
        await self._repository.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Unload a model."""
        await self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    # Shared memory

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the regions, or one."""
        response = pb.SystemSharedMemoryStatusResponse()
        for name, region in self._regions.status(request.name).items():
            entry = response.regions[name]
            entry.name, entry.key = name, region.key
            entry.offset, entry.byte_size = region.offset, region.size_bytes
        return response

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Register a region."""
        self._regions.register(Region(request.name, request.key, request.offset, request.byte_size))
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Unregister a region, or all."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the regions, of which there are none."""
        if request.name:
            raise UnknownRegion(f"region {shown(request.name)} is not registered; CUDA shared memory is not supported")
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse, since the server does not have this."""
        raise Unsupported("this server does not have CUDA shared memory")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Do nothing, because no region can be registered."""
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse, since the server does not have this."""
        raise Unsupported("this server does not have trace settings")

    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse, since the server does not have this."""
        raise Unsupported("this server does not have log settings")


def _undecoded(message: bytes, split: codec.SplitRequest) -> Undecoded:
    asked, raw = split
    return Undecoded(
        asked.model_name,
        asked.model_version,
        lambda read: codec.parse(asked, raw, read),
        len(message) - sum(map(len, raw)),
        lambda: codec.sequence_of(asked),
    )


def _encode(message: Any) -> bytes:
    encoded: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return encoded


def _message(document: Any, message: Any) -> Any:
    """A protobuf message filled with a document of :mod:`runtime.gateway.protocol.documents`."""
    return json_format.ParseDict(msgspec.to_builtins(document), message)


def _failure(error: Exception) -> tuple[Any, str]:
    """The gRPC code and the message with which a call ends. Data of the call is removed from the error."""
    if not isinstance(error, OnnxsplitError):
        reason = one_line(error, _MESSAGE_CHARACTERS)
        log_event(_log, logging.ERROR, "a bug", error=type(error).__name__, reason=reason)
    clear_frames(error)
    return getattr(grpc.StatusCode, status_of(error).grpc), client_message(error)
