"""Requests of the Open Inference Protocol over gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineError
from runtime.gateway.protocol.inference import datatype_of
from runtime.gateway.protocol.tensor_data import to_bytes
from runtime.load.served_model import ANSWERS_IN_S, ModelServer
from runtime.load.target import EndDetail, Ended, LoadTarget

_CHANNELS = 4  # connections; each carries any number of requests
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
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


def _channel(address: str, secure: bool) -> Any:
    grpc, _ = _parts()
    if secure:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(), _OPTIONS)
    return grpc.insecure_channel(address, _OPTIONS)


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
        self._channel = _channel(address, secure)
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
        _, pb = _parts()
        self._address = address
        self._secure = secure
        self._headers = [(name.lower(), value) for name, value in headers.items()]
        self._messages = [_message(pb, model, entry) for entry in inputs]
        self._channels: list[Any] = []
        self._calls: list[Any] = []

    async def open(self) -> None:
        """Open the connections."""
        self._channels = [_channel(self._address, self._secure) for _ in range(_CHANNELS)]
        self._calls = [channel.unary_unary(_INFER) for channel in self._channels]

    async def close(self) -> None:
        """Close the connections, which cancels the requests in flight."""
        for channel in self._channels:
            channel.close()

    def start(self, number: int, ended: Ended) -> None:
        """Send a request."""
        call = self._calls[number % _CHANNELS]
        future = call.future(self._messages[number % len(self._messages)], metadata=self._headers)
        future.add_done_callback(partial(_answered, ended))


def _answered(ended: Ended, future: Any) -> None:
    """Take the end of a request, in a thread of gRPC."""
    if future.cancelled():
        ended("cancelled")
    elif (error := future.exception()) is not None:
        ended(f"gRPC {error.code().name}", EndDetail(message=str(error.details())))
    else:
        ended()


def _message(pb: Any, model: str, inputs: Mapping[str, Array]) -> bytes:
    request = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        request.raw_input_contents.append(bytes(to_bytes(array)))
    return request.SerializeToString()  # type: ignore[no-any-return]  # no stubs
