"""Samples of the server's state, one each second, for the page, the metrics and the statistics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec

from runtime.gateway.budget import Budget
from runtime.gateway.models import metadata
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.documents import ModelStatistics
from runtime.gateway.service import Service
from runtime.gateway.telemetry.minute import LastMinute
from runtime.gateway.telemetry.texts import TextTimes
from runtime.gateway.telemetry.views import FailureView, ModelSlowest, View, plan_view
from runtime.gateway.telemetry.watch import Watch

INTERVAL_S = 1.0
_MOST_LISTENERS = 64


class Sampler:
    """Samples a service each second.

    Args:
        service: The service.
        budget: The memory for requests.

    Attributes:
        started_s: Time at which the server started, in seconds since the epoch.
        last: The last sample.
    """

    def __init__(self, service: Service, budget: Budget) -> None:
        self.service = service
        self.budget = budget
        self.started_s = time.time()
        self._repository = service.repository
        self.last: View | None = None
        self._text_times: dict[Version, TextTimes] = {}
        self._watches: dict[Version, Watch] = {}
        self._changes = self._repository.changes
        self._astray = LastMinute()
        self._listeners: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None
        self._follow()

    @property
    def text_times(self) -> dict[Version, TextTimes]:
        """What is measured of the texts of each version."""
        self._follow()
        return self._text_times

    def _follow(self) -> dict[Version, Watch]:
        """Watch the versions that are there now, and no others."""
        for version in self._repository:
            if version not in self._watches:
                self._text_times[version] = TextTimes(version.text_figures)
                self._watches[version] = Watch(version, self._text_times[version])
        for version in self._watches.keys() - set(self._repository):
            del self._text_times[version], self._watches[version]
        return self._watches

    def start(self) -> None:
        """Begin to sample."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop sampling, and end the event streams."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._send(b"")

    def _send(self, event: bytes) -> None:
        """Send an event to all listeners. One that reads too slowly loses older events, and gets the plans again."""
        for listener in self._listeners:
            if listener.full():
                while not listener.empty():
                    listener.get_nowait()
                listener.put_nowait(self._plans())
            listener.put_nowait(event)

    async def _run(self) -> None:
        while True:
            if self._repository.changes != self._changes:
                self._changes = self._repository.changes
                self._send(self._plans())
            self._send(_event(self.sample()))
            await asyncio.sleep(INTERVAL_S)
            await asyncio.get_running_loop().run_in_executor(None, self.budget.trim)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: the plans, the past of each model, the last sample, and then each new sample."""
        if len(self._listeners) >= _MOST_LISTENERS:
            yield b"event: full\ndata: {}\n\n"
            return
        listener: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)
        self._listeners.add(listener)
        try:
            yield self._plans()
            watches = self._follow()
            past = [watches[version].history() for version in self._repository]
            yield b"event: history\ndata: " + msgspec.json.encode(past) + b"\n\n"
            if self.last is not None:
                yield _event(self.last)
            while event := await listener.get():
                yield event
        finally:
            self._listeners.discard(listener)

    def _plans(self) -> bytes:
        return b"event: plans\ndata: " + msgspec.json.encode([plan_view(v) for v in self._repository]) + b"\n\n"

    def sample(self) -> View:
        """Take a sample."""
        now_ns, at_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
        self._astray.update(now_ns, (self.service.astray,))
        (astray,) = self._astray.totals
        watches = self._follow()
        self.last = View(
            at_ms=at_ms,
            ready=self._repository.ready,
            astray=FailureView(astray, self.service.last_astray) if astray else None,
            models=tuple(watches[version].view(now_ns, at_ms) for version in self._repository),
        )
        return self.last

    def slowest(self) -> list[ModelSlowest]:
        """The slowest requests of each model in the last minute, and where their time went."""
        watches = self._follow()
        return [watches[version].slowest() for version in self._repository]

    def why_not(self) -> str:
        """Why the server is not ready."""
        if self._repository.ending:
            return "the server is stopping"
        for version in self._repository.active or self._repository:
            if (reason := version.why_not()) is not None:
                return f"model {version.model!r} version {version.number}: {reason}"
        for why_not in self._repository.requirements:
            if (reason := why_not()) is not None:
                return reason
        return "no model is loaded"

    def statistics(self, name: str, number: str = "") -> list[ModelStatistics]:
        """Statistics of a model or of a stage; of all models and their stages when the name is empty.

        Raises:
            UnknownModel: There is no such model, version or stage.
        """
        if not name:
            return [part for v in self._repository if v.pipeline is not None for part in _with_stages(v)]
        version, part = self.service.find(name, number)
        if isinstance(part, int):
            nodes = version.pipeline.stats() if version.pipeline is not None else ()
            return [metadata.stage_statistics(version, part, nodes)]
        return [metadata.statistics(version)]


def _event(view: View) -> bytes:
    return b"data: " + msgspec.json.encode(view) + b"\n\n"


def _with_stages(version: Version) -> list[ModelStatistics]:
    nodes = version.pipeline.stats() if version.pipeline is not None else ()
    stages = [metadata.stage_statistics(version, stage.index, nodes) for stage in version.plan.stages]
    return [metadata.statistics(version), *stages]
