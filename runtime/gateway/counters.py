"""What is counted of a served model: for statistics, metrics and the page."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

from runtime.coordinator.counters import BUCKETS_NS

_LATENCIES = 1000


@dataclass
class Duration:
    """How often something took place, and how long it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """It took place again."""
        self.count += count
        self.ns += ns


@dataclass
class Counters:
    """Of one version of a model since it was loaded. Times are nanoseconds.

    Attributes:
        inferences: rows that were answered; a request without a batch axis is one.
        executions: times that the pipeline ran for them.
        pending: requests that have come and are not answered.
        success: requests that were answered, from the whole request being there to the answer.
        failures: the others, by why: ``REJECTED`` (no room, or no hope to be in time), ``CANCELED``, ``TIMEOUT``,
            ``INVALID`` or ``OTHER``.
        fail: the time of those.
        queue: waiting for the pipeline.
        decode: making tensors of what came.
        infer: in the pipeline.
        encode: making what goes of tensors.
        batches: executions by rows.
        last_ms: when the last one was, in milliseconds of the epoch.
        latencies_ns: of the last thousand that were answered.
        buckets: the time of those that were answered, in buckets of ``BUCKETS_NS``.
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
    batches: dict[int, Duration] = field(default_factory=dict)
    last_ms: int = 0
    last_error: str = ""
    latencies_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))

    def ran(self, rows: int, ns: int) -> None:
        """The pipeline ran for so many rows."""
        self.executions += 1
        if len(self.batches) < _LATENCIES or rows in self.batches:
            self.batches.setdefault(rows, Duration()).add(ns)

    def answered(self, rows: int, *, decode_ns: int, queue_ns: int, infer_ns: int, encode_ns: int) -> None:
        """A request was."""
        took = decode_ns + queue_ns + infer_ns + encode_ns
        self.inferences += rows
        self.success.add(took)
        self.decode.add(decode_ns)
        self.queue.add(queue_ns)
        self.infer.add(infer_ns)
        self.encode.add(encode_ns)
        self.last_ms = time.time_ns() // 1_000_000
        self.latencies_ns.append(took)
        self.buckets[bisect_left(BUCKETS_NS, took)] += 1

    def failed(self, why: str, ns: int, message: str) -> None:
        """A request was not answered with outputs."""
        self.failures[why] += 1
        self.fail.add(ns)
        self.last_error = message
