"""One inference from its arrival to its response, independent of the protocol that carries it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from onnxsplit.tensors import Array, content_bytes
from runtime.gateway.batcher import Inference
from runtime.gateway.counters import failure_reason
from runtime.gateway.errors import Unsupported, client_message
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import TEXT, Part, Version, split_name
from runtime.gateway.protocol.inference import InferRequest, InferResponse, ReadRegion, RequestedOutput
from runtime.gateway.protocol.tensor_data import classify, to_bytes
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.spans import Spans
from runtime.gateway.threads import Workers, takes_long

Encoded = TypeVar("Encoded")
Encode = Callable[[InferResponse], Encoded]
"""Encodes a response for the protocol that carries it."""

_MESSAGE_CHARACTERS = 500  # characters that are kept of an error


class Service:
    """The models as both HTTP and gRPC serve them.

    Args:
        repository: The models.
        regions: Shared memory of clients.
        workers: Threads for work that takes long.
        spans: Records requests for OpenTelemetry; None records nothing.
    """

    def __init__(
        self, repository: Repository, regions: SharedMemoryRegions, workers: Workers, spans: Spans | None = None
    ) -> None:
        self.repository = repository
        self.regions = regions
        self.workers = workers
        self._spans = spans

    def find(self, name: str, number: str = "") -> tuple[Version, Part]:
        """The version of a model, and the part of it that ``name`` stands for.

        Raises:
            UnknownModel: There is no such model, version or part.
        """
        model, part = split_name(name, self.repository.models)
        version = self.repository.find(model, number)
        if (isinstance(part, int) and part >= len(version.plan.stages)) or (part == TEXT and not version.has_text):
            return self.repository.find(name, number), None
        return version, part

    def _executable(self, name: str, number: str) -> Version:
        """The version that executes requests for a model."""
        version, part = self.find(name, number)
        if isinstance(part, int):
            raise Unsupported(f"{name!r} is a stage and runs only as part of its model; ask {version.model!r}")
        if part == TEXT:
            raise Unsupported(f"{name!r} answers in parts; use ModelStreamInfer, or /generate and /generate_stream")
        return self.repository.loaded(version.model, number)

    async def infer(
        self,
        name: str,
        number: str,
        parse: Callable[[ReadRegion], InferRequest],
        encode: Encode[Encoded],
        *,
        parsed_bytes: int,
        copied_bytes: int,
        timeout_ns: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Encoded:
        """Execute one request.

        Args:
            name: Name of the model.
            number: Number of the version; empty for the newest one.
            parse: Decodes the request; gets a function that reads shared memory.
            encode: Encodes the response.
            parsed_bytes: Bytes of the request that are looked at one by one.
            copied_bytes: Bytes of the request altogether.
            timeout_ns: Time limit of the protocol that carries the request; None for no limit.
            headers: Headers that may name the caller's trace.

        Raises:
            OnnxsplitError: The request failed. :func:`~runtime.gateway.errors.status_of` gives the status.
        """
        arrived = time.monotonic_ns()
        version = self._executable(name, number)
        counters = version.counters
        counters.pending += 1
        try:
            long = takes_long(parsed_bytes=parsed_bytes, copied_bytes=copied_bytes) or self.regions.any
            request = await self.workers.run(long, parse, self.regions.reader())
            requested = version.requested(request)
            limits = [limit for limit in (timeout_ns, request.timeout_ns) if limit is not None]
            decoded = time.monotonic_ns()
            deadline = arrived + min(limits) if limits else None
            outputs, inference = await version.infer(request, requested, decoded, deadline)
            returned = time.monotonic_ns()
            long = _encoding_takes_long(requested, outputs)
            response = InferResponse(request.id, version.model, version.number, outputs, requested)
            encoded: Encoded = await self.workers.run(long, self._encode, version, response, encode)
            ended = time.monotonic_ns()
        except (Exception, asyncio.CancelledError) as error:
            self._failed(version, error, arrived, headers)
            raise
        finally:
            counters.pending -= 1
        _count(version, inference, (arrived, decoded, returned, ended))
        if self._spans is not None:
            self._spans.answered(version, request.id, headers or {}, arrived, inference, ended)
        return encoded

    def _failed(
        self, version: Version, error: BaseException, arrived_ns: int, headers: Mapping[str, str] | None
    ) -> None:
        now = time.monotonic_ns()
        version.counters.failed(failure_reason(error), now - arrived_ns, client_message(error, _MESSAGE_CHARACTERS))
        if self._spans is not None:
            self._spans.failed(version, headers or {}, arrived_ns, now, error)

    def _encode(self, version: Version, response: InferResponse, encode: Encode[Encoded]) -> Encoded:
        """The encoded response. Outputs that are requested in shared memory are written there."""
        outputs = response.outputs
        for output in response.requested:
            if output.classes:
                array = outputs[output.name]
                outputs[output.name] = classify(array, output.classes, batched=version.batched and array.ndim > 1)
            if output.region_slice is not None:
                self.regions.write(output.region_slice, to_bytes(outputs[output.name]))
        return encode(response)


def _count(version: Version, inference: Inference, times_ns: tuple[int, int, int, int]) -> None:
    """Count an answered request by its times of arrival, decoding, return from the pipeline, and response."""
    arrived, decoded, returned, ended = times_ns
    entered, left = inference.entered_ns or decoded, inference.ended_ns or returned
    version.counters.answered(
        inference.rows,
        decode_ns=decoded - arrived,
        queue_ns=entered - decoded,
        infer_ns=left - entered,
        encode_ns=ended - left,
    )


def _encoding_takes_long(requested: Sequence[RequestedOutput], outputs: Mapping[str, Array]) -> bool:
    parsed = copied = 0
    for output in requested:
        array = outputs[output.name]
        if output.region_slice is not None or (output.binary and not output.classes and array.dtype != object):
            copied += array.nbytes
        else:
            parsed += content_bytes(array)
    return takes_long(parsed_bytes=parsed, copied_bytes=copied)
