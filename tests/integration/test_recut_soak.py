"""A short form of benchmarks/recut/swaps.py: the plan changes again and again, and nodes of both plans are killed."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import running
from sleeping import Devices, SleepingLauncher
from waiting import wait_until

from benchmarks.recut.ledger import Killer, Ledger, echo_plans, start
from onnxsplit import Pipeline, RecutFailed
from onnxsplit.plan_files import load_plan
from runtime.timings import Timings

TESTS = Path(__file__).parents[1]
REQUESTS, CHANGES = 1000, 3
MOST_GROWTH_BYTES = 64 << 20
TIMINGS = Timings(circuit_failures=1_000_000, backoff_most_s=1)


@pytest.fixture
def slow_stages(tmp_path, monkeypatch):
    """Makes launchers whose nodes sleep 2 ms for each op."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS / "support", TESTS.parent))))  # for `sleeping`
    (tmp_path / "speeds").mkdir()
    devices = Devices(tmp_path / "speeds", ["0", "1", "2"])
    return lambda plan: SleepingLauncher(load_plan(plan), devices, op_s=0.002)


def nodes(pipeline: Pipeline) -> set[int]:
    """The processes of all plans."""
    return {node.pid for plan in pipeline.entrance.plans for node in plan.coordinator.nodes() if node.pid}


def test_no_request_is_lost_wrong_or_answered_twice(tmp_path, slow_stages):
    plans = echo_plans(tmp_path, (4, 8), (2, 7))
    ledger, seen, folders = Ledger(), set[int](), set[Path]()
    caller = psutil.Process()
    launcher = slow_stages(plans[0])
    with Pipeline.launch(plans[0], launcher=launcher, attempts=20, micro_batch=2, timings=TIMINGS) as pipeline:
        pipeline.run({"t0": [[0.0] * 16]})
        before = caller.memory_full_info().uss
        with Killer(pipeline, 1.5, 0, ledger, answers=25) as killer:
            threads = start(pipeline, ledger, thread=3, event_loop=1)
            try:
                wanted = 1
                for _ in range(CHANGES):
                    change = pipeline.recut(plans[wanted])
                    while not change.done():
                        seen |= nodes(pipeline)
                        folders |= {plan.launcher.folder for plan in pipeline.entrance.plans}
                        time.sleep(0.02)
                    with suppress(RecutFailed):  # a new node was killed before all were ready
                        change.result()
                        wanted = 1 - wanted
                wait_until(lambda: ledger.counts["answered"] >= REQUESTS, "the last answers")
            finally:
                ledger.end()
                for thread in threads:
                    thread.join()
        assert pipeline.recut(plans[wanted]).result(120).kept
        assert sum(pipeline.recuts.results.values()) == CHANGES + 1
        assert killer.kills.total() > CHANGES
        assert len(killer.kills) > 1  # generations
        assert caller.memory_full_info().uss - before < MOST_GROWTH_BYTES
        assert pipeline.admission.inside == pipeline.lent_bytes == 0
        seen |= nodes(pipeline)
    counts = ledger.counts
    assert counts["answered"] == counts["sent"] >= REQUESTS
    assert counts["errors"] == {}
    assert counts["wrong"] == counts["twice"] == 0
    assert running(seen) == []
    assert [folder for folder in folders if folder.exists()] == []
