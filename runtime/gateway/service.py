"""One inference from its arrival to its answer, whatever carried it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array
from runtime.gateway.describe import split_name
from runtime.gateway.errors import Unsupported
from runtime.gateway.protocol import InferRequest, Read, Wanted, classify, to_bytes
from runtime.gateway.regions import Regions
from runtime.gateway.repository import Repository, Version, why
from runtime.gateway.spans import Spans

Said = TypeVar("Said")
Encode = Callable[[InferRequest, str, str, Mapping[str, Array], Sequence[Wanted]], Said]
"""Makes the answer of the request, model, version, outputs, and which of them are wanted how."""

_LARGE_BYTES = 4 << 20  # parsed beside the event loop


class Service:
    """What HTTP and gRPC serve.

    Args:
        repository: the models.
        regions: of shared memory.
        spans: tells of requests to OpenTelemetry; None tells nobody.
    """

    def __init__(self, repository: Repository, regions: Regions, spans: Spans | None = None) -> None:
        self.repository = repository
        self.regions = regions
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
        size_bytes: int,
        timeout_ns: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Said:
        """Run a request.

        Args:
            name: of the model.
            number: of the version; empty for the newest.
            parse: makes the request of what came, with a way to read shared memory.
            encode: makes what goes.
            size_bytes: of what came.
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
        tally = version.tally
        tally.pending += 1
        try:
            if size_bytes > _LARGE_BYTES:
                request = await asyncio.get_running_loop().run_in_executor(None, parse, self.regions.read)
            else:
                request = parse(self.regions.read)
            wanted = version.wanted(request)
            limits = [limit for limit in (timeout_ns, request.timeout_ns) if limit is not None]
            decoded = time.monotonic_ns()
            outputs, passage = await version.infer(request, wanted, decoded, arrived + min(limits) if limits else None)
            back = time.monotonic_ns()
            for output in wanted:
                if output.classes:
                    outputs[output.name] = classify(
                        outputs[output.name], output.classes, batched=version.batched and outputs[output.name].ndim > 1
                    )
                if output.place is not None:
                    self.regions.write(output.place, to_bytes(outputs[output.name]))
            said = encode(request, version.model, version.number, outputs, wanted)
            ended = time.monotonic_ns()
        except (OnnxsplitError, asyncio.CancelledError) as error:
            tally.failed(why(error), time.monotonic_ns() - arrived, str(error))
            if self._spans is not None:
                self._spans.failed(version, headers or {}, arrived, time.monotonic_ns(), error)
            raise
        finally:
            tally.pending -= 1
        entered, out = passage.entered_ns or decoded, passage.ended_ns or back
        tally.answered(
            passage.rows,
            decode_ns=decoded - arrived,
            queue_ns=entered - decoded,
            infer_ns=out - entered,
            encode_ns=ended - out,
        )
        if self._spans is not None:
            self._spans.answered(version, request.id, headers or {}, arrived, passage, ended)
        return said
