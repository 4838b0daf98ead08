"""Families of metrics: one name with a value for each combination of labels."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

MetricValue = tuple[Sequence[str], float]
"""The values of the labels, and the value of the metric."""


def gauge(name: str, text: str, labels: Sequence[str], values: Sequence[MetricValue]) -> Metric:
    """A gauge."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family


def counter(name: str, text: str, labels: Sequence[str], values: Sequence[MetricValue]) -> Metric:
    """A counter; its name gets ``_total``."""
    family = CounterMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family
