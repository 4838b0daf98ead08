"""A short form of benchmarks/faults/chaos.py: odd requests and harm to nodes leave a pipeline as it was."""

from __future__ import annotations

import pytest

from benchmarks.faults.odd import nets, requests
from benchmarks.faults.odd.ledger import Ledger, stray_errors
from benchmarks.faults.odd.leg import Leg, run_leg


@pytest.mark.parametrize(
    ("name", "attempts", "rounds"),
    [("chain", 3, ("kills",)), ("dag", 1, ("scales",)), ("strings", 1, ("kills",)), ("longest", 3, ("none",))],
)
def test_odd_requests_are_answered_rightly_or_refused_and_leave_the_pipeline_as_it_was(
    tmp_path, name, attempts, rounds
):
    leg = Leg(
        net=nets.build(tmp_path, [name])[0],
        requests=150,
        rounds=rounds,
        attempts=attempts,
        shared_memory=attempts == 3,
        seed=1,
        kinds=tuple(requests.KINDS),
        replicas=2 if "kills" in rounds else 1,
    )
    ledger = Ledger()
    with stray_errors(ledger):
        found = run_leg(leg, ledger)
    assert dict(ledger.faults) == {}
    assert not found["broke"]
    assert ledger.total("right") > 40
    assert ledger.total("refused") > 10
