"""The policies that choose a replica for a request. Pure: numbers in, a choice out.

    completion   least expected completion time: transfer + service time x (outstanding cost + cost of the request)
    resource     in proportion to measured capacity, regardless of load (smooth weighted round robin)
    task         least outstanding work, weighted by the cost of requests
    latency      least peak-EWMA of the service time x outstanding work
    round-robin  each replica in turn

A stage with more than :data:`FULL_SCAN_LIMIT` replicas is sampled, as in "the power of d choices": the candidates are
the replica whose turn it is and :data:`SAMPLE_SIZE` - 1 random ones. A choice then takes the same time for any
number of replicas, and is nearly as good as after a full scan.

Costs are integers in units of 1/:data:`UNIT_COST` of the request that the plan was made for. Times are nanoseconds.

Sources: peak-EWMA is from Finagle's load balancer,
https://twitter.github.io/finagle/guide/Clients.html#power-of-two-choices-p2c-least-loaded; smooth weighted round robin
from nginx, ngx_http_upstream_round_robin.c; sampling from M. Mitzenmacher, "The Power of Two Choices in Randomized Load
Balancing", IEEE TPDS 12(10), 2001.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.wire.messages.control import Policy

UNIT_COST = 1000
"""The cost of the request that a plan was made for: a request of unit cost."""

FULL_SCAN_LIMIT = 16
"""Number of replicas up to which all are candidates for every request."""

SAMPLE_SIZE = 4
"""Number of candidates where a stage has more replicas: the d of "the power of d choices"."""

_CLEARLY_WORSE = 1.5  # the replica whose turn it is loses its turn when its cost is more than this times the least
_MASK = (1 << 64) - 1
_EWMA_TIME_CONSTANT_NS = 500_000_000  # a measured service time of this age has the weight 1/e
_PEAK_TIME_CONSTANT_NS = 2_000_000_000  # a peak decays towards the mean by 1/e in this time
_SLOWNESS_HALF_LIFE_NS = 10_000_000_000  # an idle replica's excess over the best service time halves in this time


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known about a replica when a request is to be sent.

    Attributes:
        outstanding: cost of the requests that are on their way to it, wait there or run there.
        service_ns: time that a request of unit cost takes there (EWMA); 0 when it is not known.
        peak_ns: the same as a peak-EWMA.
        age_ns: time since they were measured.
        running: cost of the request that runs there now; 0 for none, or when it is not known.
        running_ns: time that it has been running.
        transfer_ns: time that the request's tensors take to get there.
    """

    outstanding: int
    service_ns: int = 0
    peak_ns: int = 0
    age_ns: int = 0
    running: int = 0
    running_ns: int = 0
    transfer_ns: int = 0


class Balancer:
    """Chooses among the replicas of one stage, which it identifies by their positions.

    Args:
        policy: the policy.
        seed: for random choices and ties. Processes need different seeds, so that they do not all choose the same
            replica at the same time.
    """

    def __init__(self, policy: Policy, *, seed: int = 0) -> None:
        self._policy = policy
        self._first = seed * 2654435761 % (1 << 32)  # the position that is preferred first in a tie
        self._turn = self._first
        self._random = seed
        self._last: dict[int, int] = {}  # the turn in which each replica was last chosen
        self._credit: dict[int, float] = {}  # state of the weighted round robin

    def candidates(self, count: int) -> Sequence[int]:
        """The positions of the candidates for the next request, out of ``count`` replicas.

        Returns:
            A range of all positions up to :data:`FULL_SCAN_LIMIT` replicas; else a list, a sample whose first item is
            the replica whose turn it is.
        """
        if count <= FULL_SCAN_LIMIT:
            return range(count)
        sample = [self._turn % count]
        for _ in range(0 if self._policy == "round-robin" else SAMPLE_SIZE - 1):
            self._random = (self._random * 6364136223846793005 + 1442695040888963407) & _MASK  # Knuth's MMIX
            sample.append((self._random >> 33) % count)
        return sample

    def choose(self, replicas: Sequence[Replica], cost: int, places: Sequence[int] | None = None) -> int:
        """Choose the replica for a request.

        After a full scan it is the one of least cost; of equals, the one that was not chosen for longest. In a sample
        it is the first, whose turn it is, unless its cost is clearly worse. (Information about one of many replicas is
        usually stale, and senders that all act on the same information overload the same replica.)

        Args:
            replicas: what is known about the candidates; may be empty when there is only one.
            cost: cost of the request.
            places: the candidates' positions, from :meth:`candidates`; those of ``replicas`` when None.

        Returns:
            The position of the chosen replica.
        """
        self._turn += 1
        sampled = isinstance(places, list)
        places = range(len(replicas)) if places is None else places
        if len(places) == 1:
            chosen = places[0]
        elif self._policy == "resource":
            chosen = self._in_proportion(places, _services(replicas))
        else:
            costs = self._costs(replicas, cost)
            if sampled and costs[0] <= _CLEARLY_WORSE * min(costs):
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
                peaks = [r.peak_ns * 0.5 ** (r.age_ns / _PEAK_TIME_CONSTANT_NS) for r in replicas]
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
    """The service time to assume for each replica, in ns.

    It is at least the best replica's. Its excess over the best decays while the replica is idle, so that the replica is
    tried again after a while. It is never below the value that the present run's duration implies.
    """
    known = [replica.service_ns for replica in replicas if replica.service_ns]
    best = min(known, default=1)
    assumed = []
    for replica in replicas:
        trust = 1.0 if replica.service_ns else 0.0
        if not replica.outstanding:  # a single request then finds out whether it is still slow
            trust *= 0.5 ** (replica.age_ns / _SLOWNESS_HALF_LIFE_NS)
        service = best + (max(best, replica.service_ns) - best) * trust
        if replica.running:
            service = max(service, replica.running_ns * UNIT_COST / replica.running)
        assumed.append(service)
    return assumed


def _completion_ns(replica: Replica, service_ns: float, cost: int) -> float:
    """Expected time until a replica has finished a request that is sent now."""
    work = service_ns * (replica.outstanding + cost) / UNIT_COST
    behind = min(replica.running_ns, service_ns * replica.running / UNIT_COST)
    return replica.transfer_ns + work - behind


class ServiceTime:
    """Statistics of the time that a node takes for a request of unit cost, in nanoseconds.

    The time of a request that costs more is divided by its cost.

    Attributes:
        service_ns: an EWMA, weighted by cost; 0 before the first request.
        peak_ns: a peak-EWMA: it rises at once to a longer time and decays slowly towards the mean.
        longest_ns: the longest time so far.
    """

    def __init__(self) -> None:
        self.service_ns = 0
        self.peak_ns = 0
        self.longest_ns = 0
        self._run = 0.0
        self._cost = 0.0
        self._at_ns = 0

    def ran(self, run_ns: int, cost: int, now_ns: int) -> None:
        """Record a run that has ended.

        Args:
            run_ns: its duration.
            cost: cost of its request.
            now_ns: the host's monotonic clock.
        """
        each = run_ns * UNIT_COST / cost
        passed = now_ns - self._at_ns if self._at_ns else 0
        self._at_ns = now_ns
        keep = math.exp(-passed / max(_EWMA_TIME_CONSTANT_NS, 4 * run_ns))
        self._run = self._run * keep + run_ns
        self._cost = self._cost * keep + cost
        self.service_ns = int(self._run * UNIT_COST / self._cost)
        self.longest_ns = int(max(each, self.longest_ns))
        self.peak_ns = int(max(each, self.service_ns, self.peak_ns * math.exp(-passed / _PEAK_TIME_CONSTANT_NS)))


def cost_of(size_bytes: int, ordinary_bytes: int) -> int:
    """The cost of a request, from the size of its inputs and that of the inputs which the plan was made for."""
    return max(1, min(size_bytes * UNIT_COST // max(1, ordinary_bytes), 1 << 40))
