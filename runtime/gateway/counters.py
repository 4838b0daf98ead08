"""Counters of a served model, for the statistics, the metrics and the page."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from onnxsplit.errors import InputError
from runtime.coordinator.counters import BUCKETS_NS
from runtime.errors import Busy, Cancelled, DeadlineExceeded, PipelineClosed, StageUnavailable
from runtime.gateway.errors import GatewayError, NotLoaded
from runtime.gateway.protocol.documents import Duration
from runtime.gateway.telemetry.slowest import Slowest
from runtime.time_buckets import bucket_of

_BATCH_SIZES = 1000  # batch sizes that are counted separately
FAILURE_REASONS = ("REJECTED", "CANCELED", "TIMEOUT", "INVALID", "OTHER")
"""Why a request failed, as the metrics name it."""


@dataclass
class Counters:
    """Counters of one version of a model since it was loaded. Times are in nanoseconds.

    Attributes:
        inferences: Rows that were answered; a request without a batch axis counts as one.
        executions: Executions of the pipeline.
        pending: Requests that have arrived and are not answered.
        success: Time from the arrival of answered requests to their responses.
        failures: Number of failed requests by reason: REJECTED (the model takes no requests, the queue is full, or the
            deadline cannot be met), CANCELED, TIMEOUT, INVALID or OTHER.
        fail: Time from the arrival of failed requests to their errors.
        queue: Time for which requests waited for the pipeline.
        decode: Time for decoding requests.
        infer: Time in the pipeline.
        encode: Time for encoding responses.
        cache_hit: Time for finding outputs in the response cache.
        cache_miss: Time for looking outputs up in vain.
        batches: Executions by number of rows.
        last_ms: Time of the last answer, in milliseconds since the epoch.
        last_errors: Message of the last failure for each reason.
        buckets: Histogram of the times of answered requests, in the buckets of ``BUCKETS_NS``.
        times: Number of times of answered requests, by :func:`~runtime.time_buckets.bucket_of`.
        slowest: The slowest requests of the present second.
    """

    inferences: int = 0
    executions: int = 0
    pending: int = 0
    success: Duration = field(default_factory=Duration)
    failures: Counter[str] = field(default_factory=Counter)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    encode: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)
    last_ms: int = 0
    last_errors: dict[str, str] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))
    times: dict[int, int] = field(default_factory=dict)
    slowest: Slowest = field(default_factory=Slowest)

    def ran(self, rows: int, ns: int) -> None:
        """Count an execution of ``rows`` that took ``ns``."""
        self.executions += 1
        if len(self.batches) < _BATCH_SIZES or rows in self.batches:
            self.batches.setdefault(rows, Duration()).add(ns)

    def answered(self, rows: int, *, decode_ns: int, queue_ns: int, infer_ns: int, encode_ns: int) -> None:
        """Count a request of ``rows`` that was answered."""
        took = decode_ns + queue_ns + infer_ns + encode_ns
        self.inferences += rows
        self.success.add(took)
        self.decode.add(decode_ns)
        self.queue.add(queue_ns)
        self.infer.add(infer_ns)
        self.encode.add(encode_ns)
        self.last_ms = time.time_ns() // 1_000_000
        self.buckets[bisect_left(BUCKETS_NS, took)] += 1
        bucket = bucket_of(took)
        self.times[bucket] = self.times.get(bucket, 0) + 1

    def failed(self, reason: str, ns: int, message: str) -> None:
        """Count a request that failed after ``ns``."""
        self.failures[reason] += 1
        self.fail.add(ns)
        self.last_errors[reason] = message


def failure_reason(error: BaseException) -> str:
    """The reason for which a request failed; one of :data:`FAILURE_REASONS`."""
    if isinstance(error, Busy | StageUnavailable | PipelineClosed | NotLoaded):
        return "REJECTED"
    if isinstance(error, asyncio.CancelledError | Cancelled):
        return "CANCELED"
    if isinstance(error, DeadlineExceeded):
        return "TIMEOUT"
    return "INVALID" if isinstance(error, InputError | GatewayError) else "OTHER"
