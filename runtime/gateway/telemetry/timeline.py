"""Where the time of a request went: periods that follow each other and add up to the whole. Pure.

    arrived   decoded   refused    entered                                                left     ended
       |  read   |  queue  | admission |  send  |  wait 0.0 |  run 0.0 | ... |    send      |  answer |

A node reads its messages between runs, so a request may lie there unread. While the node ran other requests, a request
on its way to it counts as waiting for it.

Stages can run at the same time. Periods follow the stages that kept the request from ending sooner: from its end back,
always to the stage whose outputs came last. The other stages stand beside them and are not part of the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum

from msgspec import Struct

from runtime.gateway.telemetry.slowest import SlowRequest
from runtime.wire.messages.data import Visit


class Kind(Enum):
    """What happens in a period."""

    READ = "read"
    QUEUE = "queue"
    ADMISSION = "admission"
    SEND = "send"
    WAIT = "wait"
    RUN = "run"
    ANSWER = "answer"
    FAILED = "failed"


class Period(Struct, frozen=True):
    """A part of a request's time.

    Attributes:
        kind: What happened.
        node: The node of a wait or a run, as in ``1.0``; else empty.
        start_ns: When it began, from the arrival of the request.
        ns: How long it lasted.
    """

    kind: Kind
    node: str
    start_ns: int
    ns: int


class Timeline(Struct, frozen=True):
    """Where the time of a request went.

    Attributes:
        at_ms: When the request arrived, in milliseconds since the epoch.
        ended_ns: When it ended, by the host's monotonic clock.
        total_ns: Time from its arrival to its response.
        reason: Why it failed; empty when it was answered.
        message: What its caller was told when it failed.
        summary: What took the most time, as a sentence.
        periods: The periods. They follow each other and add up to the total.
        beside: Waits and runs of stages that went on beside these periods.
        placed: Whether the times of waits and runs are known. The clocks of other hosts differ from this host's, so
            their periods are placed in the order of the stages, at equal distances.
    """

    at_ms: int
    ended_ns: int
    total_ns: int
    reason: str
    message: str
    summary: str
    periods: tuple[Period, ...]
    beside: tuple[Period, ...]
    placed: bool


def timeline(request: SlowRequest, epoch_ns: int, edges: Collection[tuple[int, int]]) -> Timeline:
    """Where the time of a request went.

    Args:
        request: The request.
        epoch_ns: Time since the epoch at which the host's monotonic clock was 0.
        edges: The pairs of stages of which the second reads outputs of the first.
    """
    placed = all(_is_between(request.entered_ns, visit, request.left_ns) for visit in request.visits)
    if request.reason:
        periods, beside = [Period(Kind.FAILED, "", 0, request.total_ns)], []
    else:
        visits = list(request.visits) if placed else _in_order(request)
        path = _path(visits, request.left_ns, edges) if placed else visits
        beside = [period for visit in visits if visit not in path for period in _stage(visit, request)]
        periods = _periods(request, path)
    return Timeline(
        at_ms=(epoch_ns + request.arrived_ns) // 1_000_000,
        ended_ns=request.ended_ns,
        total_ns=request.total_ns,
        reason=request.reason,
        message=request.message,
        summary=_failure(request) if request.reason else _summary(periods, request.total_ns),
        periods=tuple(period for period in periods if period.ns),
        beside=tuple(period for period in beside if period.ns),
        placed=placed,
    )


def _is_between(from_ns: int, visit: Visit, to_ns: int) -> bool:
    return from_ns <= visit.arrived_ns <= visit.started_ns <= visit.ended_ns <= visit.sent_ns <= to_ns


def _path(visits: Sequence[Visit], left_ns: int, edges: Collection[tuple[int, int]]) -> list[Visit]:
    """The visits that the end waited for, first to last."""
    path: list[Visit] = []
    before, until = list(visits), left_ns
    while before := [visit for visit in before if visit.sent_ns <= until]:
        path.append(max(before, key=lambda visit: (visit.sent_ns, visit.stage)))
        until = path[-1].arrived_ns
        before = [visit for visit in visits if (visit.stage, path[-1].stage) in edges]
    return path[::-1]


def _in_order(request: SlowRequest) -> list[Visit]:
    """Visits with times of other clocks, one after another in the time in the pipeline, at equal distances.

    Visits that do not fit there ran beside others, and are left out.
    """
    left = request.left_ns - request.entered_ns
    chosen = []
    for visit in sorted(request.visits, key=lambda visit: visit.stage):
        took = visit.ended_ns - visit.arrived_ns
        if 0 <= took <= left and visit.arrived_ns <= visit.started_ns <= visit.ended_ns:
            chosen.append(visit)
            left -= took
    gap = left // (len(chosen) + 1)
    now = request.entered_ns
    moved = []
    for visit in chosen:
        now += gap
        started, ended = now + visit.started_ns - visit.arrived_ns, now + visit.ended_ns - visit.arrived_ns
        moved.append(Visit(visit.stage, visit.replica, now, started, ended, ended, 0, 0))
        now = ended
    return moved


def _periods(request: SlowRequest, path: Sequence[Visit]) -> list[Period]:
    """The periods from the arrival to the end."""
    begun = request.arrived_ns
    refused = min(max(request.refused_ns or request.entered_ns, request.decoded_ns), request.entered_ns)
    ends: list[tuple[Kind, str, int]] = [
        (Kind.READ, "", request.decoded_ns),
        (Kind.QUEUE, "", refused),
        (Kind.ADMISSION, "", request.entered_ns),
    ]
    sent_ns = request.entered_ns
    for visit in path:
        node = _node(visit)
        ends += [
            (Kind.SEND, "", visit.arrived_ns - _unread_ns(request, visit, sent_ns)),
            (Kind.WAIT, node, visit.started_ns),
            (Kind.RUN, node, visit.ended_ns),
        ]
        sent_ns = visit.ended_ns
    ends += [(Kind.SEND, "", request.left_ns), (Kind.ANSWER, "", request.ended_ns)]
    periods = []
    for kind, node, end in ends:
        periods.append(Period(kind, node, begun - request.arrived_ns, end - begun))
        begun = end
    return periods


def _unread_ns(request: SlowRequest, visit: Visit, sent_ns: int) -> int:
    """Time between the sending of a message to a node and its arrival in which the node ran other requests."""
    runs = sorted(
        (other.started_ns, other.ended_ns)
        for block in request.others
        for visits in block
        if visits is not request.visits
        for other in visits
        if (other.stage, other.replica) == (visit.stage, visit.replica)
    )
    total, until = 0, sent_ns
    for started, ended in runs:
        begin, end = max(started, until), min(ended, visit.arrived_ns)
        total += max(0, end - begin)
        until = max(until, end)
    return total


def _stage(visit: Visit, request: SlowRequest) -> list[Period]:
    times = ((Kind.WAIT, visit.arrived_ns, visit.started_ns), (Kind.RUN, visit.started_ns, visit.ended_ns))
    return [Period(kind, _node(visit), start - request.arrived_ns, end - start) for kind, start, end in times]


def _node(visit: Visit) -> str:
    return f"{visit.stage}.{visit.replica}"


_WORDS = {
    Kind.READ: "its inputs were read",
    Kind.QUEUE: "it waited in the gateway's queue",
    Kind.ADMISSION: "it waited until the pipeline had room",
    Kind.SEND: "it was on its way between processes",
    Kind.WAIT: "it waited for stage {}",
    Kind.RUN: "it ran in stage {}",
    Kind.ANSWER: "its response was written",
}


def _summary(periods: Sequence[Period], total_ns: int) -> str:
    """What took the most time."""
    sums: dict[tuple[Kind, str], int] = {}
    for period in periods:
        what = period.kind, period.node.partition(".")[0]
        sums[what] = sums.get(what, 0) + period.ns
    (kind, stage), most = max(sums.items(), key=lambda item: item[1])
    head = "Most of the time" if 2 * most > total_ns else "For the largest part of the time"
    return f"{head} {_WORDS[kind].format(stage)} ({_digits(most, total_ns)} of {_digits(total_ns, total_ns)} ms)."


def _failure(request: SlowRequest) -> str:
    return f"It failed after {_digits(request.total_ns, request.total_ns)} ms: {request.message}"


def _digits(ns: int, total_ns: int) -> str:
    """A time in milliseconds, with as many decimals as a total needs for two digits."""
    decimals = 0 if total_ns >= 10_000_000 else 1 if total_ns >= 1_000_000 else 3
    return f"{ns / 1e6:.{decimals}f}"
