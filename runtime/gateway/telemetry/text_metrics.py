"""Metrics of models with text.

Where vLLM has a metric, ours has its name with the prefix ``onnxsplit_``, its labels ``model_name`` and
``finished_reason``, and its buckets, so that dashboards only need another prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from runtime.coordinator.status import NodeStats, SequenceStats
from runtime.gateway.models.version import Version
from runtime.gateway.openai.figures import FinishReason
from runtime.gateway.telemetry.families import counter, gauge
from runtime.gateway.telemetry.texts import Histogram, TextTimes

_LABELS = ("model", "version", "model_name")
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

_GAUGES: tuple[tuple[str, str, Callable[[SequenceStats], float]], ...] = (
    ("onnxsplit_num_requests_running", "Sequences that nodes have states of.", lambda s: s.running),
    ("onnxsplit_num_requests_waiting", "Sequences that wait for room.", lambda s: s.waiting),
    (
        "onnxsplit_kv_cache_usage_perc",
        "Share of the bytes for caches that sequences have reserved, on the fullest node; 1 means all.",
        lambda s: s.cache_usage,
    ),
)

_COUNTERS: tuple[tuple[str, str, Callable[[SequenceStats], float]], ...] = (
    ("onnxsplit_steps", "Steps that have come back.", lambda s: s.steps),
    ("onnxsplit_step_rows", "Sequences in these steps, all together.", lambda s: s.rows),
    (
        "onnxsplit_prefix_cache_hits",
        "Tokens of prompts that were not computed, because another sequence had begun alike.",
        lambda s: s.reused_tokens,
    ),
    ("onnxsplit_sequence_replays", "Sequences that were read again after nodes were lost.", lambda s: s.replays),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[TextTimes], Histogram]], ...] = (
    ("onnxsplit_time_to_first_token_seconds", "Time to the first token of a text.", lambda t: t.first_token),
    ("onnxsplit_inter_token_latency_seconds", "Time between two tokens of a text.", lambda t: t.gap),
    ("onnxsplit_e2e_request_latency_seconds", "Time from the beginning of a text to its end.", lambda t: t.whole),
    ("onnxsplit_request_prompt_tokens", "Tokens of the prompts of texts that have ended.", lambda t: t.prompt),
    ("onnxsplit_request_generation_tokens", "Tokens of texts that have ended.", lambda t: t.generation),
)


def metrics(
    versions: Sequence[Version], nodes: Mapping[Version, Sequence[NodeStats]], times: Mapping[Version, TextTimes]
) -> Iterator[Metric]:
    """The metrics of the versions that have text.

    Args:
        versions: the loaded versions.
        nodes: the statistics of their nodes.
        times: what was measured of their texts.
    """
    served = [(version, _labels(version), stats) for version in versions if (stats := _sequences(version)) is not None]
    if not served:
        return
    for name, text, value in _GAUGES:
        yield gauge(name, text, _LABELS, [(labels, value(stats)) for _, labels, stats in served])
    held = [(labels, sum(node.state_bytes for node in nodes[version])) for version, labels, _ in served]
    yield gauge("onnxsplit_cache_bytes", "Bytes of the caches of sequences, on all nodes.", _LABELS, held)
    for name, text, value in _COUNTERS:
        yield counter(name, text, _LABELS, [(labels, value(stats)) for _, labels, stats in served])
    figures = [(labels, version.text_figures) for version, labels, _ in served]
    prompts = [(labels, one.prompt_tokens) for labels, one in figures]
    yield counter("onnxsplit_prompt_tokens", "Tokens of all prompts.", _LABELS, prompts)
    yield counter("onnxsplit_prefix_cache_queries", "Tokens of prompts that were looked up.", _LABELS, prompts)
    generated = [(labels, one.generation_tokens) for labels, one in figures]
    yield counter("onnxsplit_generation_tokens", "Tokens of all texts.", _LABELS, generated)
    ended = [((*labels, reason), one.finished[reason]) for labels, one in figures for reason in _REASONS]
    yield counter("onnxsplit_request_success", "Texts that have ended.", (*_LABELS, "finished_reason"), ended)
    for name, text, histogram in _HISTOGRAMS:
        family = HistogramMetricFamily(name, text, labels=_LABELS)
        for version, labels, _ in served:
            one = histogram(times[version])
            family.add_metric(labels, one.buckets, one.total)
        yield family


def _labels(version: Version) -> tuple[str, str, str]:
    return version.model, version.number, version.model


def _sequences(version: Version) -> SequenceStats | None:
    return version.pipeline.sequences if version.pipeline is not None and version.text is not None else None
