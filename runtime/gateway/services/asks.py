"""What workers of services ask models: requests as those of clients, but without a protocol in between."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from onnxsplit.errors import OnnxsplitError, one_line
from onnxsplit.tensors import Array
from runtime.errors import PipelineClosed, ProtocolError
from runtime.gateway.errors import GatewayError, client_message
from runtime.gateway.protocol.inference import InferRequest, InferResponse, RequestedOutput
from runtime.gateway.service import IncomingRequest, Service, Undecoded
from runtime.gateway.services.process import WorkerProcess
from runtime.logs import log_event
from runtime.services.messages import Ask, AskFailed, AskOutputs, kind_of
from runtime.wire.codec import decode_tensors, encode_tensors

_log = logging.getLogger("runtime.gateway")


class ModelAsks:
    """Answers what the workers of one service ask.

    Args:
        service: executes requests.
        models: the names of the models in the repository, by the names that the service uses.
    """

    def __init__(self, service: Service, models: Mapping[str, str]) -> None:
        self._service = service
        self._models = models

    async def answer(self, worker: WorkerProcess, ask: Ask, frames: list[bytes]) -> None:
        """Execute a request, and send the worker its outputs or its error."""
        try:
            outputs = await self._outputs(ask, frames)
            heads, encoded = encode_tensors(outputs)
            worker.channel.send(AskOutputs(ask.ask, heads), encoded)
        except GatewayError as error:
            worker.channel.send(AskFailed(ask.ask, kind_of(PipelineClosed()), str(error)))
        except OnnxsplitError as error:
            worker.channel.send(AskFailed(ask.ask, kind_of(error), str(error)))
        except Exception as error:  # a bug; the worker must not wait for ever
            log_event(_log, logging.ERROR, "a bug", error=type(error).__name__, reason=one_line(error))
            worker.channel.send(AskFailed(ask.ask, "PipelineError", client_message(error)))

    async def _outputs(self, ask: Ask, frames: list[bytes]) -> dict[str, Array]:
        if ask.model not in self._models:
            raise ProtocolError(f"a worker asks for the model {ask.model!r}, which its service does not have")
        inputs = decode_tensors(ask.heads, frames, _nowhere)
        requested = tuple(RequestedOutput(name, binary=True) for name in ask.outputs or ())
        request = InferRequest("", inputs, requested, all_binary=True, timeout_ns=ask.timeout_ns)
        message: IncomingRequest[dict[str, Array]] = IncomingRequest(b"", None, _outputs_of, {})
        known = Undecoded(self._models[ask.model], "", lambda _: request, 0, accepted=True)
        return await self._service.infer(message, known)


def _outputs_of(response: InferResponse) -> dict[str, Array]:
    return response.outputs


def _nowhere(*_: Any) -> Array:
    raise ProtocolError("the tensors of a worker do not lie in shared memory")
