"""A pipeline whose requests are joined into batches as the gateway joins them, as the target of a load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from onnxsplit.errors import one_line
from onnxsplit.tensors import Array
from runtime.gateway.batcher import Batcher
from runtime.gateway.counters import Counters
from runtime.gateway.queue import Limits
from runtime.load.driver import MOST_OUTSTANDING
from runtime.load.target import EndDetail, Ended, LoadTarget
from runtime.pipeline import Pipeline


class BatchedTarget(LoadTarget):
    """Sends requests to a pipeline through the gateway's queue. From then on only event loops get its results.

    Args:
        pipeline: the pipeline, which runs batches of ``max_batch`` rows at once. It stays open.
        inputs: the inputs of requests, by name; several are sent in turn.
        max_batch: most rows of a batch.
    """

    def __init__(self, pipeline: Pipeline, inputs: Sequence[Mapping[str, Array]], *, max_batch: int) -> None:
        self._pipeline = pipeline
        self._inputs = inputs
        self._limits = Limits(requests=MOST_OUTSTANDING, size_bytes=1 << 40, max_batch=max_batch)
        self._batcher: Batcher | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Take the pipeline's results in this loop."""
        self._batcher = Batcher(self._pipeline, self._limits, Counters())

    async def close(self) -> None:
        """Give up the requests in flight."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.empty()
            self._batcher.close()

    def start(self, number: int, ended: Ended) -> None:
        """Put a request into the queue."""
        task = asyncio.get_running_loop().create_task(self._run(self._inputs[number % len(self._inputs)], ended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, inputs: Mapping[str, Array], ended: Ended) -> None:
        assert self._batcher is not None
        try:
            checked = self._batcher.check(inputs, self._pipeline.plan.outputs)
            await self._batcher.run(inputs, checked, time.monotonic_ns(), None)
        except Exception as error:
            ended(type(error).__name__, EndDetail(message=one_line(error)))
        else:
            ended()
