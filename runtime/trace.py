"""Writes a run as a timeline in Chrome's trace event format, which https://ui.perfetto.dev opens. Pure.

The trace has a process for each node and one for the caller. Each node has these tracks:

    session     run | send | run | send ...      the work of the node's main thread
    requests    receive, wait                     one bar for each request: in transit, then queued
    queue                                         a counter of the queued requests

Arrows lead from the end of a request at one node to its start at the next. Times are microseconds of the host's
monotonic clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from runtime.topology import ReplicaKey
from runtime.wire.messages.data import Visit

TraceEvent = dict[str, Any]

_SESSION, _OPS = 1, 2  # numbers of tracks
_CALLER = 0  # number of the caller's process


class RequestTrace(Struct, frozen=True):
    """A request from admission to answer. Times are the host's monotonic clock in nanoseconds.

    Attributes:
        request: its number.
        entered_ns: when it was admitted.
        visits: the stages it has passed.
        answered_ns: when it was answered.
    """

    request: int
    entered_ns: int
    visits: tuple[Visit, ...]
    answered_ns: int


def chrome_trace(
    requests: Sequence[RequestTrace],
    readers: Mapping[int, Collection[int]],
    profiles: Mapping[ReplicaKey, Sequence[TraceEvent]],
) -> dict[str, Any]:
    """The trace of a run, as a JSON object.

    Args:
        requests: the recorded requests.
        readers: for each stage, the stages that read its outputs.
        profiles: events of ONNX Runtime's profile by node, which are added as a track of ops.
    """
    replicas = sorted({(visit.stage, visit.replica) for request in requests for visit in request.visits})
    process = {replica: number + 1 for number, replica in enumerate(replicas)}
    events = [_named(_CALLER, "caller", None)]
    for (stage, replica), number in process.items():
        events += [_named(number, f"stage {stage}, replica {replica}", None), _named(number, "session", _SESSION)]
    for request in requests:
        events += _caller(request)
        for visit in request.visits:
            events += _visit(request, visit, process)
        events += _arrows(request, process, readers)
    events += _counters(requests, process)
    for key, profile in profiles.items():
        if key in process:
            events += _ops(process[key], key, requests, profile)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(process: int, name: str, track: int | None) -> TraceEvent:
    kind = "process_name" if track is None else "thread_name"
    return {"ph": "M", "pid": process, "tid": track or 0, "name": kind, "args": {"name": name}}


def _slice(process: int, track: int, name: str, start_ns: int, end_ns: int, request: int) -> TraceEvent:
    return {
        "ph": "X", "pid": process, "tid": track, "name": name, "cat": name,
        "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3, "args": {"request": request},
    }  # fmt: skip


def _bar(process: int, name: str, start_ns: int, end_ns: int, request: int) -> Iterator[TraceEvent]:
    for phase, time_ns in (("b", start_ns), ("e", end_ns)):
        yield {
            "ph": phase, "pid": process, "tid": 0, "name": name, "cat": "requests", "id": request, "ts": time_ns / 1e3,
            "args": {"request": request},
        }  # fmt: skip


def _caller(request: RequestTrace) -> Iterator[TraceEvent]:
    yield from _bar(_CALLER, "request", request.entered_ns, request.answered_ns, request.request)


def _visit(request: RequestTrace, visit: Visit, process: Mapping[ReplicaKey, int]) -> Iterator[TraceEvent]:
    number, here = request.request, process[visit.stage, visit.replica]
    left = max([v.sent_ns for v in request.visits if v.sent_ns <= visit.arrived_ns], default=request.entered_ns)
    yield from _bar(here, "receive", left, visit.arrived_ns, number)
    yield from _bar(here, "wait", visit.arrived_ns, visit.started_ns, number)
    yield _slice(here, _SESSION, "run", visit.started_ns, visit.ended_ns, number)
    yield _slice(here, _SESSION, "send", visit.ended_ns, visit.sent_ns, number)


def _arrows(
    request: RequestTrace, process: Mapping[ReplicaKey, int], readers: Mapping[int, Collection[int]]
) -> Iterator[TraceEvent]:
    by_stage = {visit.stage: visit for visit in request.visits}
    for visit in request.visits:
        for stage in readers.get(visit.stage, ()):
            if stage not in by_stage:
                continue
            to = by_stage[stage]
            name = {"name": "fragment", "cat": "fragment", "id": f"{request.request}.{visit.stage}.{stage}"}
            begin = {
                "ph": "s",
                "pid": process[visit.stage, visit.replica],
                "ts": (visit.ended_ns + visit.sent_ns) / 2e3,
            }
            end = {"ph": "f", "bp": "e", "pid": process[to.stage, to.replica], "ts": to.started_ns / 1e3}
            yield {**name, **begin, "tid": _SESSION}
            yield {**name, **end, "tid": _SESSION}


def _counters(requests: Sequence[RequestTrace], process: Mapping[ReplicaKey, int]) -> Iterator[TraceEvent]:
    """Counters of the requests that are queued at each node, and of those in the pipeline."""
    steps: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for request in requests:
        steps[_CALLER] += [(request.entered_ns, 1), (request.answered_ns, -1)]
        for visit in request.visits:
            steps[process[visit.stage, visit.replica]] += [(visit.arrived_ns, 1), (visit.started_ns, -1)]
    for number, changes in sorted(steps.items()):
        count = 0
        for time_ns, change in sorted(changes):
            count += change
            name = "queue" if number else "in flight"
            yield {"ph": "C", "pid": number, "name": name, "ts": time_ns / 1e3, "args": {"requests": count}}


def _ops(
    process: int, key: ReplicaKey, requests: Sequence[RequestTrace], profile: Sequence[TraceEvent]
) -> Iterator[TraceEvent]:
    """The ops of ONNX Runtime's profile, shifted so that its first run begins with the first recorded run."""
    runs = [event["ts"] for event in profile if event.get("name") == "model_run"]
    starts = [v.started_ns for request in requests for v in request.visits if (v.stage, v.replica) == key]
    if not runs or not starts:
        return
    shift = min(starts) / 1e3 - min(runs)
    yield _named(process, "ops", _OPS)
    for event in profile:
        if event.get("ph") == "X" and event.get("cat") == "Node" and event["ts"] >= min(runs):
            yield {**event, "pid": process, "tid": _OPS, "ts": event["ts"] + shift}
