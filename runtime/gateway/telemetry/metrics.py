"""Metrics for Prometheus: Triton's, which existing dashboards show, and our own.

Ours keep Prometheus' rules: base units, ``_total`` on counters, and only labels with few values (model, version, stage,
replica, device, reason, result). The metrics of models with text are in :mod:`runtime.gateway.telemetry.text_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import onnxsplit
from runtime.coordinator.counters import BUCKETS_NS
from runtime.coordinator.status import NodeStats, StageReplicas
from runtime.gateway.counters import FAILURE_REASONS
from runtime.gateway.models.version import Version, stage_name
from runtime.gateway.services.pool import ServicePool
from runtime.gateway.telemetry import text_metrics
from runtime.gateway.telemetry.families import MetricValue, counter, gauge
from runtime.gateway.telemetry.sampler import Sampler

_MODEL = ("model", "version")
_NODE = ("model", "version", "stage", "replica")

_BARE_HEADS = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+?)_total(?= )", re.MULTILINE)
"""The heads of Triton's counters, to which the library adds a ``_total`` that their names do not have."""

_NODE_COUNTERS: tuple[tuple[str, str, Callable[[NodeStats], float]], ...] = (
    ("onnxsplit_node_requests", "Answered requests that the node executed.", lambda n: n.requests),
    ("onnxsplit_node_wait_seconds", "Time requests waited in the node.", lambda n: n.waited_ns / 1e9),
    ("onnxsplit_node_busy_seconds", "Time in which the node's session ran.", lambda n: n.ran_ns / 1e9),
    ("onnxsplit_node_failures", "Requests that the node could not execute.", lambda n: n.failures),
    ("onnxsplit_node_retries", "Attempts repeated because a node was lost.", lambda n: n.retries),
    ("onnxsplit_node_restarts", "Processes of the node that were lost.", lambda n: n.restarts),
    ("onnxsplit_node_output_bytes", "Bytes of outputs.", lambda n: n.output_bytes),
    ("onnxsplit_node_shared_bytes", "Bytes of outputs that were passed in shared memory.", lambda n: n.shared_bytes),
)

_SERVICE_GAUGES: tuple[tuple[str, str, Callable[[ServicePool], float]], ...] = (
    ("workers", "Workers that take calls.", lambda pool: pool.workers),
    ("waiting", "Calls that wait for a worker.", lambda pool: pool.waiting),
    ("executing", "Calls that workers execute.", lambda pool: pool.executing),
)


def exposition(sampler: Sampler) -> tuple[bytes, str]:
    """The current values of all metrics in Prometheus' text format, and the content type."""
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
        yield InfoMetricFamily("onnxsplit_build", "Version of onnxsplit.", {"version": onnxsplit.__version__})
        yield from self._server()
        yield from _triton(versions, nodes)
        yield from _models(versions)
        yield from text_metrics.metrics(versions, nodes, self._sampler.text_times)
        yield from self._cache(versions)
        yield from _replicas(versions)
        yield from _recuts(versions)
        yield from self._nodes(nodes)
        yield from _services(self._sampler.service.pools)

    def _server(self) -> Iterator[Metric]:
        sampler = self._sampler
        yield gauge("onnxsplit_start_time_seconds", "Time at which the server started.", (), [((), sampler.started_s)])
        ready = sampler.service.repository.ready
        yield gauge("onnxsplit_ready", "1 when probes are told that the server is ready.", (), [((), float(ready))])
        held = float(sampler.budget.held_bytes)
        yield gauge("onnxsplit_receiving_bytes", "Bytes of requests that the server holds.", (), [((), held)])

    def _cache(self, versions: Sequence[Version]) -> Iterator[Metric]:
        """Metrics of the response cache; none where there is none."""
        if (cache := self._sampler.service.cache) is None:
            return
        yield gauge(
            "onnxsplit_response_cache_bytes", "Bytes that the response cache keeps.", (), [((), cache.held_bytes)]
        )
        yield gauge("onnxsplit_response_cache_entries", "Responses that the cache keeps.", (), [((), len(cache))])
        for name, text, part in (
            ("hits", "Requests that the response cache answered.", "cache_hit"),
            ("misses", "Requests that the response cache did not answer.", "cache_miss"),
        ):
            values = [((v.model, v.number), getattr(v.counters, part).count) for v in versions]
            yield counter(f"onnxsplit_response_cache_{name}", text, _MODEL, values)

    def _nodes(self, nodes: Mapping[Version, Sequence[NodeStats]]) -> Iterator[Metric]:
        rows = [
            ((v.model, v.number, str(node.stage), str(node.replica)), node)
            for v, stats in nodes.items()
            for node in stats
        ]
        times = HistogramMetricFamily(
            "onnxsplit_node_run_seconds", "Time of one execution in the node's session.", labels=_NODE
        )
        for labels, node in rows:
            times.add_metric(labels, _buckets(node.run_buckets), node.ran_ns / 1e9)
        yield times
        for name, text, value in _NODE_COUNTERS:
            yield counter(name, text, _NODE, [(labels, value(node)) for labels, node in rows])
        up = [(labels, float(node.state == "ready")) for labels, node in rows]
        yield gauge("onnxsplit_node_up", "1 when the node is ready.", _NODE, up)
        queues = [(labels, node.queue) for labels, node in rows]
        yield gauge("onnxsplit_node_queue_requests", "Requests on their way to the node or in it.", _NODE, queues)
        last = self._sampler.last
        busy = [
            ((model.name, model.version, str(node.stage), str(node.replica)), node.utilisation)
            for model in (last.models if last is not None else ())
            for node in model.nodes
        ]
        yield gauge(
            "onnxsplit_node_utilisation_ratio", "Share of the last second in which the node's session ran.", _NODE, busy
        )


def _triton(versions: Sequence[Version], nodes: Mapping[Version, Sequence[NodeStats]]) -> Iterator[Metric]:
    """Triton's metrics, in microseconds. Each stage is reported as a model of its own, as in an ensemble."""
    success: list[MetricValue] = []
    failure: list[MetricValue] = []
    sums: dict[str, list[MetricValue]] = {name: [] for name in _TRITON}
    pending: list[MetricValue] = []
    for version in versions:
        counters, labels = version.counters, (version.model, version.number)
        success.append((labels, counters.success.count))
        failure += [((*labels, reason), counters.failures[reason]) for reason in FAILURE_REASONS]
        pending.append((labels, counters.pending))
        times = (counters.success, counters.queue, counters.decode, counters.infer, counters.encode)
        values = (counters.inferences, counters.executions, *(part.ns // 1000 for part in times))
        for name, value in zip(_TRITON, values, strict=True):
            sums[name].append((labels, value))
        for stage in version.plan.stages:
            stats = [node for node in nodes[version] if node.stage == stage.index]
            labels = stage_name(version.model, stage.index), version.number
            count, wait, run = (sum(getattr(n, key) for n in stats) for key in ("requests", "waited_ns", "ran_ns"))
            success.append((labels, count))
            values = (count, count, (wait + run) // 1000, wait // 1000, 0, run // 1000, 0)
            for name, value in zip(_TRITON, values, strict=True):
                sums[name].append((labels, value))
    yield _bare("nv_inference_request_success", "Requests that were answered.", _MODEL, success)
    yield _bare("nv_inference_request_failure", "Requests that failed, by reason.", (*_MODEL, "reason"), failure)
    for name, text in _TRITON.items():
        yield _bare(name, text, _MODEL, sums[name])
    yield gauge("nv_inference_pending_request_count", "Requests that are not answered yet.", _MODEL, pending)


_TRITON = {
    "nv_inference_count": "Rows that were answered.",
    "nv_inference_exec_count": "Executions.",
    "nv_inference_request_duration_us": "Time from the arrival of requests to their answers.",
    "nv_inference_queue_duration_us": "Time requests waited for the pipeline.",
    "nv_inference_compute_input_duration_us": "Time for decoding requests.",
    "nv_inference_compute_infer_duration_us": "Time for executing requests.",
    "nv_inference_compute_output_duration_us": "Time for encoding responses.",
}


def _models(versions: Sequence[Version]) -> Iterator[Metric]:
    def each(value: object) -> list[MetricValue]:
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
        for reason in FAILURE_REASONS
    ]
    yield counter("onnxsplit_request_failures", "Requests that failed, by reason.", (*_MODEL, "reason"), failures)
    yield counter("onnxsplit_rows", "Rows that were answered.", _MODEL, each(lambda v: v.counters.inferences))
    yield counter("onnxsplit_executions", "Executions of the pipeline.", _MODEL, each(lambda v: v.counters.executions))
    yield counter("onnxsplit_retries", "Attempts that were repeated.", _MODEL, each(lambda v: v.pipeline.retries))
    yield gauge(
        "onnxsplit_model_ready",
        "1 when the model executes requests.",
        _MODEL,
        each(lambda v: float(v.why_not() is None)),
    )
    waiting = each(lambda v: len(v.batcher.queue) if v.batcher is not None else 0)
    yield gauge("onnxsplit_waiting_requests", "Requests that wait for the pipeline.", _MODEL, waiting)
    size = each(lambda v: v.batcher.queue.size_bytes if v.batcher is not None else 0)
    yield gauge("onnxsplit_waiting_bytes", "Bytes of the inputs of waiting requests.", _MODEL, size)
    sequences = each(lambda v: v.sequences.running if v.sequences is not None else 0)
    yield gauge("onnxsplit_sequences", "Sequences whose states the server keeps.", _MODEL, sequences)
    states = each(lambda v: v.sequences.size_bytes if v.sequences is not None else 0)
    yield gauge("onnxsplit_sequence_state_bytes", "Bytes of the states of sequences.", _MODEL, states)
    executing = each(lambda v: v.batcher.executing if v.batcher is not None else 0)
    yield gauge("onnxsplit_in_flight_requests", "Executions in the pipeline.", _MODEL, executing)


def _services(pools: Sequence[ServicePool]) -> Iterator[Metric]:
    """Metrics of services; none where there are none."""
    if not pools:
        return
    for name, text, value in _SERVICE_GAUGES:
        yield gauge(f"onnxsplit_service_{name}", text, ("service",), [((p.description.name,), value(p)) for p in pools])
    restarts = [((pool.description.name,), float(pool.counters.restarts)) for pool in pools]
    yield counter("onnxsplit_service_worker_restarts", "Workers that were started again.", ("service",), restarts)
    rows = [
        ((pool.description.name, *labels), number, seconds)
        for pool in pools
        for labels, (number, seconds) in pool.counters.calls.items()
    ]
    kinds = ("service", "endpoint", "outcome")
    yield counter("onnxsplit_service_calls", "Calls of endpoints.", kinds, [(labels, n) for labels, n, _ in rows])
    yield counter("onnxsplit_service_seconds", "Seconds of these calls.", kinds, [(labels, s) for labels, _, s in rows])


def _replicas(versions: Sequence[Version]) -> Iterator[Metric]:
    """The number of nodes of each stage, and the limits within which the load decides; equal where it is fixed."""
    rows = [
        ((v.model, v.number, str(each.stage)), each)
        for v in versions
        if v.pipeline is not None
        for each in v.pipeline.replicas
    ]
    for name, text, count in _REPLICAS:
        yield gauge(name, text, (*_MODEL, "stage"), [(labels, float(count(each))) for labels, each in rows])


_REPLICAS: tuple[tuple[str, str, Callable[[StageReplicas], int]], ...] = (
    ("onnxsplit_stage_replicas", "Nodes of the stage, those that start included.", lambda s: s.nodes),
    ("onnxsplit_stage_replicas_min", "The fewest nodes that the load may leave the stage.", lambda s: s.least),
    ("onnxsplit_stage_replicas_max", "The most nodes that the load may give the stage.", lambda s: s.most),
)


def _recuts(versions: Sequence[Version]) -> Iterator[Metric]:
    """How the plans of models were changed, and the drift of devices where that is watched."""
    rows = [((v.model, v.number), v.pipeline.recuts) for v in versions if v.pipeline is not None]
    number = [(labels, float(recuts.generation)) for labels, recuts in rows]
    yield gauge("onnxsplit_generation", "Number of the plan that runs; 1 when the model is loaded.", _MODEL, number)
    results = [((*labels, result), float(n)) for labels, recuts in rows for result, n in recuts.results.items()]
    yield counter("onnxsplit_recuts", "Changes of the plan that have ended, by result.", (*_MODEL, "result"), results)
    drift = [((*labels, device), ratio) for labels, recuts in rows for device, ratio in recuts.drift.items()]
    if drift:
        text = "Time of the device's stages over their usual time, compared with the other devices."
        yield gauge("onnxsplit_drift_ratio", text, (*_MODEL, "device"), drift)


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    ends = [*(f"{end / 1e9:g}" for end in BUCKETS_NS), "+Inf"]
    return [(end, float(total)) for end, total in zip(ends, accumulate(counts), strict=True)]


def _bare(name: str, text: str, labels: Sequence[str], values: Sequence[MetricValue]) -> Metric:
    """A counter whose name does not end in ``_total``, as Triton's do not."""
    family = Metric(name, text, "counter")
    for label_values, value in values:
        family.add_sample(name, dict(zip(labels, label_values, strict=True)), value)
    return family
