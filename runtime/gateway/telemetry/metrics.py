"""Metrics for Prometheus: Triton's names, which people chart already, and our own.

Ours keep Prometheus' rules: base units, ``_total`` on counters, and labels of few values: model, version, stage,
replica; never a request's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import onnxsplit
from runtime.coordinator.counters import BUCKETS_NS
from runtime.coordinator.status import NodeStats
from runtime.gateway.metadata import stage_name
from runtime.gateway.repository import Version
from runtime.gateway.telemetry.sampler import Sampler

_MODEL = ("model", "version")
_NODE = ("model", "version", "stage", "replica")

_BARE_HEADS = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+?)_total(?= )", re.MULTILINE)
"""Of counters whose names have no ``_total``: the library gives their heads one all the same."""

Value = tuple[Sequence[str], float]

_NODE_COUNTERS: tuple[tuple[str, str, Callable[[NodeStats], float]], ...] = (
    ("onnxsplit_node_requests", "Answered requests that a node executed.", lambda n: n.requests),
    ("onnxsplit_node_wait_seconds", "Time requests waited in a node.", lambda n: n.waited_ns / 1e9),
    ("onnxsplit_node_busy_seconds", "Time a node's session ran.", lambda n: n.ran_ns / 1e9),
    ("onnxsplit_node_failures", "Requests that a node could not execute.", lambda n: n.failures),
    ("onnxsplit_node_retries", "Attempts made again because a node was lost.", lambda n: n.retries),
    ("onnxsplit_node_restarts", "Processes of a node that were lost.", lambda n: n.restarts),
    ("onnxsplit_node_output_bytes", "Bytes that a node gave.", lambda n: n.output_bytes),
    ("onnxsplit_node_shared_bytes", "Of those, in shared memory.", lambda n: n.shared_bytes),
)


def exposition(sampler: Sampler) -> tuple[bytes, str]:
    """All metrics now, in Prometheus' text format, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(sampler))
    text = generate_latest(registry)
    return _BARE_HEADS.sub(rb"\1", text), CONTENT_TYPE_LATEST


class _Collector(Collector):
    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        versions = [version for version in self._sampler.service.repository if version.pipeline is not None]
        nodes = {version: version.pipeline.stats() for version in versions if version.pipeline is not None}
        yield InfoMetricFamily("onnxsplit_build", "What runs here.", {"version": onnxsplit.__version__})
        yield from self._server()
        yield from _triton(versions, nodes)
        yield from _models(versions)
        yield from self._nodes(nodes)

    def _server(self) -> Iterator[Metric]:
        sampler = self._sampler
        yield _gauge("onnxsplit_start_time_seconds", "When the server was started.", (), [((), sampler.started_s)])
        ready = sampler.service.repository.ready
        yield _gauge("onnxsplit_ready", "1 when all models execute requests.", (), [((), float(ready))])
        held = float(sampler.budget.held_bytes)
        yield _gauge("onnxsplit_receiving_bytes", "Bytes of requests that are not whole yet.", (), [((), held)])

    def _nodes(self, nodes: dict[Version, tuple[NodeStats, ...]]) -> Iterator[Metric]:
        rows = [
            ((v.model, v.number, str(node.stage), str(node.replica)), node)
            for v, found in nodes.items()
            for node in found
        ]
        times = HistogramMetricFamily(
            "onnxsplit_node_run_seconds", "Time of a request in a node's session.", labels=_NODE
        )
        for labels, node in rows:
            times.add_metric(labels, _buckets(node.run_buckets), node.ran_ns / 1e9)
        yield times
        for name, words, value in _NODE_COUNTERS:
            yield _counter(name, words, _NODE, [(labels, value(node)) for labels, node in rows])
        up = [(labels, float(node.state == "ready")) for labels, node in rows]
        yield _gauge("onnxsplit_node_up", "1 when a node is ready.", _NODE, up)
        queues = [(labels, node.queue) for labels, node in rows]
        yield _gauge("onnxsplit_node_queue_requests", "Work on its way to a node or in it, in requests.", _NODE, queues)
        last = self._sampler.last
        busy = [
            ((model.name, model.version, str(node.stage), str(node.replica)), node.utilisation)
            for model in (last.models if last is not None else ())
            for node in model.nodes
        ]
        yield _gauge("onnxsplit_node_utilisation_ratio", "Share of the last second its session ran.", _NODE, busy)


def _triton(versions: Sequence[Version], nodes: dict[Version, tuple[NodeStats, ...]]) -> Iterator[Metric]:
    """Triton's names; microseconds, as they have it. A stage is a model of its own there, as in an ensemble."""
    success: list[Value] = []
    failure: list[Value] = []
    sums: dict[str, list[Value]] = {name: [] for name in _TRITON}
    pending: list[Value] = []
    for version in versions:
        counters, labels = version.counters, (version.model, version.number)
        success.append((labels, counters.success.count))
        failure += [((*labels, reason), counters.failures[reason]) for reason in _REASONS]
        pending.append((labels, counters.pending))
        times = (counters.success, counters.queue, counters.decode, counters.infer, counters.encode)
        values = (counters.inferences, counters.executions, *(part.ns // 1000 for part in times))
        for name, value in zip(_TRITON, values, strict=True):
            sums[name].append((labels, value))
        for stage in version.plan.stages:
            mine = [node for node in nodes[version] if node.stage == stage.index]
            labels = stage_name(version.model, stage.index), version.number
            count, wait, run = (sum(getattr(n, key) for n in mine) for key in ("requests", "waited_ns", "ran_ns"))
            success.append((labels, count))
            values = (count, count, (wait + run) // 1000, wait // 1000, 0, run // 1000, 0)
            for name, value in zip(_TRITON, values, strict=True):
                sums[name].append((labels, value))
    yield _bare("nv_inference_request_success", "Requests that were answered.", _MODEL, success)
    yield _bare("nv_inference_request_failure", "Requests that failed, by why.", (*_MODEL, "reason"), failure)
    for name, words in _TRITON.items():
        yield _bare(name, words, _MODEL, sums[name])
    yield _gauge("nv_inference_pending_request_count", "Requests that are not answered yet.", _MODEL, pending)


_REASONS = ("REJECTED", "CANCELED", "TIMEOUT", "INVALID", "OTHER")
_TRITON = {
    "nv_inference_count": "Rows that were answered.",
    "nv_inference_exec_count": "Executions.",
    "nv_inference_request_duration_us": "Sum of the time from a request's arrival to its answer.",
    "nv_inference_queue_duration_us": "Sum of the time requests waited.",
    "nv_inference_compute_input_duration_us": "Sum of the time spent on making tensors of requests.",
    "nv_inference_compute_infer_duration_us": "Sum of the time spent on executing.",
    "nv_inference_compute_output_duration_us": "Sum of the time spent on making answers of tensors.",
}


def _models(versions: Sequence[Version]) -> Iterator[Metric]:
    def each(value: object) -> list[Value]:
        return [((v.model, v.number), value(v)) for v in versions]  # type: ignore[operator]

    times = HistogramMetricFamily(
        "onnxsplit_request_seconds", "Time from a request's arrival to its answer.", labels=_MODEL
    )
    for version in versions:
        times.add_metric(
            (version.model, version.number), _buckets(version.counters.buckets), version.counters.success.ns / 1e9
        )
    yield times
    failures = [
        ((v.model, v.number, reason.lower()), float(v.counters.failures[reason]))
        for v in versions
        for reason in _REASONS
    ]
    yield _counter("onnxsplit_request_failures", "Requests without an answer, by why.", (*_MODEL, "reason"), failures)
    yield _counter("onnxsplit_rows", "Rows that were answered.", _MODEL, each(lambda v: v.counters.inferences))
    yield _counter("onnxsplit_executions", "Executions of the pipeline.", _MODEL, each(lambda v: v.counters.executions))
    yield _counter("onnxsplit_retries", "Attempts that were made again.", _MODEL, each(lambda v: v.pipeline.retries))
    yield _gauge("onnxsplit_model_ready", "1 when every stage has a node.", _MODEL, each(lambda v: float(v.ready)))
    waiting = each(lambda v: len(v.batcher.queue) if v.batcher is not None else 0)
    yield _gauge("onnxsplit_waiting_requests", "Requests in line before the pipeline.", _MODEL, waiting)
    size = each(lambda v: v.batcher.queue.size_bytes if v.batcher is not None else 0)
    yield _gauge("onnxsplit_waiting_bytes", "Bytes of their inputs.", _MODEL, size)
    inside = each(lambda v: v.batcher.inside if v.batcher is not None else 0)
    yield _gauge("onnxsplit_in_flight_requests", "Executions in the pipeline.", _MODEL, inside)


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    ends = [*(f"{end / 1e9:g}" for end in BUCKETS_NS), "+Inf"]
    return [(end, float(total)) for end, total in zip(ends, accumulate(counts), strict=True)]


def _gauge(name: str, words: str, labels: Sequence[str], values: Sequence[Value]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for found, value in values:
        family.add_metric(found, value)
    return family


def _counter(name: str, words: str, labels: Sequence[str], values: Sequence[Value]) -> Metric:
    family = CounterMetricFamily(name, words, labels=labels)
    for found, value in values:
        family.add_metric(found, value)
    return family


def _bare(name: str, words: str, labels: Sequence[str], values: Sequence[Value]) -> Metric:
    """A counter whose name has no ``_total``, as Triton's have none."""
    family = Metric(name, words, "counter")
    for found, value in values:
        family.add_sample(name, dict(zip(labels, found, strict=True)), value)
    return family
