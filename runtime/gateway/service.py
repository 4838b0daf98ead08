"""One inference from its arrival to its answer, whatever carried it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from onnxsplit.tensors import Array, content_bytes
from runtime.gateway.errors import Unsupported, words
from runtime.gateway.metadata import split_name
from runtime.gateway.protocol import InferRequest, Read, RequestedOutput, classify, to_bytes
from runtime.gateway.repository import Repository, Version, why
from runtime.gateway.shared_memory import SharedMemoryRegions
from runtime.gateway.telemetry.spans import Spans

Said = TypeVar("Said")
Encode = Callable[[InferRequest, str, str, Mapping[str, Array], Sequence[RequestedOutput]], Said]
"""Makes the answer of the request, model, version, outputs, and which of them are wanted how."""

_LONG_BYTES = 256 << 10  # of what is looked at one by one: done beside the event loop
_LARGE_BYTES = 4 << 20  # of what is copied only
_WORDS = 500  # of an error that are remembered


class Service:
    """What HTTP and gRPC serve.

    Args:
        repository: the models.
        regions: of shared memory.
        workers: where what takes long is done, beside the event loop. Few, so that few large requests are unfolded
            at once.
        spans: tells of requests to OpenTelemetry; None tells nobody.
    """

    def __init__(
        self, repository: Repository, regions: SharedMemoryRegions, workers: Executor, spans: Spans | None = None
    ) -> None:
        self.repository = repository
        self.regions = regions
        self.workers = workers
        self._spans = spans

    def find(self, name: str, number: str = "") -> tuple[Version, int | None]:
        """A version, and a stage of it when the name is a stage's.

        Raises:
            UnknownModel: there is none such.
        """
        model, stage = split_name(name, self.repository.models)
        version = self.repository.find(model, number)
        if stage is not None and stage >= len(version.plan.stages):
            return self.repository.find(name, number), None
        return version, stage

    async def infer(
        self,
        name: str,
        number: str,
        parse: Callable[[Read], InferRequest],
        encode: Encode[Said],
        *,
        long_bytes: int,
        large_bytes: int,
        timeout_ns: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Said:
        """Run a request.

        Args:
            name: of the model.
            number: of the version; empty for the newest.
            parse: makes the request of what came, with a way to read shared memory.
            encode: makes what goes.
            long_bytes: of what came, those that are looked at one by one.
            large_bytes: those that are copied only.
            timeout_ns: the carrier's own limit.
            headers: that tell where a trace began.

        Raises:
            OnnxsplitError: as :func:`~runtime.gateway.errors.status_of` knows them.
        """
        arrived = time.monotonic_ns()
        found, stage = self.find(name, number)
        if stage is not None:
            raise Unsupported(f"{name!r} is a stage and runs only as part of its model; ask {found.model!r}")
        version = self.repository.loaded(found.model, number)
        counters = version.counters
        counters.pending += 1
        try:
            takes_long = long_bytes > _LONG_BYTES or large_bytes > _LARGE_BYTES or self.regions.any
            request: InferRequest = await self._beside(takes_long, parse, self.regions.reader())
            wanted = version.wanted(request)
            limits = [limit for limit in (timeout_ns, request.timeout_ns) if limit is not None]
            decoded = time.monotonic_ns()
            outputs, inference = await version.infer(
                request, wanted, decoded, arrived + min(limits) if limits else None
            )
            back = time.monotonic_ns()
            said: Said = await self._beside(
                _takes_long(wanted, outputs), self._answer, version, request, wanted, outputs, encode
            )
            ended = time.monotonic_ns()
        except (Exception, asyncio.CancelledError) as error:
            counters.failed(why(error), time.monotonic_ns() - arrived, words(error, _WORDS))
            if self._spans is not None:
                self._spans.failed(version, headers or {}, arrived, time.monotonic_ns(), error)
            raise
        finally:
            counters.pending -= 1
        entered, out = inference.entered_ns or decoded, inference.ended_ns or back
        counters.answered(
            inference.rows,
            decode_ns=decoded - arrived,
            queue_ns=entered - decoded,
            infer_ns=out - entered,
            encode_ns=ended - out,
        )
        if self._spans is not None:
            self._spans.answered(version, request.id, headers or {}, arrived, inference, ended)
        return said

    async def _beside(self, takes_long: bool, work: Callable[..., Any], *given: object) -> Any:
        """Do some work: at once, or beside the event loop where it takes long."""
        if not takes_long:
            return work(*given)
        return await asyncio.get_running_loop().run_in_executor(self.workers, work, *given)

    def _answer(
        self,
        version: Version,
        request: InferRequest,
        wanted: Sequence[RequestedOutput],
        outputs: dict[str, Array],
        encode: Encode[Said],
    ) -> Said:
        """What goes back, with what goes into shared memory written there."""
        for output in wanted:
            if output.classes:
                array = outputs[output.name]
                outputs[output.name] = classify(array, output.classes, batched=version.batched and array.ndim > 1)
            if output.region_slice is not None:
                self.regions.write(output.region_slice, to_bytes(outputs[output.name]))
        return encode(request, version.model, version.number, outputs, wanted)


def _takes_long(wanted: Sequence[RequestedOutput], outputs: Mapping[str, Array]) -> bool:
    """True when an answer is better made beside the event loop."""
    long = large = 0
    for output in wanted:
        array = outputs[output.name]
        if output.region_slice is not None or (output.binary and not output.classes and array.dtype != object):
            large += array.nbytes
        else:
            long += content_bytes(array)
    return long > _LONG_BYTES or large > _LARGE_BYTES
