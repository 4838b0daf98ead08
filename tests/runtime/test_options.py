"""How a plan is to be run: what follows from the plan, and what may be said."""

from __future__ import annotations

import msgspec.structs
import pytest

from onnxsplit.errors import InputError
from onnxsplit.plan import load_plan
from runtime.options import enough_inflight
from runtime.watch import Timings, timings


def test_long_links_keep_more_requests_in_flight(chain_plan):
    plan = load_plan(chain_plan)

    def inflight(latency_ms: float, bottleneck_ms: float, replicas=(1, 1)) -> int:
        predicted = msgspec.structs.replace(
            plan.prediction, latency_ns=int(latency_ms * 1e6), bottleneck_ns=int(bottleneck_ms * 1e6)
        )
        return enough_inflight(msgspec.structs.replace(plan, prediction=predicted), replicas)

    assert inflight(20, 10) == 4, "two a node"
    assert inflight(20, 10, (2, 3)) == 10
    assert inflight(200, 10) == 30, "half as many again as the 20 that are under way"
    assert inflight(1e6, 0.001) == 1024, "but never without end"


def test_timings_are_changed_by_name_and_wrong_ones_named():
    assert timings({}) == Timings()
    assert timings({"silence_s": 2.5, "circuit_failures": 3.0}) == Timings(silence_s=2.5, circuit_failures=3)
    with pytest.raises(InputError, match=r"no timing 'silence'; there are: .*silence_s"):
        timings({"silence": 1.0})
    with pytest.raises(InputError, match="silence_s must be a number above 0, not -1"):
        timings({"silence_s": -1.0})
