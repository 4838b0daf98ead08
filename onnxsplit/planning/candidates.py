"""Ways to run a model, what they give by a small model of queues, and the choice among them. Pure.

A way to run a model is a row of stations: the stages, each with its replicas. A run takes the same time for each
request, so requests wait only before the slowest station, whatever the order of the stations is (Friedman, 1965). With
requests that arrive at random, a share C of them waits there (Erlang's C), and those wait S / (c - a) / 2 on average:
half of what they would with random run times (Allen and Cunneen). S is the time of a run, c the number of replicas, and
a the rate times S. The tail is taken to be exponential::

    p99 = time alone + S / (c - a) / 2 * ln(C / 0.01)

The cores of the host are a station, too: S is never shorter than c times what one request costs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import msgspec

from onnxsplit.plan import HostCosts, Replicas
from onnxsplit.plan_base import Count, PlanStruct, Rate, Threads

DEFAULT_SHARE = 0.7
"""The share of its own limit at which a candidate's latency is taken if no rate is asked for."""

ALIKE = 0.05
"""Candidates that differ by less than this share are taken as equally good."""

_LATE = 0.01  # the share of requests that may take longer than the p99
_KINDS = ("session", "replicas", "stages", "hybrid")  # simplest first
_STEPS = 40  # of a bisection


class Wishes(PlanStruct, frozen=True, kw_only=True):
    """What a way to run a model is to give.

    Attributes:
        rate_per_s: the rate of requests to serve; None for as many as possible.
        p99_ns: the time in which 99 of 100 requests are to be answered; None for any.
        max_memory_bytes: the memory that no device may exceed; None for no limit.
    """

    rate_per_s: float | None = None
    p99_ns: Count | None = None
    max_memory_bytes: Count | None = None


class Candidate(PlanStruct, frozen=True, kw_only=True):
    """A way to run a model.

    Attributes:
        kind: ``session``: one ONNX Runtime session in the caller's process; ``replicas``: nodes with the whole model
            each; ``stages``: one node for each stage; ``hybrid``: stages with several nodes.
        replicas: the number of nodes of each stage.
        threads: threads of each session.
        max_batch: the most requests that are joined into one run.
        provider: the execution provider of all sessions.
        devices: names of the devices of a cluster, one for each node; empty on this host.
    """

    kind: Literal["session", "replicas", "stages", "hybrid"]
    replicas: Annotated[tuple[Replicas, ...], msgspec.Meta(min_length=1)]
    threads: Threads
    max_batch: Annotated[int, msgspec.Meta(ge=1)] = 1
    provider: str = "cpu"
    devices: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """The number of sessions."""
        return sum(self.replicas)

    @property
    def name(self) -> str:
        """The candidate in a few words; the number after ``x`` is that of the threads of each session."""
        stages, nodes = len(self.replicas), self.nodes
        what = {
            "session": "session",
            "replicas": "1 node" if nodes == 1 else f"{nodes} replicas",
            "stages": f"{stages} stages",
            "hybrid": f"{stages} stages {'+'.join(map(str, self.replicas))}",
        }[self.kind]
        parts = [f"{what} x {self.threads}", *([f"batch {self.max_batch}"] if self.max_batch > 1 else [])]
        parts += [self.provider] if self.provider != "cpu" else []
        parts += ["+".join(self.devices)] if self.devices else []
        return ", ".join(parts)


class Figures(PlanStruct, frozen=True, kw_only=True):
    """How fast a candidate is.

    Attributes:
        limit_per_s: requests per second with as many under way as it takes.
        rate_per_s: the rate of the next two figures: the one that was asked for; else the highest that keeps the p99
            that was asked for (0 if none does); else a share of the limit.
        p50_ns: time in which half of the requests are answered at that rate.
        p99_ns: time in which 99 of 100 are; None where the rate is above the limit.
    """

    limit_per_s: Rate
    rate_per_s: Rate
    p50_ns: Count | None
    p99_ns: Count | None


class Choice(PlanStruct, frozen=True, kw_only=True):
    """A candidate with what is known of it.

    Attributes:
        candidate: the way to run the model.
        memory_bytes: estimated memory of the device that needs most.
        total_bytes: estimated memory of all sessions.
        predicted: its figures by the model of queues; None where it was left out before.
        measured: its figures by runs under load; None where it was not run.
        node_bytes: measured memory of all node processes; None where it was not run, or has no nodes.
        left_out: why it cannot be chosen; empty where it can.
        not_run: why it was not run although it can be chosen; empty where it was run.
    """

    candidate: Candidate
    memory_bytes: Count
    total_bytes: Count
    predicted: Figures | None = None
    measured: Figures | None = None
    node_bytes: Count | None = None
    left_out: str = ""
    not_run: str = ""

    @property
    def figures(self) -> Figures | None:
        """The measured figures, else the predicted ones."""
        return self.measured or self.predicted


class RequestCost(PlanStruct, frozen=True, kw_only=True):
    """What one request costs a candidate.

    Attributes:
        runs_ns: time of a run of each stage with its transfers, in nanoseconds; of a batch if requests are joined.
        host: what requests cost beside the runs.
        cores: cores of the host that the nodes and the caller share; 0 where they share none.
    """

    runs_ns: tuple[Count, ...]
    host: HostCosts
    cores: Count


def bottleneck_of(candidate: Candidate, work: RequestCost) -> tuple[int, int]:
    """The time between two requests of a candidate at its limit, and of a request alone, in nanoseconds."""
    if candidate.kind == "session":
        return max(1, work.runs_ns[0] // candidate.max_batch), work.runs_ns[0]
    node_ns = [run_ns + work.host.node_ns for run_ns in work.runs_ns]
    rows, caller_ns = candidate.max_batch, work.host.caller_ns
    slowest_ns = max(time_ns / count / rows for time_ns, count in zip(node_ns, candidate.replicas, strict=True))
    busy_ns = sum(node_ns) * candidate.threads / rows + caller_ns
    shared_ns = busy_ns / work.cores if work.cores else 0.0
    alone_ns = sum(node_ns) + (len(node_ns) + 1) * work.host.hop_ns + caller_ns
    return max(1, round(max(slowest_ns, caller_ns, shared_ns))), alone_ns


def predict(bottleneck_ns: int, alone_ns: int, replicas: int, wishes: Wishes) -> Figures:
    """The figures of a way to run a model.

    Args:
        bottleneck_ns: the time between two requests at its limit.
        alone_ns: the time of a request alone.
        replicas: the number of replicas of the slowest stage.
        wishes: the rate or the p99 that is asked for.
    """
    limit = 1e9 / bottleneck_ns

    def times(per_s: float) -> tuple[int | None, int | None]:
        found = [alone_ns + waiting_ns(share, bottleneck_ns, replicas, per_s) for share in (0.5, _LATE)]
        half, most = (None if math.isinf(time_ns) else round(time_ns) for time_ns in found)
        return half, most

    if wishes.rate_per_s is not None:
        rate = wishes.rate_per_s
    elif wishes.p99_ns is not None:
        rate = _highest_rate(limit, lambda per_s: (times(per_s)[1] or math.inf) <= (wishes.p99_ns or 0))
    else:
        rate = DEFAULT_SHARE * limit
    p50_ns, p99_ns = times(rate)
    return Figures(limit_per_s=limit, rate_per_s=rate, p50_ns=p50_ns, p99_ns=p99_ns)


def waiting_ns(share: float, bottleneck_ns: int, replicas: int, per_s: float) -> float:
    """The time that only a share of the requests wait longer than; infinite at the limit and above it.

    Args:
        share: the share of the requests, above 0.
        bottleneck_ns: the time between two requests at the limit.
        replicas: the number of servers that share the limit.
        per_s: the rate at which requests arrive, at random.
    """
    load = per_s * bottleneck_ns * replicas / 1e9
    if load >= replicas:
        return math.inf
    waits = _waiting_share(replicas, load)
    if waits <= share:
        return 0.0
    return bottleneck_ns * replicas / (replicas - load) / 2 * math.log(waits / share)


def _waiting_share(servers: int, load: float) -> float:
    """Erlang's C: the share of requests that find all servers busy."""
    blocked = 1.0  # Erlang's B, by its recursion
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def _highest_rate(limit: float, keeps: Callable[[float], bool]) -> float:
    """The highest rate that keeps a condition, by bisection; 0 if none does."""
    if not keeps(0.0):
        return 0.0
    low, high = 0.0, limit
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def some_counts(most: int) -> tuple[int, ...]:
    """Numbers from 1 to ``most``: each up to four, then ever larger steps, and ``most`` itself."""
    found = {count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if count < most}
    return (*sorted(found), most)


def some_threads(nodes: int, cores: int) -> tuple[int, ...]:
    """Numbers of threads to try for each of several sessions: 1, doubled, up to an equal share of the cores."""
    share = max(1, cores // nodes)
    return tuple(sorted({*(1 << bits for bits in range(share.bit_length()) if 1 << bits <= share), share}))


def to_run(choices: Sequence[Choice], wishes: Wishes, most: int) -> list[Choice]:
    """The candidates that are worth a run: the best of each kind, then the best of all, by their predictions.

    Args:
        choices: the candidates. Those that are left out or cannot run here are ignored.
        wishes: what is asked for.
        most: the most candidates to return.
    """
    ranked = sorted(
        _best_known(one for one in choices if not one.not_run), key=lambda one: _rank(one, wishes), reverse=True
    )
    chosen = [next((one for one in ranked if one.candidate.kind == kind), None) for kind in _KINDS]
    first = sorted(filter(None, chosen), key=lambda one: _rank(one, wishes), reverse=True)
    return [*first, *(one for one in ranked if one not in first)][:most]


def keeps_wishes(choice: Choice, wishes: Wishes) -> bool:
    """Whether a candidate gives what is asked for, by the best that is known of it."""
    figures = choice.figures
    if choice.left_out or figures is None:
        return False
    if wishes.rate_per_s is None and wishes.p99_ns is None:  # only the limit counts
        return figures.limit_per_s > 0
    if figures.p99_ns is None:
        return False
    if wishes.rate_per_s is not None and figures.limit_per_s < wishes.rate_per_s:
        return False
    return figures.rate_per_s > 0 and (wishes.p99_ns is None or figures.p99_ns <= wishes.p99_ns)


def pick(choices: Sequence[Choice], wishes: Wishes) -> Choice | None:
    """The candidate to choose: the best that keeps the wishes, else the nearest; None if all are left out.

    Of candidates that are about as good, the simplest is chosen: fewer processes, then less memory. Candidates that
    were run go before those that were not.
    """
    pool = _best_known(choices)
    pool = [one for one in pool if keeps_wishes(one, wishes)] or pool
    if not pool:
        return None
    best = max(pool, key=lambda one: _rank(one, wishes))
    alike = [one for one in pool if _goodness(one, wishes) >= (1 - ALIKE) * _goodness(best, wishes)]
    return min(alike, key=_effort) if keeps_wishes(best, wishes) else best


def front(choices: Sequence[Choice], wishes: Wishes) -> list[Choice]:
    """The candidates that no other one beats in both rate and p99, those of the lowest rate first.

    Candidates that were run are not compared with those that were not, whose predictions may be too good.
    """
    points = [(rate_of(one, wishes), one.figures.p99_ns, one) for one in _best_known(choices) if one.figures]
    known = [(rate, p99_ns, one) for rate, p99_ns, one in points if p99_ns is not None and rate > 0]
    best: list[Choice] = []
    least_ns = math.inf
    for _, p99_ns, one in sorted(known, key=lambda point: (-point[0], point[1])):
        if p99_ns < least_ns:
            best.append(one)
            least_ns = p99_ns
    return best[::-1]


def rate_of(choice: Choice, wishes: Wishes) -> float:
    """The rate by which candidates are compared: their limit where a rate is asked for, else that of their p99."""
    figures = choice.figures
    if figures is None:
        return 0.0
    return figures.rate_per_s if wishes.p99_ns is not None and wishes.rate_per_s is None else figures.limit_per_s


def _best_known(choices: Iterable[Choice]) -> list[Choice]:
    """The candidates that were run; if none was, all that can be chosen."""
    able = [one for one in choices if not one.left_out and one.figures is not None]
    return [one for one in able if one.measured is not None] or able


def _rank(choice: Choice, wishes: Wishes) -> tuple[bool, float]:
    return keeps_wishes(choice, wishes), _goodness(choice, wishes)


def _goodness(choice: Choice, wishes: Wishes) -> float:
    """How good a candidate is; larger is better: a short p99 at the rate asked for, else a high rate."""
    figures = choice.figures
    assert figures is not None
    if wishes.rate_per_s is not None and figures.p99_ns is not None:
        return 1e9 / max(1, figures.p99_ns)
    if wishes.p99_ns is not None and wishes.rate_per_s is None:
        return figures.rate_per_s
    # Below the rate that is asked for, the limit counts, at a scale below that of any p99.
    return figures.limit_per_s * (1e-9 if wishes.rate_per_s is not None else 1.0)


def _effort(choice: Choice) -> tuple[int, int, int]:
    """How much a candidate takes to run; smaller is simpler."""
    return choice.candidate.nodes, _KINDS.index(choice.candidate.kind), choice.total_bytes
