"""A pipeline in this process as the target of a load."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from onnxsplit.errors import OnnxsplitError, one_line
from onnxsplit.tensors import Array
from runtime.errors import Busy
from runtime.load.target import EndDetail, Ended, LoadTarget
from runtime.pipeline import Pipeline


class PipelineTarget(LoadTarget):
    """Sends requests to a pipeline. Those that it does not admit yet wait here, and that time is part of their latency.

    Args:
        pipeline: the pipeline. It stays open.
        inputs: the inputs of requests, by name; several are sent in turn.
        outputs: names of the outputs to ask for; all when None.
    """

    def __init__(
        self, pipeline: Pipeline, inputs: Sequence[Mapping[str, Array]], *, outputs: Sequence[str] | None = None
    ) -> None:
        self._pipeline = pipeline
        self._inputs = inputs
        self._outputs = outputs
        self._waiting: deque[tuple[int, Ended]] = deque()
        self._sent: set[Future[dict[str, Array]]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        """Remember the loop."""
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Cancel the requests in flight."""
        self._loop = None
        self._waiting.clear()
        for future in tuple(self._sent):
            future.cancel()

    def start(self, number: int, ended: Ended) -> None:
        """Send a request, after those that wait."""
        self._waiting.append((number, ended))
        if len(self._waiting) == 1:
            self._send()

    def _send(self) -> None:
        """Send the requests that wait, as far as the pipeline admits them."""
        while self._waiting and self._loop is not None:
            number, ended = self._waiting[0]
            releases = self._pipeline.admission.releases
            try:
                future = self._pipeline.submit(
                    self._inputs[number % len(self._inputs)], outputs=self._outputs, block=False
                )
            except Busy:
                self._pipeline.admission.when_released(releases, self._send_in_loop)
                return
            except OnnxsplitError as error:
                self._waiting.popleft()
                ended(type(error).__name__, EndDetail(message=str(error)))
                continue
            self._waiting.popleft()
            self._sent.add(future)
            future.add_done_callback(partial(self._answered, ended))

    def _send_in_loop(self) -> None:
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._send)

    def _answered(self, ended: Ended, future: Future[dict[str, Array]]) -> None:
        """Take the end of a request, in the pipeline's thread."""
        self._sent.discard(future)
        if future.cancelled():
            ended("Cancelled")
            return
        error = future.exception()
        if error is None:
            ended()
        else:
            ended(type(error).__name__, EndDetail(message=one_line(error)))
