"""Which replica takes a request. Pure: numbers in, a choice out.

    completion   where it will be done first: the transfer, what is before it, itself; at the replica's own speed
    resource     in proportion to measured capacity, whatever is outstanding (smooth weighted round robin)
    task         where the least work is outstanding, weighted by what requests cost
    latency      where the slowest recent time, times the work outstanding, is least (peak-EWMA)
    round-robin  each in turn

Among many replicas, only a few are looked at: the one whose turn it is, and some at random, of which one that is much
better is taken instead. What a choice costs stays the same, and a few are nearly as good as all ("the power of two
choices").

Costs are in thousandths of an ordinary request, times in nanoseconds.

Source of peak-EWMA: Finagle's load balancer, https://twitter.github.io/finagle/guide/Clients.html#power-of-two-choices-p2c-least-loaded;
of smooth weighted round robin: nginx, ngx_http_upstream_round_robin.c; of looking at a few: M. Mitzenmacher, "The
Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.wire.messages.control import Policy

UNIT_COST = 1000
"""The cost of the request that a plan was made for."""

FULL_SCAN_LIMIT = 16
"""Of so many replicas all are looked at for every request."""

SAMPLE_SIZE = 4
"""Of more, so many, the one whose turn it is among them."""

_MUCH = 1.5  # another is taken out of turn when its cost is so much less
_MASK = (1 << 64) - 1
_FORGET_NS = 500_000_000  # what was measured longer ago than this counts for little
_DOUBT_NS = 10_000_000_000  # by then a replica that nobody chose is thought as quick as the others again
_PEAK_NS = 2_000_000_000  # by then a peak has come down


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of a replica when a request is to go there.

    Attributes:
        outstanding: cost of what is on its way to it or in it.
        service_ns: for an ordinary request; 0 when nothing is known yet.
        peak_ns: the slowest of late.
        age_ns: since that was measured.
        running: cost of what runs there now; 0 for nothing, or when that is not known.
        running_ns: for how long it has.
        transfer_ns: for the request's tensors to get there.
    """

    outstanding: int
    service_ns: int = 0
    peak_ns: int = 0
    age_ns: int = 0
    running: int = 0
    running_ns: int = 0
    transfer_ns: int = 0


class Balancer:
    """Chooses among the replicas of one stage; replicas are told apart by position.

    Args:
        policy: by what.
        seed: of what is left to chance; processes that choose alike should not choose the same.
    """

    def __init__(self, policy: Policy, *, seed: int = 0) -> None:
        self._policy = policy
        self._first = seed * 2654435761 % (1 << 32)  # where it begins among equals
        self._turn = self._first
        self._random = seed
        self._last: dict[int, int] = {}  # the turn in which each was chosen last
        self._credit: dict[int, float] = {}  # of the weighted round robin

    def look_at(self, count: int) -> Sequence[int]:
        """The positions to choose among: all of a few replicas; of many, the one whose turn it is, some at random."""
        if count <= FULL_SCAN_LIMIT:
            return range(count)
        found = [self._turn % count]
        for _ in range(0 if self._policy == "round-robin" else SAMPLE_SIZE - 1):
            self._random = (self._random * 6364136223846793005 + 1442695040888963407) & _MASK  # Knuth's MMIX
            found.append((self._random >> 33) % count)
        return found

    def choose(self, replicas: Sequence[Replica], cost: int, places: Sequence[int] | None = None) -> int:
        """The position of the replica that is to take a request.

        Of all, the best; of equals, the one not chosen for longest. Where ``places`` are the positions of a few of many
        (:meth:`look_at`), the first, whose turn it is, unless another is much better: what senders know of one of many
        is seldom fresh, and who acts on it meets others who do.
        """
        self._turn += 1
        many = isinstance(places, list)
        places = range(len(replicas)) if places is None else places
        if len(places) == 1:
            chosen = places[0]
        elif self._policy == "resource":
            chosen = self._in_proportion(places, _services(replicas))
        else:
            costs = self._costs(replicas, cost)
            if many and costs[0] <= _MUCH * min(costs):
                chosen = places[0]
            else:
                last, first, count = self._last, self._first, len(places)
                order = [(last.get(place, 0), (place + first) % count, place) for place in places]
                _, (_, _, chosen) = min(zip(costs, order, strict=True))
        self._last[chosen] = self._turn
        return chosen

    def _costs(self, replicas: Sequence[Replica], cost: int) -> Sequence[float]:
        match self._policy:
            case "round-robin":
                return [0.0] * len(replicas)
            case "task":
                return [float(replica.outstanding) for replica in replicas]
            case "latency":
                peaks = [r.peak_ns * 0.5 ** (r.age_ns / _PEAK_NS) for r in replicas]
                return [peak * (r.outstanding + cost) for peak, r in zip(peaks, replicas, strict=True)]
            case _:
                services = _services(replicas)
                return [_completion_ns(r, service, cost) for r, service in zip(replicas, services, strict=True)]

    def _in_proportion(self, places: Sequence[int], services: Sequence[float]) -> int:
        weights = [1.0 / max(1.0, service) for service in services]
        for position, weight in zip(places, weights, strict=True):
            self._credit[position] = self._credit.get(position, 0.0) + weight / sum(weights)
        chosen = max(places, key=lambda n: (self._credit[n], -n))
        self._credit[chosen] -= 1.0
        return chosen


def _services(replicas: Sequence[Replica]) -> list[float]:
    """What an ordinary request takes at each: as measured, doubted with age, and never less than what runs shows."""
    known = [replica.service_ns for replica in replicas if replica.service_ns]
    best = min(known, default=1)
    found = []
    for replica in replicas:
        trust = 1.0 if replica.service_ns else 0.0
        if not replica.outstanding:  # one request at a time finds out whether it still is so slow
            trust *= 0.5 ** (replica.age_ns / _DOUBT_NS)
        service = best + (max(best, replica.service_ns) - best) * trust
        if replica.running:
            service = max(service, replica.running_ns * UNIT_COST / replica.running)
        found.append(service)
    return found


def _completion_ns(replica: Replica, service_ns: float, cost: int) -> float:
    work = service_ns * (replica.outstanding + cost) / UNIT_COST
    behind = min(replica.running_ns, service_ns * replica.running / UNIT_COST)
    return replica.transfer_ns + work - behind


class ServiceTime:
    """How long requests take at a node, from the runs so far.

    Attributes:
        service_ns: for an ordinary request; times of requests that cost more are spread over their cost.
        peak_ns: the same, the slowest of late.
        longest_ns: the same, the slowest ever.
    """

    def __init__(self) -> None:
        self.service_ns = 0
        self.peak_ns = 0
        self.longest_ns = 0
        self._run = 0.0
        self._cost = 0.0
        self._at_ns = 0

    def ran(self, run_ns: int, cost: int, now_ns: int) -> None:
        """A run of a request ended."""
        each = run_ns * UNIT_COST / cost
        passed = now_ns - self._at_ns if self._at_ns else 0
        self._at_ns = now_ns
        keep = math.exp(-passed / max(_FORGET_NS, 4 * run_ns))
        self._run = self._run * keep + run_ns
        self._cost = self._cost * keep + cost
        self.service_ns = int(self._run * UNIT_COST / self._cost)
        self.longest_ns = int(max(each, self.longest_ns))
        self.peak_ns = int(max(each, self.service_ns, self.peak_ns * math.exp(-passed / _PEAK_NS)))


def cost_of(size_bytes: int, ordinary_bytes: int) -> int:
    """The cost of a request by the bytes of its inputs, beside those that the plan was made for."""
    return max(1, min(size_bytes * UNIT_COST // max(1, ordinary_bytes), 1 << 40))
