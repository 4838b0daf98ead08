"""Starts and ends the pipelines of versions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan_files import load_plan
from runtime.errors import PipelineClosed
from runtime.gateway.batcher import Batcher
from runtime.gateway.counters import Counters
from runtime.gateway.errors import NotLoaded, client_message
from runtime.gateway.models.grace import ReadyGrace
from runtime.gateway.models.version import Version
from runtime.gateway.models.warmup import Warmup
from runtime.gateway.protocol.documents import VersionState
from runtime.gateway.queue import Limits
from runtime.gateway.sequences import SequenceOptions
from runtime.logs import log_event
from runtime.pipeline import Pipeline
from runtime.requests.microbatch import batch_axes

_LOOK_S = 0.05  # between two looks at texts that are to end
_log = logging.getLogger("runtime.gateway")

StartPipeline = Callable[[Path, Callable[[], bool]], Pipeline]
"""Starts the pipeline of a plan. Blocks until its nodes are ready, or until the given function returns True."""


class Loader:
    """Starts and ends the pipelines of versions. It is made within the event loop of the server.

    Args:
        start: Starts a pipeline.
        limits: Limits of the queue before each pipeline.
        warmup: Requests that a version answers before it is ready.
        sequences: How the states of sequences are kept.
        grace_s: Seconds for which a version that was ready stays ready after a stage lost its last node.

    Attributes:
        changes: How often a version began or ceased to take requests.
    """

    def __init__(
        self,
        start: StartPipeline,
        limits: Limits,
        warmup: Warmup | None = None,
        sequences: SequenceOptions | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self._start = start
        self._limits = limits
        self._warmup = warmup or Warmup()
        self._sequences = sequences or SequenceOptions()
        self._grace_s = grace_s
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()  # accepted requests have _patience_s
        self._patience_s = 0.0
        self.changes = 0

    def stop(self) -> None:
        """Start nothing more, and give up what is being started."""
        self._stopping.set()

    def end(self, patience_s: float) -> None:
        """Wait for accepted requests no longer than so many seconds from now on."""
        self.stop()
        self._patience_s = patience_s
        self._ended.set()

    async def load(self, version: Version, reason: str = "it is being loaded") -> None:
        """Start the pipeline of a version. ``reason`` says meanwhile why it takes no requests.

        Raises:
            OnnxsplitError: It did not start; the version's reason says why.
        """
        version.state, version.reason = VersionState.LOADING, reason
        begun = time.monotonic()
        run = asyncio.get_running_loop().run_in_executor
        try:
            version.plan = await run(None, load_plan, version.folder)
            version.states = self._sequences.states(version.model, version.plan)
            version.pipeline = await run(None, self._start, version.folder, self._stopping.is_set)
            await run(None, version.open_text)
            warmed = await self._warm_up(version, version.pipeline)
        except Exception as error:
            version.state, version.reason = VersionState.UNAVAILABLE, client_message(error)
            failed, version.pipeline, version.text = version.pipeline, None, None
            if failed is not None:
                await run(None, failed.close)
            raise
        self._follow(version, version.pipeline)
        version.counters, version.grace = Counters(), ReadyGrace(self._grace_s)
        version.batcher = Batcher(version.pipeline, self._limits, version.counters)
        version.open_sequences(self._sequences)
        self.changes += 1
        version.state, version.reason = VersionState.READY, ""
        self._tell(version, warmed, time.monotonic() - begun)

    def _follow(self, version: Version, pipeline: Pipeline) -> None:
        """Let a version have the plan that its pipeline runs, also when that changes."""
        loop = asyncio.get_running_loop()

        def changed() -> None:
            if version.pipeline is pipeline:
                version.plan = pipeline.plan
                self.changes += 1

        def on_recut() -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(changed)

        pipeline.on_recut(on_recut)

    async def _warm_up(self, version: Version, pipeline: Pipeline) -> int:
        """Send the warm-up requests, until the server stops; returns their number."""
        run = asyncio.get_running_loop().run_in_executor
        warming = run(None, self._warmup.run, version.model, version.folder, pipeline)
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((warming, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not warming.done():
            await run(None, pipeline.close)  # its requests end
        return await warming

    def _tell(self, version: Version, warmed: int, seconds: float) -> None:
        model = version.model
        if version.text_problem:
            log_event(_log, logging.WARNING, "no text", model=model, reason=version.text_problem)
        if self._limits.max_batch > 1 and batch_axes(version.plan, version.plan.outputs) is None:
            log_event(_log, logging.WARNING, "not batched: it has no proven batch axis", model=model)
        number, seconds = version.number, round(seconds, 2)
        log_event(_log, logging.INFO, "loaded", model=model, version=number, warmup=warmed, seconds=seconds)

    async def drop(self, version: Version, cause: str) -> None:
        """Close the pipeline of a version, which has ended. Requests that wait for it fail."""
        reason = NotLoaded(f"model {version.model!r} takes no requests: {cause}")
        pipeline, batcher = version.pipeline, version.batcher
        version.pipeline, version.batcher, version.text = None, None, None
        self.changes += 1
        version.state, version.reason = VersionState.UNAVAILABLE, str(reason)
        if batcher is not None:
            batcher.refuse(reason)
            batcher.close()
        if pipeline is not None:
            await asyncio.get_running_loop().run_in_executor(None, pipeline.close)

    async def unload(self, version: Version, reason: str, patience_s: float | None = None) -> None:
        """Answer the requests that a version has accepted, and close its pipeline.

        Args:
            version: The version.
            reason: Why it takes no requests from now on.
            patience_s: The most seconds to wait for answers; None waits until the server stops.
        """
        pipeline, batcher = version.pipeline, version.batcher
        if pipeline is None or batcher is None:
            version.end_sequences()
            return
        version.state, version.reason = VersionState.UNLOADING, reason
        version.batcher, version.text = None, None
        self.changes += 1
        if not await self._emptied(version, batcher, patience_s):
            batcher.refuse(PipelineClosed("the server stopped before it executed the request"))
        batcher.close()
        version.end_sequences()
        await asyncio.get_running_loop().run_in_executor(None, pipeline.close)
        version.pipeline = None
        version.state = VersionState.UNAVAILABLE

    async def _emptied(self, version: Version, batcher: Batcher, patience_s: float | None) -> bool:
        """Wait until a batcher is empty, and all texts and all requests of sequences have ended.

        Returns:
            Whether they have; False when the patience ended first. Patience of None lasts until the server stops.
        """

        async def empty() -> None:
            await batcher.empty()
            while version.text_figures.unfinished or (version.sequences is not None and version.sequences.pending):
                await asyncio.sleep(_LOOK_S)
                await batcher.empty()

        emptied = asyncio.ensure_future(empty())
        try:
            if patience_s is None:
                ended = asyncio.ensure_future(self._ended.wait())
                await asyncio.wait((emptied, ended), return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                patience_s = self._patience_s
            return bool((await asyncio.wait((emptied,), timeout=patience_s))[0])
        finally:
            emptied.cancel()


async def load_each(loader: Loader, versions: list[Version]) -> list[OnnxsplitError]:
    """Load versions one by one; returns why some did not start."""
    problems = []
    for version in versions:
        try:
            await loader.load(version)
        except OnnxsplitError as error:
            problems.append(error)
    return problems
