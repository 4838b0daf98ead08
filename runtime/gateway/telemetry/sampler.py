"""Samples of the server's state, one each second, for the page, the metrics and the statistics."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from runtime.coordinator.status import NodeStats, SequenceStats
from runtime.gateway.budget import Budget
from runtime.gateway.models import metadata
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.documents import ModelStatistics
from runtime.gateway.service import Service
from runtime.gateway.telemetry.texts import TextTimes

INTERVAL_S = 1.0
_KEPT_SAMPLES = 60
_MOST_LISTENERS = 64


class NodeView(Struct, frozen=True):
    """A node over the last interval."""

    stage: int
    replica: int
    pid: int | None
    host: str | None
    state: str
    per_s: float
    p99_ns: int
    run_ns: int
    queue: float
    utilisation: float
    output_bytes_per_s: float
    restarts: int
    failures: int


class TextView(Struct, frozen=True):
    """The texts of a model over the last interval. The times are medians of the last thousand."""

    running: int
    waiting: int
    tokens_per_s: float
    first_token_ns: int
    gap_ns: int
    cache_bytes: int
    cache_usage: float
    rows_per_step: float
    replays: int


class ModelView(Struct, frozen=True):
    """A version of a model over the last interval."""

    name: str
    version: str
    state: str
    reason: str
    ready: bool
    per_s: float
    failures_per_s: float
    p50_ns: int
    p99_ns: int
    waiting: int
    inside: int
    retries: int
    losses: int
    cause: str
    last_error: str
    nodes: tuple[NodeView, ...]
    text: TextView | None


class View(Struct, frozen=True):
    """The server over the last interval."""

    at_ms: int
    ready: bool
    models: tuple[ModelView, ...]


class StageView(Struct, frozen=True):
    """The plan's prediction for a stage."""

    index: int
    predicted_ns: int


class EdgeView(Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """Bytes that one request moves from one stage to another, according to the plan; -1 stands for the caller."""

    source: int
    target: int
    bytes: int


class PlanView(Struct, frozen=True):
    """The part of a version that does not change while it is loaded."""

    name: str
    version: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[StageView, ...]
    edges: tuple[EdgeView, ...]


@dataclass
class _Previous:
    """Counts at the previous sample."""

    at_ns: int
    answered: int
    failed: int
    nodes: dict[tuple[int, int], NodeStats] = field(default_factory=dict)
    sequences: SequenceStats | None = None


class Sampler:
    """Samples a service each second.

    Args:
        service: The service.
        budget: The memory for requests.

    Attributes:
        started_s: Time at which the server started, in seconds since the epoch.
        text_times: What is measured of the texts of each version.
    """

    def __init__(self, service: Service, budget: Budget) -> None:
        self.service = service
        self.budget = budget
        self.started_s = time.time()
        self.text_times = {version: TextTimes(version.text_figures) for version in service.repository}
        self._repository = service.repository
        self._previous: dict[Version, _Previous] = {}
        self._views: deque[View] = deque(maxlen=_KEPT_SAMPLES)
        self._listeners: set[asyncio.Queue[bytes]] = set()
        self._task: asyncio.Task[None] | None = None

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
        """Send an event to all listeners. A listener that reads too slowly loses its oldest events."""
        for listener in self._listeners:
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(event)

    async def _run(self) -> None:
        while True:
            view = self.sample()
            self._views.append(view)
            self._send(b"data: " + msgspec.json.encode(view) + b"\n\n")
            await asyncio.sleep(INTERVAL_S)
            await asyncio.get_running_loop().run_in_executor(None, self.budget.trim)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: the plans, the samples of the last minute, and then each new sample."""
        if len(self._listeners) >= _MOST_LISTENERS:
            yield b"event: full\ndata: {}\n\n"
            return
        listener: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)
        self._listeners.add(listener)
        try:
            yield b"event: plans\ndata: " + msgspec.json.encode([_plan(v) for v in self._repository]) + b"\n\n"
            yield b"event: history\ndata: " + msgspec.json.encode(list(self._views)) + b"\n\n"
            while event := await listener.get():
                yield event
        finally:
            self._listeners.discard(listener)

    def sample(self) -> View:
        """The state now. Rates are over the time since the previous sample."""
        now = time.monotonic_ns()
        models = tuple(self._model(version, now) for version in self._repository)
        return View(at_ms=time.time_ns() // 1_000_000, ready=self._repository.ready, models=models)

    @property
    def last(self) -> View | None:
        """The last sample."""
        return self._views[-1] if self._views else None

    def why_not(self) -> str:
        """Why the server is not ready."""
        if self._repository.ending:
            return "the server is stopping"
        for version in self._repository.active or self._repository:
            if (reason := version.why_not()) is not None:
                return f"model {version.model!r} version {version.number}: {reason}"
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

    def _model(self, version: Version, now: int) -> ModelView:
        counters, pipeline, batcher = version.counters, version.pipeline, version.batcher
        failed = sum(counters.failures.values())
        nodes = pipeline.stats() if pipeline is not None else ()
        previous = self._previous.get(version) or _Previous(now, counters.success.count, failed)
        seconds = max(1e-9, (now - previous.at_ns) / 1e9)
        latencies = sorted(counters.latencies_ns)
        incidents = pipeline.incidents if pipeline is not None else ()
        sequences = pipeline.sequences if pipeline is not None and version.text is not None else None
        view = ModelView(
            name=version.model,
            version=version.number,
            state=version.state.value.lower(),
            reason=version.reason,
            ready=version.ready,
            per_s=max(0.0, (counters.success.count - previous.answered) / seconds),
            failures_per_s=max(0.0, (failed - previous.failed) / seconds),
            p50_ns=latencies[len(latencies) // 2] if latencies else 0,
            p99_ns=latencies[len(latencies) * 99 // 100] if latencies else 0,
            waiting=len(batcher.queue) if batcher is not None else 0,
            inside=batcher.executing if batcher is not None else 0,
            retries=pipeline.retries if pipeline is not None else 0,
            losses=sum(node.restarts for node in nodes),
            cause=incidents[-1].story if incidents else "",
            last_error=counters.last_error,
            nodes=tuple(_node(node, previous.nodes.get((node.stage, node.replica)), seconds) for node in nodes),
            text=_text(self.text_times[version], sequences, previous.sequences, nodes, seconds),
        )
        self._previous[version] = _Previous(
            now, counters.success.count, failed, {(node.stage, node.replica): node for node in nodes}, sequences
        )
        return view


def _with_stages(version: Version) -> list[ModelStatistics]:
    nodes = version.pipeline.stats() if version.pipeline is not None else ()
    stages = [metadata.stage_statistics(version, stage.index, nodes) for stage in version.plan.stages]
    return [metadata.statistics(version), *stages]


def _plan(version: Version) -> PlanView:
    plan = version.plan
    edges: dict[tuple[int, int], int] = {}
    for stage in plan.stages:
        if set(stage.inputs) & set(plan.inputs):
            edges[-1, stage.index] = 0
        if set(stage.outputs) & set(plan.outputs):
            edges[stage.index, -1] = 0
    for cut in plan.cuts:
        for target in cut.to_stages:
            edges[cut.from_stage, target] = edges.get((cut.from_stage, target), 0) + cut.bytes
    return PlanView(
        name=version.model,
        version=version.number,
        inputs=plan.inputs,
        outputs=plan.outputs,
        stages=tuple(StageView(stage.index, stage.predicted_time_ns) for stage in plan.stages),
        edges=tuple(EdgeView(source, target, size) for (source, target), size in edges.items()),
    )


def _text(
    times: TextTimes,
    sequences: SequenceStats | None,
    previous: SequenceStats | None,
    nodes: Sequence[NodeStats],
    seconds: float,
) -> TextView | None:
    if sequences is None:
        return None
    previous = previous or sequences
    steps = sequences.steps - previous.steps
    return TextView(
        running=sequences.running,
        waiting=sequences.waiting,
        tokens_per_s=max(0, sequences.tokens - previous.tokens) / seconds,
        first_token_ns=round(times.first_token.median * 1e9),
        gap_ns=round(times.gap.median * 1e9),
        cache_bytes=sum(node.state_bytes for node in nodes),
        cache_usage=sequences.cache_usage,
        rows_per_step=(sequences.rows - previous.rows) / steps if steps > 0 else 0.0,
        replays=sequences.replays,
    )


def _node(node: NodeStats, previous: NodeStats | None, seconds: float) -> NodeView:
    previous = previous or node
    requests = max(0, node.requests - previous.requests)
    ran_ns = max(0, node.ran_ns - previous.ran_ns)
    return NodeView(
        stage=node.stage,
        replica=node.replica,
        pid=node.pid,
        host=node.host,
        state=node.state,
        per_s=requests / seconds,
        p99_ns=node.p99_ns,
        run_ns=ran_ns // requests if requests else 0,
        queue=node.queue,
        utilisation=min(1.0, ran_ns / seconds / 1e9),
        output_bytes_per_s=max(0, node.output_bytes - previous.output_bytes) / seconds,
        restarts=node.restarts,
        failures=node.failures,
    )
