"""Watches one version of a model: what happened in the last minute, its history, and its slowest requests."""

from __future__ import annotations

from collections import deque

from runtime.coordinator.status import NodeStats
from runtime.gateway.counters import FAILURE_REASONS
from runtime.gateway.models.version import Version
from runtime.gateway.telemetry.history import SECONDS, History, Point
from runtime.gateway.telemetry.minute import LastMinute
from runtime.gateway.telemetry.slowest import KEPT, slowest_of_minute
from runtime.gateway.telemetry.texts import TextTimes
from runtime.gateway.telemetry.timeline import Timeline, timeline
from runtime.gateway.telemetry.views import (
    FailureView,
    LossView,
    ModelHistory,
    ModelSlowest,
    ModelView,
    NodeView,
    RecutView,
    TextView,
)
from runtime.pipeline_control import Recuts
from runtime.recut.running_plan import RunningPlan


class _NodeWatch:
    """Watches one node."""

    def __init__(self) -> None:
        self.rates: deque[float] = deque(maxlen=SECONDS)
        self._minute = LastMinute()

    def view(self, node: NodeStats, now_ns: int) -> NodeView:
        totals = node.requests, node.failures, node.ran_ns, node.output_bytes
        part = self._minute.update(now_ns, totals, node.times)
        now_requests, _, now_ran_ns, _ = part.totals
        requests, failures, ran_ns, output_bytes = self._minute.totals
        seconds = max(1e-9, part.seconds)
        self.rates.append(now_requests / seconds)
        return NodeView(
            stage=node.stage,
            replica=node.replica,
            pid=node.pid,
            host=node.host,
            state=node.state,
            per_s=self._minute.per_s(requests),
            now_per_s=now_requests / seconds,
            p99_ns=self._minute.percentile(99),
            run_ns=ran_ns // requests if requests else 0,
            queue=node.queue,
            utilisation=min(1.0, now_ran_ns / seconds / 1e9),
            output_bytes_per_s=self._minute.per_s(output_bytes),
            restarts=node.restarts,
            failures=failures,
        )


class _TextWatch:
    """Watches the texts of one version."""

    def __init__(self, times: TextTimes) -> None:
        self._times = times
        self._steps, self._first_token, self._gap = LastMinute(), LastMinute(), LastMinute()

    def begin_anew(self) -> None:
        """Forget the counts of steps, because another coordinator counts now."""
        self._steps = LastMinute()

    def view(self, version: Version, nodes: tuple[NodeStats, ...], now_ns: int) -> TextView | None:
        sequences = version.pipeline.sequences if version.pipeline is not None and version.text is not None else None
        if sequences is None:
            return None
        self._steps.update(now_ns, (sequences.tokens, sequences.steps, sequences.rows))
        self._first_token.update(now_ns, (), self._times.first_token.times)
        self._gap.update(now_ns, (), self._times.gap.times)
        tokens, steps, rows = self._steps.totals
        return TextView(
            running=sequences.running,
            waiting=sequences.waiting,
            tokens_per_s=self._steps.per_s(tokens),
            first_token_ns=self._first_token.percentile(50),
            gap_ns=self._gap.percentile(50),
            cache_bytes=sum(node.state_bytes for node in nodes),
            cache_usage=sequences.cache_usage,
            rows_per_step=rows / steps if steps else 0.0,
            replays=sequences.replays,
        )


class Watch:
    """Watches one version of a model. Sample it once per second.

    Args:
        version: The version.
        times: What is measured of its texts.
    """

    def __init__(self, version: Version, times: TextTimes) -> None:
        self._version = version
        self._minute = LastMinute()
        self._history = History()
        self._slowest: list[Timeline] = []
        self._slowest_changes = 0
        self._nodes: dict[tuple[int, int], _NodeWatch] = {}
        self._running: RunningPlan | None = None
        self._text = _TextWatch(times)

    def view(self, now_ns: int, at_ms: int) -> ModelView:
        """The version now.

        Args:
            now_ns: The time, by the host's monotonic clock.
            at_ms: The same time, in milliseconds since the epoch.
        """
        version, counters, pipeline = self._version, self._version.counters, self._version.pipeline
        running = version.running
        stats = running.coordinator.stats() if running is not None else ()
        if running is not self._running:  # the nodes are others now, and their counts began anew
            self._running, self._nodes = running, {}
            self._text.begin_anew()
        failures = tuple(counters.failures[reason] for reason in FAILURE_REASONS)
        part = self._minute.update(now_ns, (counters.success.count, *failures), counters.times)
        self._keep_slowest(now_ns, at_ms)
        answered, *_ = self._minute.totals
        why_not = version.why_not()
        return ModelView(
            name=version.model,
            version=version.number,
            state=version.state.value.lower(),
            reason=why_not or "",
            ready=why_not is None,
            per_s=self._minute.per_s(answered),
            answered=answered,
            p50_ns=self._minute.percentile(50),
            p99_ns=self._minute.percentile(99),
            last_ms=counters.last_ms,
            failures=self._failures(),
            waiting=len(version.batcher.queue) if version.batcher is not None else 0,
            inside=version.batcher.executing if version.batcher is not None else 0,
            retries=pipeline.retries if pipeline is not None else 0,
            losses=pipeline.losses if pipeline is not None else 0,
            loss=self._loss(now_ns, at_ms),
            nodes=self._node_views(stats, now_ns),
            text=self._text.view(version, stats, now_ns),
            now=self._history.add(at_ms, part, part.totals[0]),
            bin=self._history.hour[-1] if self._history.hour else None,
            slowest=self._slowest_changes,
            generation=running.number if running is not None else 0,
            recut=_recut_view(pipeline.recuts) if pipeline is not None else None,
        )

    def _failures(self) -> dict[str, FailureView]:
        _, *counts = self._minute.totals
        last = self._version.counters.last_errors
        return {
            reason: FailureView(count, last.get(reason, ""))
            for reason, count in zip(FAILURE_REASONS, counts, strict=True)
            if count
        }

    def _loss(self, now_ns: int, at_ms: int) -> LossView | None:
        incidents = self._version.pipeline.incidents if self._version.pipeline is not None else ()
        if not incidents:
            return None
        return LossView(at_ms - max(0, now_ns - incidents[-1].at_ns) // 1_000_000, incidents[-1].story)

    def _node_views(self, stats: tuple[NodeStats, ...], now_ns: int) -> tuple[NodeView, ...]:
        self._nodes = {key: self._nodes.get(key) or _NodeWatch() for key in ((n.stage, n.replica) for n in stats)}
        return tuple(self._nodes[node.stage, node.replica].view(node, now_ns) for node in stats)

    def history(self) -> ModelHistory:
        """The past, for charts."""
        return ModelHistory(
            name=self._version.model,
            version=self._version.number,
            minute=_points(self._history.minute),
            hour=_points(self._history.hour),
            nodes={f"{stage}.{replica}": tuple(node.rates) for (stage, replica), node in self._nodes.items()},
        )

    def slowest(self) -> ModelSlowest:
        """The slowest requests of the last minute, the slowest first."""
        return ModelSlowest(self._version.model, self._version.number, tuple(self._shown()))

    def _shown(self) -> list[Timeline]:
        return sorted(self._slowest, key=lambda one: (-one.total_ns, one.ended_ns))[:KEPT]

    def _keep_slowest(self, now_ns: int, at_ms: int) -> None:
        """Add the slowest requests of the last second."""
        before = self._shown()
        edges = {(cut.from_stage, stage) for cut in self._version.plan.cuts for stage in cut.to_stages}
        taken = (timeline(one, 1_000_000 * at_ms - now_ns, edges) for one in self._version.counters.slowest.take())
        self._slowest = slowest_of_minute((*self._slowest, *taken), now_ns)
        self._slowest_changes += self._shown() != before


def _recut_view(recuts: Recuts) -> RecutView | None:
    """How a plan was changed; None where it never was, is not just now, and is not watched."""
    if recuts.phase == "steady" and not (recuts.last or recuts.advice):
        return None
    return RecutView(recuts.phase, recuts.last, recuts.advice)


def _points(points: deque[Point]) -> tuple[Point, ...]:
    """Points with as many digits as a chart shows."""
    return tuple(Point(point.at_ms, round(point.per_s, 3), point.p99_ns) for point in points)
