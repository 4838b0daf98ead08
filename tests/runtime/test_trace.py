"""A trace holds every request, with arrows and counters."""

from __future__ import annotations

from runtime.trace import RequestTrace, chrome_trace
from runtime.wire.messages.data import Visit

REQUEST = RequestTrace(
    request=4,
    entered_ns=1_000,
    visits=(Visit(0, 0, 2_000, 3_000, 5_000, 6_000, 10, 0), Visit(1, 0, 7_000, 8_000, 9_000, 9_500, 10, 0)),
    answered_ns=11_000,
)
READERS = {0: [1], 1: []}


def events(**wanted):
    trace = chrome_trace([REQUEST], READERS, {})["traceEvents"]
    return [event for event in trace if all(event.get(key) == value for key, value in wanted.items())]


def test_runs_and_sends_lie_on_the_node_s_own_track():
    assert [(e["pid"], e["ts"], e["dur"]) for e in events(ph="X", name="run")] == [(1, 3.0, 2.0), (2, 8.0, 1.0)]
    assert [(e["pid"], e["ts"], e["dur"]) for e in events(ph="X", name="send")] == [(1, 5.0, 1.0), (2, 9.0, 0.5)]


def test_receiving_begins_where_the_request_was_sent_and_waiting_where_it_arrived():
    assert [e["ts"] for e in events(name="receive", ph="b")] == [1.0, 6.0]
    assert [e["ts"] for e in events(name="wait", ph="b")] == [2.0, 7.0]
    assert [e["ts"] for e in events(name="wait", ph="e")] == [3.0, 8.0]


def test_an_arrow_leads_from_a_send_to_the_next_run():
    (start,), (end,) = events(ph="s"), events(ph="f")
    assert start["id"] == end["id"]
    assert 5.0 <= start["ts"] <= 6.0
    assert (start["pid"], end["pid"], end["ts"]) == (1, 2, 8.0)


def test_counters_return_to_nothing():
    assert [e["args"]["requests"] for e in events(ph="C", pid=1)] == [1, 0]
    assert [e["args"]["requests"] for e in events(ph="C", pid=0)] == [1, 0]


def test_a_profile_is_moved_to_where_its_first_run_began():
    profile = [
        {"ph": "X", "cat": "Session", "name": "model_run", "ts": 100.0, "dur": 2.0},
        {"ph": "X", "cat": "Node", "name": "conv_kernel_time", "ts": 100.5, "dur": 1.0},
        {"ph": "X", "cat": "Node", "name": "before_kernel_time", "ts": 50.0, "dur": 1.0},
    ]
    trace = chrome_trace([REQUEST], READERS, {(0, 0): profile})["traceEvents"]
    (op,) = [event for event in trace if event.get("cat") == "Node"]
    assert (op["name"], op["pid"], op["ts"]) == ("conv_kernel_time", 1, 3.5)
