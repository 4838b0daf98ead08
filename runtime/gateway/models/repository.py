"""The models of a server, by name and version. Loaded versions have a running pipeline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxsplit.errors import OnnxsplitError, shown
from runtime.gateway.errors import NotLoaded, UnknownModel, client_message
from runtime.gateway.models.loader import Loader, load_each
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.documents import VersionState
from runtime.logs import log_event

_WATCH_INTERVAL_S = 0.5
_RESTART_WAIT_S, _MOST_RESTART_WAIT_S = 1.0, 60.0
_log = logging.getLogger("runtime.gateway")


@dataclass
class _Restart:
    """A version whose pipeline has ended and is to be started again. The wait doubles with every failure."""

    at_s: float
    wait_s: float
    cause: str
    running: bool = False


class Repository:
    """The versions of all models. :meth:`watch` starts pipelines again that have ended unexpectedly.

    Changes of one model come one after another; those of different models do not wait for each other.

    Args:
        versions: All versions.
        loader: Starts and ends their pipelines.
        newest: How many of the newest versions of a model are loaded.

    Attributes:
        ending: True when the server is stopping; no requests are accepted then.
        requirements: What must be ready beside the models: each says why it is not, or None.
    """

    def __init__(self, versions: Iterable[Version], loader: Loader, *, newest: int = 1) -> None:
        self._models: dict[str, dict[str, Version]] = {}
        for version in versions:
            self._models.setdefault(version.model, {})[version.number] = version
        self._loader = loader
        self._newest = newest
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._restarts: dict[Version, _Restart] = {}
        self._restarting: set[asyncio.Task[None]] = set()
        self._unloaded: set[str] = set()  # models that were unloaded by hand
        self._arriving: set[Version] = set()  # loaded while others serve
        self.ending = False
        self.requirements: list[Callable[[], str | None]] = []

    @property
    def changes(self) -> int:
        """How often a version began or ceased to take requests."""
        return self._loader.changes

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
        """The versions that take requests, are being loaded, or will be started again.

        A version that arrives while the server serves counts once it is loaded.
        """
        return tuple(version for version in self if self._is_active(version))

    def _is_active(self, version: Version) -> bool:
        stopped = version.state is VersionState.UNAVAILABLE or version in self._arriving
        return not stopped or version.batcher is not None or version in self._restarts

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
                lost = pipeline is not None and version.state is VersionState.READY and pipeline.ended
                if pipeline is not None and lost and version not in self._restarts:
                    self._restarts[version] = _Restart(time.monotonic(), _RESTART_WAIT_S, pipeline.trouble or "")
            for version, restart in list(self._restarts.items()):
                if time.monotonic() >= restart.at_s and not restart.running and not self.ending:
                    restart.running = True
                    task = asyncio.ensure_future(self._restart(version, restart))
                    self._restarting.add(task)
                    task.add_done_callback(self._restarting.discard)

    async def _restart(self, version: Version, restart: _Restart) -> None:
        """Close a version's pipeline and start another."""
        async with self._locks[version.model]:
            if self._restarts.get(version) is not restart or self.ending:  # it was unloaded or loaded meanwhile
                return
            cause = f"its pipeline ended and is started again: {restart.cause}"
            if version.pipeline is not None:
                log_event(_log, logging.ERROR, "pipeline ended", model=version.model, reason=restart.cause)
                await self._loader.drop(version, cause)
            try:
                await self._loader.load(version, cause)
                del self._restarts[version]
            except Exception as error:
                version.reason = f"{cause}; {version.reason}"
                restart.at_s = time.monotonic() + restart.wait_s
                restart.wait_s = min(2 * restart.wait_s, _MOST_RESTART_WAIT_S)
                reason = client_message(error)
                log_event(_log, logging.ERROR, "pipeline not started again yet", model=version.model, reason=reason)
            finally:
                restart.running = False

    async def load(self, model: str) -> None:
        """Load the newest versions of a model, except those that are loaded.

        Raises:
            UnknownModel: There is no such model.
            OnnxsplitError: A pipeline did not start; the version's reason says why.
        """
        self.find(model)
        self._unloaded.discard(model)
        await self._to_the_end(self._load_all(model))

    async def _load_all(self, model: str) -> None:
        async with self._locks[model]:
            for version in list(self._models.get(model, {}).values())[-self._newest :]:
                if version.batcher is None and not self.ending:
                    self._restarts.pop(version, None)
                    await self._loader.load(version)

    @staticmethod
    async def _to_the_end(change: Coroutine[Any, Any, None]) -> None:
        """Complete a change even when the client that asked for it goes away."""
        await asyncio.shield(asyncio.ensure_future(change))

    async def unload(self, model: str) -> None:
        """Answer the requests that a model has accepted, and close its pipelines.

        Raises:
            UnknownModel: There is no such model.
        """
        self.find(model)
        self._unloaded.add(model)
        await self._to_the_end(self._unload_all(model))

    async def _unload_all(self, model: str) -> None:
        async with self._locks[model]:
            for version in list(self._models.get(model, {}).values()):
                self._restarts.pop(version, None)
                await self._loader.unload(version, "it was unloaded; load it with the repository API")

    async def update(self, model: str, found: Sequence[Version], removed: Sequence[Version]) -> None:
        """Take over what has changed in the folder of a model.

        The newest versions of the model are loaded, unless it was unloaded by hand. Versions that are loaded take
        requests until then, also those that were replaced or removed; after that, these and older ones are unloaded.

        Args:
            model: Name of the model.
            found: New versions, and successors of versions with the same number.
            removed: Versions whose folders are gone.

        Raises:
            OnnxsplitError: A version did not start. The others were taken over, and its predecessor goes on.
        """
        await self._to_the_end(self._update(model, found, removed))

    async def _update(self, model: str, found: Sequence[Version], removed: Sequence[Version]) -> None:
        async with self._locks[model]:
            before = self._models.get(model, {})
            after = _sorted({n: v for n, v in before.items() if v not in removed} | {v.number: v for v in found})
            self._models[model] = _sorted(after | before)  # those before take requests while others are loaded
            problems: list[OnnxsplitError] = []
            if model not in self._unloaded and not self.ending:
                arriving = [version for version in list(after.values())[-self._newest :] if version.batcher is None]
                self._arriving.update(arriving)
                problems = await load_each(self._loader, arriving)
                self._arriving.difference_update(arriving)
            kept = {n: self._successor(before.get(n), version) for n, version in after.items()}
            self._models[model] = kept
            if not kept:
                del self._models[model]
            await self._retire([version for version in before.values() if version not in kept.values()], kept)
        if problems:
            raise problems[0]

    @staticmethod
    def _successor(before: Version | None, after: Version) -> Version:
        """The version that has a number from now on: one that takes requests goes on if its successor does not."""
        return before if before is not None and before.batcher is not None and after.batcher is None else after

    async def _retire(self, gone: Sequence[Version], kept: Mapping[str, Version]) -> None:
        """Unload versions that are gone, and of those that are kept the ones that newer ones replace."""
        for version in gone:
            self._restarts.pop(version, None)
            await self._loader.unload(version, "its plan was replaced or removed")
        versions = list(kept.values())
        if any(version.batcher is not None for version in versions[-self._newest :]):
            for version in versions[: -self._newest]:
                await self._loader.unload(version, "a newer version was loaded")

    def stop(self) -> None:
        """Accept nothing more, and give up what is being loaded."""
        self.ending = True
        self._loader.stop()

    async def close(self, patience_s: float) -> None:
        """Accept nothing more, answer accepted requests for at most ``patience_s`` seconds, and close all pipelines."""
        self.ending = True
        self._loader.end(patience_s)
        await asyncio.gather(*(self._close(model, patience_s) for model in {*self._models, *self._locks}))

    async def _close(self, model: str, patience_s: float) -> None:
        async with self._locks[model]:
            versions = list(self._models.get(model, {}).values())
            await asyncio.gather(*(self._loader.unload(v, "the server is stopping", patience_s) for v in versions))


def _sorted(versions: Mapping[str, Version]) -> dict[str, Version]:
    """Versions by number, the oldest first."""
    return {number: versions[number] for number in sorted(versions, key=int)}
