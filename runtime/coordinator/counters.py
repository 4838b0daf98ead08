"""Counters of the work that a pipeline's nodes have done. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from runtime.time_buckets import bucket_of
from runtime.wire.messages.data import Visit

_LATENCIES = 1000  # number of requests that the percentiles cover

BUCKETS_NS = tuple(int(1000 * scale * 10**power) for power in range(2, 8) for scale in (1, 2.5, 5))
"""Upper ends of the buckets in which session times are counted, 100 us to 50 s. One more bucket counts longer times."""

MOST_COSTS = 32
"""Number of costs whose session times are counted apart. All further ones share the entry :data:`OTHER_COSTS`."""

OTHER_COSTS = -1
"""The key of the session times of requests whose cost has no entry of its own."""

_COST_BITS = 3  # leading bits of a cost that are kept: four classes for every power of two


@dataclass
class NodeCounters:
    """Counters of one slot, over all its processes so far.

    Attributes:
        requests: answered requests that were executed here.
        failures: requests that could not be executed.
        restarts: processes that were lost.
        retries: attempts that were repeated because one of those was lost.
        wait_ns: sum of the times that requests waited for their turn.
        run_ns: sum of the times in the session.
        output_bytes: bytes of all outputs.
        shared_bytes: bytes of those outputs that were passed in shared memory.
        latencies_ns: times from arrival to departure, of the last thousand requests.
        buckets: number of session times in each bucket of :data:`BUCKETS_NS`.
        times: number of times from arrival to departure, by :func:`~runtime.time_buckets.bucket_of`.
        by_cost: number of requests and the sum of their times in the session, by the cost of the request, rounded down
            to its three leading bits. It tells a slow device from long requests.
    """

    requests: int = 0
    failures: int = 0
    restarts: int = 0
    retries: int = 0
    wait_ns: int = 0
    run_ns: int = 0
    output_bytes: int = 0
    shared_bytes: int = 0
    latencies_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))
    times: dict[int, int] = field(default_factory=dict)
    by_cost: dict[int, list[int]] = field(default_factory=dict)

    def add(self, visit: Visit, cost: int) -> None:
        """Count a request of this cost that was answered and had been executed here."""
        run_ns = visit.ended_ns - visit.started_ns
        self.requests += 1
        self.wait_ns += visit.started_ns - visit.arrived_ns
        self.run_ns += run_ns
        self.buckets[bisect_left(BUCKETS_NS, run_ns)] += 1
        self.output_bytes += visit.output_bytes
        self.shared_bytes += visit.shared_bytes
        self.latencies_ns.append(visit.sent_ns - visit.arrived_ns)
        bucket = bucket_of(visit.sent_ns - visit.arrived_ns)
        self.times[bucket] = self.times.get(bucket, 0) + 1
        shift = cost.bit_length() - _COST_BITS
        rounded = cost >> shift << shift if shift > 0 else cost
        runs = self.by_cost.get(rounded) or self._runs_of(rounded)
        runs[0] += 1
        runs[1] += run_ns

    def _runs_of(self, rounded: int) -> list[int]:
        """The entry of a rounded cost that has none: a new one, or the shared one if the table is full."""
        return self.by_cost.setdefault(rounded if len(self.by_cost) < MOST_COSTS else OTHER_COSTS, [0, 0])
