"""One inference from its arrival to its response, independent of the protocol that carries it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct

from onnxsplit.tensors import Array, content_bytes
from runtime.gateway.batcher import Inference
from runtime.gateway.counters import failure_reason
from runtime.gateway.errors import GatewayError, NotLoaded, Unsupported, client_message
from runtime.gateway.models.repository import Repository
from runtime.gateway.models.version import TEXT, Part, Version, split_name
from runtime.gateway.prepared import PreparedRequest, PreparedRequests, Recalled
from runtime.gateway.protocol.inference import (
    InferRequest,
    InferResponse,
    ReadRegion,
    RequestedOutput,
    SequencePlace,
)
from runtime.gateway.protocol.tensor_data import classify, to_bytes
from runtime.gateway.response_cache import ResponseCache
from runtime.gateway.sequences import SequenceStep
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.spans import Spans
from runtime.gateway.telemetry.slowest import SlowRequest
from runtime.gateway.threads import Workers, takes_long

if TYPE_CHECKING:
    from runtime.gateway.services.pool import ServicePool

Encoded = TypeVar("Encoded")
_MESSAGE_CHARACTERS = 500  # characters that are kept of an error


class IncomingRequest(Struct, Generic[Encoded]):
    """A request as a protocol carries it.

    Attributes:
        data: The whole message.
        key: What says how the message is decoded, beside its bytes; see :class:`.PreparedRequests`.
        encode: Encodes the response.
        headers: Headers that may name the caller's trace, if :attr:`Service.traces`.
        timeout_ns: Time limit of the protocol; None for no limit.
    """

    data: bytes | bytearray
    key: Hashable
    encode: Callable[[InferResponse], Encoded]
    headers: Mapping[str, str]
    timeout_ns: int | None = None


class Undecoded(Struct):
    """What is known of a request whose like was not executed before.

    Attributes:
        name: Name of the model.
        number: Number of the version; empty for the newest one.
        parse: Decodes the request; gets a function that reads shared memory.
        parsed_bytes: Bytes of the message that are looked at one by one.
        sequence: The sequence that the request belongs to, where that is known before it is decoded. Requests of a
            sequence are executed in the order in which they arrive, or else in which they were decoded.
        accepted: Whether it is part of a request that was accepted, so that it is executed while the server stops.
    """

    name: str
    number: str
    parse: Callable[[ReadRegion], InferRequest]
    parsed_bytes: int
    sequence: Callable[[], SequencePlace | None] = lambda: None
    accepted: bool = False


class _Execution(Struct):
    """A request that was decoded and checked."""

    prepared: PreparedRequest
    inputs: Mapping[str, Array]
    decoded_ns: int
    deadline_ns: int | None
    step: SequenceStep | None


class Service:
    """The models as both HTTP and gRPC serve them.

    Args:
        repository: The models.
        regions: Shared memory of clients.
        workers: Threads for work that takes long.
        spans: Records requests for OpenTelemetry; None records nothing.
        cache: Answers requests whose inputs were seen before; None runs all.

    Attributes:
        pools: The workers of services, which ask the models.
        astray: Requests that asked for a model that is not here, or that executes none.
        last_astray: What the caller of the last of them was told.
    """

    def __init__(
        self,
        repository: Repository,
        regions: SharedMemoryRegions,
        workers: Workers,
        spans: Spans | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.repository = repository
        self.regions = regions
        self.workers = workers
        self.cache = cache
        self._spans = spans
        self._prepared = PreparedRequests()
        self.pools: Sequence[ServicePool] = ()
        self.astray = 0
        self.last_astray = ""

    @property
    def traces(self) -> bool:
        """Whether requests are recorded for OpenTelemetry, so that their headers matter."""
        return self._spans is not None

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

    def _executable(self, name: str, number: str, *, accepted: bool = False) -> Version:
        """The version that executes requests for a model."""
        version, part = self.find(name, number)
        if isinstance(part, int):
            raise Unsupported(f"{name!r} is a stage and runs only as part of its model; ask {version.model!r}")
        if part == TEXT:
            raise Unsupported(f"{name!r} answers in parts; use ModelStreamInfer, or /generate and /generate_stream")
        return self.repository.loaded(version.model, number, accepted=accepted)

    def _asked(self, known: Undecoded) -> Version:
        """The version that a request asks for; requests that ask for none are counted."""
        try:
            return self._executable(known.name, known.number, accepted=known.accepted)
        except GatewayError as error:
            if not isinstance(error, NotLoaded):
                self.astray += 1
                self.last_astray = client_message(error, _MESSAGE_CHARACTERS)
            raise

    def recall(self, message: IncomingRequest[Any]) -> Recalled | None:
        """What is known of a request; None if its like was not executed before, or models have changed since then."""
        if self.repository.ending:
            return None
        return self._prepared.find(self.repository.changes, message.key, message.data)

    async def infer(self, message: IncomingRequest[Encoded], known: Recalled | Undecoded) -> Encoded:
        """Execute one request, and return its encoded response.

        Args:
            message: The request.
            known: What :meth:`recall` returned, if anything.

        Raises:
            OnnxsplitError: The request failed. :func:`~runtime.gateway.errors.status_of` gives the status.
        """
        arrived = time.monotonic_ns()
        version = self._asked(known) if isinstance(known, Undecoded) else known[0].version
        counters = version.counters
        counters.pending += 1
        step = None
        try:
            step = version.join(known.sequence()) if isinstance(known, Undecoded) else None
            prepared, inputs = await self._prepare(version, message, known) if isinstance(known, Undecoded) else known
            step = step or version.join(prepared.request.sequence)
            requested = prepared.requested
            decoded = time.monotonic_ns()
            deadline = _deadline(arrived, message.timeout_ns, prepared.request.timeout_ns)
            execution = _Execution(prepared, inputs, decoded, deadline, step)
            cached = self.cache is not None and step is None
            outputs, run = await (self._find(execution) if cached else self._execute(execution))
            returned = time.monotonic_ns()
            response = InferResponse(prepared.request.id, version.model, version.number, outputs, requested)
            long = _encoding_takes_long(requested, outputs)
            encoded: Encoded = await self.workers.run(long, self._encode, version, response, message.encode)
            if step is not None:
                step.keep()
            ended = time.monotonic_ns()
        except (Exception, asyncio.CancelledError) as error:
            self._failed(version, error, arrived, message.headers)
            raise
        finally:
            counters.pending -= 1
            if step is not None:
                step.leave()
        if run is None:
            counters.answered(
                0, decode_ns=decoded - arrived, queue_ns=0, infer_ns=returned - decoded, encode_ns=ended - returned
            )
            return encoded
        _count(version, run, (arrived, decoded, returned, ended))
        if self._spans is not None:
            self._spans.answered(version, prepared.request.id, message.headers, arrived, run, ended)
        return encoded

    async def _execute(self, execution: _Execution) -> tuple[dict[str, Array], Inference | None]:
        prepared = execution.prepared
        if execution.step is not None:
            return await execution.step.run(
                prepared.batcher, prepared.request, prepared.requested, execution.decoded_ns, execution.deadline_ns
            )
        assert prepared.checked is not None
        return await prepared.batcher.run(
            execution.inputs, prepared.checked, execution.decoded_ns, execution.deadline_ns, prepared.request.priority
        )

    async def _find(self, execution: _Execution) -> tuple[dict[str, Array], Inference | None]:
        """The outputs from the cache, or else those of a run, which the cache then keeps."""
        assert self.cache is not None
        prepared, begun = execution.prepared, time.monotonic_ns()
        version, checked = prepared.version, prepared.checked
        assert checked is not None
        names, long = checked.selection.names, takes_long(copied_bytes=checked.size_bytes)
        key = await self.workers.run(long, self.cache.key, version.fingerprint, names, execution.inputs)
        found = self.cache.find(key)
        if found is not None:
            version.counters.cache_hit.add(time.monotonic_ns() - begun)
            return found, None
        looked = time.monotonic_ns()
        outputs, inference = await self._execute(execution)
        self.cache.keep(key, outputs)
        version.counters.cache_miss.add(looked - begun)
        return outputs, inference

    async def _prepare(self, version: Version, message: IncomingRequest[Any], known: Undecoded) -> Recalled:
        """Decode and check a request, and remember it."""
        changes = self.repository.changes  # decoding may take long, and models may change meanwhile
        long = takes_long(parsed_bytes=known.parsed_bytes, copied_bytes=len(message.data)) or self.regions.any
        request = await self.workers.run(long, known.parse, self.regions.reader())
        requested = version.requested(request)
        batcher, checked = version.check(request, requested)
        prepared = PreparedRequest(version, batcher, request, requested, checked)
        self._prepared.learn(changes, message.key, message.data, prepared)
        return prepared, request.inputs

    def _failed(self, version: Version, error: BaseException, arrived_ns: int, headers: Mapping[str, str]) -> None:
        now = time.monotonic_ns()
        reason, message = failure_reason(error), client_message(error, _MESSAGE_CHARACTERS)
        version.counters.failed(reason, now - arrived_ns, message)
        if now - arrived_ns > version.counters.slowest.least_ns:
            version.counters.slowest.add(SlowRequest(arrived_ns, 0, 0, 0, 0, now, reason=reason, message=message))
        if self._spans is not None:
            self._spans.failed(version, headers, arrived_ns, now, error)

    def _encode(self, version: Version, response: InferResponse, encode: Callable[[InferResponse], Encoded]) -> Encoded:
        """The encoded response. Outputs that are requested in shared memory are written there."""
        outputs = response.outputs
        for output in response.requested:
            if output.classes:
                array = outputs[output.name]
                outputs[output.name] = classify(array, output.classes, batched=version.batched and array.ndim > 1)
            if output.region_slice is not None:
                self.regions.write(output.region_slice, to_bytes(outputs[output.name]))
        return encode(response)


def _deadline(arrived_ns: int, *limits_ns: int | None) -> int | None:
    """When a request's time is over: after the shortest of some limits."""
    given = [limit for limit in limits_ns if limit is not None]
    return arrived_ns + min(given) if given else None


def _count(version: Version, inference: Inference, times_ns: tuple[int, int, int, int]) -> None:
    """Count an answered request by its times of arrival, decoding, return from the pipeline, and response."""
    arrived, decoded, returned, ended = times_ns
    entered, left = inference.entered_ns or decoded, inference.ended_ns or returned
    version.counters.answered(
        inference.checked.rows,
        decode_ns=decoded - arrived,
        queue_ns=entered - decoded,
        infer_ns=left - entered,
        encode_ns=ended - left,
    )
    if ended - arrived > version.counters.slowest.least_ns:
        slowest, refused, visits = version.counters.slowest, inference.refused_ns, inference.visits
        slowest.add(SlowRequest(arrived, decoded, refused, entered, left, ended, visits, slowest.others))


def _encoding_takes_long(requested: Sequence[RequestedOutput], outputs: Mapping[str, Array]) -> bool:
    parsed = copied = 0
    for output in requested:
        array = outputs[output.name]
        if output.region_slice is not None or (output.binary and not output.classes and array.dtype != object):
            copied += array.nbytes
        else:
            parsed += content_bytes(array)
    return takes_long(parsed_bytes=parsed, copied_bytes=copied)
