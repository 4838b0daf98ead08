"""The models of a server, by name and version. Loaded versions have a running pipeline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.errors import OnnxsplitError, shown
from onnxsplit.plan_files import load_plan
from runtime.errors import PipelineClosed
from runtime.gateway.batcher import Batcher
from runtime.gateway.counters import Counters
from runtime.gateway.errors import NotLoaded, UnknownModel, client_message
from runtime.gateway.models.grace import ReadyGrace
from runtime.gateway.models.version import Version
from runtime.gateway.models.warmup import Warmup
from runtime.gateway.protocol.documents import VersionState
from runtime.gateway.queue import Limits
from runtime.gateway.sequences import SequenceOptions
from runtime.logs import log_event
from runtime.pipeline import Pipeline
from runtime.requests.microbatch import batch_axes

_WATCH_INTERVAL_S = 0.5
_LOOK_S = 0.05  # between two looks at texts that are to end
_RESTART_WAIT_S, _MOST_RESTART_WAIT_S = 1.0, 60.0
_log = logging.getLogger("runtime.gateway")

StartPipeline = Callable[[Path, Callable[[], bool]], Pipeline]
"""Starts the pipeline of a plan. Blocks until its nodes are ready, or until the given function returns True."""


@dataclass
class _Restart:
    """A version whose pipeline has ended and is to be started again. The wait doubles with every failure."""

    at_s: float
    wait_s: float
    cause: str


class Repository:
    """The versions of all models. :meth:`watch` starts pipelines again that have ended unexpectedly.

    Args:
        versions: All versions.
        start: Starts a pipeline.
        limits: Limits of the queue before each pipeline.
        newest: How many of the newest versions of a model are loaded.
        warmup: Requests that a version answers before it is ready.
        sequences: How the states of sequences are kept.
        grace_s: Seconds for which a version that was ready stays ready after a stage lost its last node.

    Attributes:
        ending: True when the server is stopping; no requests are accepted then.
        changes: How often a version began or ceased to take requests.
        requirements: What must be ready beside the models: each says why it is not, or None.
    """

    def __init__(
        self,
        versions: Iterable[Version],
        start: StartPipeline,
        limits: Limits,
        *,
        newest: int = 1,
        warmup: Warmup | None = None,
        sequences: SequenceOptions | None = None,
        grace_s: float = 0.0,
    ) -> None:
        self._models: dict[str, dict[str, Version]] = {}
        for version in versions:
            self._models.setdefault(version.model, {})[version.number] = version
        self._start = start
        self._limits = limits
        self._newest = newest
        self._warmup = warmup or Warmup()
        self._sequences = sequences or SequenceOptions()
        self._grace_s = grace_s
        self._changing = asyncio.Lock()
        self._restarts: dict[Version, _Restart] = {}
        self._ended = asyncio.Event()  # the server is stopping, and accepted requests have _patience_s
        self._patience_s = 0.0
        self.ending = False
        self.changes = 0
        self.requirements: list[Callable[[], str | None]] = []

    def __iter__(self) -> Iterator[Version]:
        for versions in self._models.values():
            yield from versions.values()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self._models)

    @property
    def ready(self) -> bool:
        """Whether probes are told that the server is ready: all active versions are, and all that is required."""
        active = self.active
        if self.ending or not (active or self.requirements):
            return False
        return all(version.ready for version in active) and all(why_not() is None for why_not in self.requirements)

    @property
    def active(self) -> tuple[Version, ...]:
        """The versions that take requests, are being loaded, or will be started again."""
        return tuple(
            version
            for version in self
            if version.state is not VersionState.UNAVAILABLE or version.batcher is not None or version in self._restarts
        )

    def find(self, model: str, number: str = "") -> Version:
        """A version of a model. Without a number, the newest one that is loaded, or else the newest one.

        Raises:
            UnknownModel: There is no such model or version.
        """
        versions = self._models.get(model)
        if versions is None:
            raise UnknownModel(f"model {shown(model)} is unknown; this server has {', '.join(self._models)}")
        if not number:
            loaded = [version for version in versions.values() if version.batcher is not None]
            return (loaded or list(versions.values()))[-1]
        if number not in versions:
            raise UnknownModel(f"model {model!r} has no version {shown(number)}; it has {', '.join(versions)}")
        return versions[number]

    def loaded(self, model: str, number: str = "", *, accepted: bool = False) -> Version:
        """A version that takes requests; otherwise as :meth:`find`.

        Args:
            model: The model.
            number: The number of the version; empty for the newest one.
            accepted: Whether the request was accepted before, so that it is executed while the server stops.

        Raises:
            UnknownModel: There is no such model or version.
            NotLoaded: The version takes no requests.
        """
        version = self.find(model, number)
        if self.ending and not accepted:
            raise NotLoaded("the server is stopping and takes no more requests")
        if version.batcher is None:
            raise NotLoaded(f"model {model!r} version {version.number} takes no requests: {version.reason}")
        return version

    def versions(self, model: str) -> tuple[Version, ...]:
        """All versions of a model.

        Raises:
            UnknownModel: There is no such model.
        """
        self.find(model)
        return tuple(self._models[model].values())

    def loaded_numbers(self, model: str) -> list[str]:
        """The numbers of a model's versions that take requests. Raises as :meth:`versions`."""
        return [version.number for version in self.versions(model) if version.batcher is not None]

    async def watch(self) -> None:
        """Start pipelines again that have ended unexpectedly, until this task is cancelled."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            for version in self:
                pipeline = version.pipeline
                if pipeline is not None and version.state is VersionState.READY and pipeline.ended:
                    self._restarts[version] = _Restart(time.monotonic(), _RESTART_WAIT_S, pipeline.trouble or "")
            for version, restart in list(self._restarts.items()):
                if time.monotonic() >= restart.at_s and not self.ending:
                    await self._restart(version, restart)

    async def _restart(self, version: Version, restart: _Restart) -> None:
        """Close a version's pipeline and start another."""
        async with self._changing:
            if version not in self._restarts:  # it was unloaded or loaded meanwhile
                return
            cause = f"its pipeline ended and is started again: {restart.cause}"
            if version.pipeline is not None:
                log_event(_log, logging.ERROR, "pipeline ended", model=version.model, reason=restart.cause)
                await self._drop(version, NotLoaded(f"model {version.model!r} takes no requests: {cause}"))
            try:
                await self._load(version, cause)
                del self._restarts[version]
            except Exception as error:
                version.reason = f"{cause}; {version.reason}"
                restart.at_s = time.monotonic() + restart.wait_s
                restart.wait_s = min(2 * restart.wait_s, _MOST_RESTART_WAIT_S)
                reason = client_message(error)
                log_event(_log, logging.ERROR, "pipeline not started again yet", model=version.model, reason=reason)

    async def _drop(self, version: Version, reason: OnnxsplitError) -> None:
        """Close a version's pipeline. Requests that wait for it fail with ``reason``."""
        pipeline, batcher = version.pipeline, version.batcher
        version.pipeline, version.batcher, version.text = None, None, None
        self.changes += 1
        version.state, version.reason = VersionState.UNAVAILABLE, str(reason)
        if batcher is not None:
            batcher.refuse(reason)
            batcher.close()
        if pipeline is not None:
            await asyncio.get_running_loop().run_in_executor(None, pipeline.close)

    async def load(self, model: str) -> None:
        """Load the newest versions of a model, except those that are loaded.

        Raises:
            UnknownModel: There is no such model.
            OnnxsplitError: A pipeline did not start; the version's reason says why.
        """
        versions = self.versions(model)
        await self._to_the_end(self._load_all(versions[-self._newest :]))

    async def _load_all(self, versions: Sequence[Version]) -> None:
        async with self._changing:
            for version in versions:
                if version.batcher is None and not self.ending:
                    self._restarts.pop(version, None)
                    await self._load(version)

    @staticmethod
    async def _to_the_end(change: Coroutine[Any, Any, None]) -> None:
        """Complete a change even when the client that asked for it goes away."""
        await asyncio.shield(asyncio.ensure_future(change))

    async def _load(self, version: Version, reason: str = "it is being loaded") -> None:
        version.state, version.reason = VersionState.LOADING, reason
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            version.plan = await loop.run_in_executor(None, load_plan, version.folder)
            version.states = self._sequences.states(version.model, version.plan)
            version.pipeline = await loop.run_in_executor(None, self._start, version.folder, lambda: self.ending)
            await loop.run_in_executor(None, version.open_text)
            warm_up = self._warmup.run
            warmed = await loop.run_in_executor(None, warm_up, version.model, version.folder, version.pipeline)
        except Exception as error:
            version.state, version.reason = VersionState.UNAVAILABLE, client_message(error)
            failed, version.pipeline, version.text = version.pipeline, None, None
            if failed is not None:
                await loop.run_in_executor(None, failed.close)
            raise
        version.counters, version.grace = Counters(), ReadyGrace(self._grace_s)
        version.batcher = Batcher(version.pipeline, self._limits, version.counters)
        version.open_sequences(self._sequences)
        self.changes += 1
        if version.text_problem:
            log_event(_log, logging.WARNING, "no text", model=version.model, reason=version.text_problem)
        version.state, version.reason = VersionState.READY, ""
        if self._limits.max_batch > 1 and batch_axes(version.plan, version.plan.outputs) is None:
            log_event(_log, logging.WARNING, "not batched: it has no proven batch axis", model=version.model)
        log_event(
            _log,
            logging.INFO,
            "loaded",
            model=version.model,
            version=version.number,
            warmup=warmed,
            seconds=round(time.monotonic() - begun, 2),
        )

    async def unload(self, model: str) -> None:
        """Answer the requests that a model has accepted, and close its pipelines.

        Raises:
            UnknownModel: There is no such model.
        """
        await self._to_the_end(self._unload_all(self.versions(model)))

    async def _unload_all(self, versions: Sequence[Version]) -> None:
        async with self._changing:
            for version in versions:
                self._restarts.pop(version, None)
                await self._unload(version, "it was unloaded; load it with the repository API")

    async def _unload(self, version: Version, reason: str, patience_s: float | None = None) -> None:
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

    async def update(self, found: Sequence[Version], removed: Sequence[Version]) -> None:
        """Take over what has changed in the folders of the models.

        The newest versions of a model that is loaded, or new, are loaded. A version whose plan was replaced takes
        requests until its successor is ready. Then older versions, and those removed, are unloaded.

        Args:
            found: New versions, and successors of versions with the same number.
            removed: Versions whose folders are gone.

        Raises:
            OnnxsplitError: A version did not start; the others were taken over, and its predecessor goes on.
        """
        await self._to_the_end(self._update(found, removed))

    async def _update(self, found: Sequence[Version], removed: Sequence[Version]) -> None:
        async with self._changing:
            touched = dict.fromkeys(version.model for version in (*found, *removed))
            active = {version.model for version in self.active} | {
                v.model for v in found if v.model not in self._models
            }
            ended, problems = list(removed), list[OnnxsplitError]()
            for version in removed:
                del self._models[version.model][version.number]
            for version in found:
                versions = self._models.setdefault(version.model, {})
                before = versions.get(version.number)
                if before is not None and before.batcher is not None and not await self._loads(version, problems):
                    continue  # the one before goes on
                if before is not None:
                    ended.append(before)
                numbers = sorted({*versions, version.number}, key=int)
                self._models[version.model] = {
                    number: (versions | {version.number: version})[number] for number in numbers
                }
            for model in touched:
                await self._settle(model, problems, loads=model in active)
            for version in ended:
                self._restarts.pop(version, None)
                await self._unload(version, "its plan was replaced or removed")
        if problems:
            raise problems[0]

    async def _settle(self, model: str, problems: list[OnnxsplitError], *, loads: bool) -> None:
        """Load the newest versions of a model, then unload the others."""
        versions = list(self._models[model].values())
        newest = versions[-self._newest :]
        for version in newest:
            if loads and version.batcher is None:
                await self._loads(version, problems)
        if any(version.batcher is not None for version in newest):
            for version in versions:
                if version not in newest:
                    await self._unload(version, "a newer version was loaded")
        if not versions:
            del self._models[model]

    async def _loads(self, version: Version, problems: list[OnnxsplitError]) -> bool:
        """Load a version; False when it does not start."""
        try:
            if not self.ending:
                await self._load(version)
        except OnnxsplitError as error:
            problems.append(error)
            return False
        return True

    async def close(self, patience_s: float) -> None:
        """Accept nothing more, answer accepted requests for at most ``patience_s`` seconds, and close all pipelines."""
        self.ending = True
        self._patience_s = patience_s
        self._ended.set()
        async with self._changing:
            await asyncio.gather(*(self._unload(v, "the server is stopping", patience_s) for v in self))
