"""Requests of the Open Inference Protocol over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineError
from runtime.gateway.protocol.inference import datatype_of
from runtime.gateway.protocol.tensor_data import to_bytes
from runtime.load.served_model import ANSWERS_IN_S, ModelServer
from runtime.load.target import EndDetail, Ended, LoadTarget

_MOST_ANSWER_BYTES = 64 << 20  # of a document about a model
_CHANNELS = 4  # connections; each carries any number of requests
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


def _parts() -> tuple[Any, Any]:
    """gRPC, and the protocol's messages."""
    try:
        import grpc
        from tritonclient.grpc import service_pb2
    except ImportError as error:
        raise MissingDependency("load over gRPC needs more packages: pip install 'onnxsplit[load]'") from error
    return grpc, service_pb2


def _channel(module: Any, address: str, *, secure: bool, most_bytes: int) -> Any:
    """A channel of ``grpc`` or of ``grpc.aio``, whose answers have at most so many bytes; -1 for any number."""
    grpc, _ = _parts()
    options = [("grpc.max_receive_message_length", most_bytes), *_OPTIONS]
    if secure:
        return module.secure_channel(address, grpc.ssl_channel_credentials(), options)
    return module.insecure_channel(address, options)


class GrpcServer(ModelServer):
    """Asks a server over gRPC.

    Args:
        address: ``HOST:PORT``.
        secure: whether to use TLS.
        headers: metadata of every call.
    """

    def __init__(self, address: str, *, secure: bool, headers: Mapping[str, str]) -> None:
        self._grpc, self._pb = _parts()
        self._address = address
        self._channel = _channel(self._grpc, address, secure=secure, most_bytes=_MOST_ANSWER_BYTES)
        self._headers = [(name.lower(), value) for name, value in headers.items()]

    def models(self) -> list[str]:
        """As ``RepositoryIndex`` says, which only some servers have."""
        listed = self._ask(
            "RepositoryIndex", self._pb.RepositoryIndexRequest(ready=True), self._pb.RepositoryIndexResponse
        )
        return sorted({str(entry["name"]) for entry in (listed or {}).get("models", ())})

    def metadata(self, model: str) -> dict[str, Any]:
        """As ``ModelMetadata`` says."""
        found = self._ask("ModelMetadata", self._pb.ModelMetadataRequest(name=model), self._pb.ModelMetadataResponse)
        if found is None:
            raise InputError(f"grpc://{self._address} has no model {model!r}")
        return found

    def config(self, model: str) -> dict[str, Any]:
        """As ``ModelConfig`` says."""
        found = self._ask("ModelConfig", self._pb.ModelConfigRequest(name=model), self._pb.ModelConfigResponse)
        return (found or {}).get("config", {})  # type: ignore[no-any-return]  # JSON

    def statistics(self, model: str) -> dict[str, Any]:
        """As ``ModelStatistics`` says."""
        request = self._pb.ModelStatisticsRequest(name=model)
        return self._ask("ModelStatistics", request, self._pb.ModelStatisticsResponse) or {}

    def _ask(self, call: str, request: Any, answer: Any) -> dict[str, Any] | None:
        """The answer of a call as JSON; None where the server has nothing to say."""
        from google.protobuf.json_format import MessageToDict

        method = self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{call}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            found = method(request, timeout=ANSWERS_IN_S, metadata=self._headers)
        except self._grpc.RpcError as error:
            code = self._grpc.StatusCode
            if error.code() in (code.UNAVAILABLE, code.DEADLINE_EXCEEDED):
                raise PipelineError(
                    f"grpc://{self._address} does not answer: {one_line(Exception(error.details()), 200)}. Check the "
                    "address, and that the server runs"
                ) from None
            if error.code() in (code.UNAUTHENTICATED, code.PERMISSION_DENIED):
                raise PipelineError(
                    f"grpc://{self._address} refuses: {error.details()}; give it what it asks for with --header"
                ) from None
            return None
        return MessageToDict(found, preserving_proto_field_name=True)  # type: ignore[no-any-return]  # no stubs


class GrpcTarget(LoadTarget):
    """Sends inference requests over gRPC. Messages are made once, and answers are not decoded.

    gRPC's calls for ``asyncio`` cost about two thirds here of what its futures cost, which change threads.

    Args:
        address: as for :class:`GrpcServer`.
        model: the model's name.
        inputs: the inputs of each request; several are sent in turn.
        secure: whether to use TLS.
        headers: metadata of every call.
    """

    def __init__(
        self,
        address: str,
        model: str,
        inputs: Sequence[Mapping[str, Array]],
        *,
        secure: bool,
        headers: Mapping[str, str],
    ) -> None:
        self._grpc, pb = _parts()
        self._address = address
        self._secure = secure
        self._headers = [(name.lower(), value) for name, value in headers.items()]
        self._messages = [_message(pb, model, entry) for entry in inputs]
        self._channels: list[Any] = []
        self._calls: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open the connections."""
        self._channels = [
            _channel(self._grpc.aio, self._address, secure=self._secure, most_bytes=-1) for _ in range(_CHANNELS)
        ]
        self._calls = [channel.unary_unary(_INFER) for channel in self._channels]

    async def close(self) -> None:
        """Close the connections; requests in flight are given up."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def start(self, number: int, ended: Ended) -> None:
        """Send a request."""
        call = self._calls[number % _CHANNELS]
        task = asyncio.get_running_loop().create_task(
            self._run(call, self._messages[number % len(self._messages)], ended)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: Any, message: bytes, ended: Ended) -> None:
        try:
            await call(message, metadata=self._headers)
        except self._grpc.RpcError as error:
            ended(f"gRPC {error.code().name}", EndDetail(message=str(error.details())[:300]))
        except (ValueError, TypeError) as error:  # headers that gRPC does not take
            ended(type(error).__name__, EndDetail(message=one_line(error, 300)))
        else:
            ended()


def _message(pb: Any, model: str, inputs: Mapping[str, Array]) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        request.raw_input_contents.append(bytes(to_bytes(array)))
    return request.SerializeToString()  # type: ignore[no-any-return]  # no stubs
