"""Real processes are killed, stopped, blocked and cut off: every request is answered once, and correctly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import build
import numpy as np
import psutil
import pytest
from faulty_node import STEPS, FaultyLauncher
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.coordinator.requests import RequestTable
from runtime.errors import Busy, NodeFailed, PipelineClosed, StageUnavailable
from runtime.timings import Timings

WIDTH = 128
QUICK = Timings(beat_s=0.2, silence_s=3.0, stall_s=3.0, stall_factor=5)


def given(seed: int = 0):
    return {"x": np.random.default_rng(seed).standard_normal((64, WIDTH)).astype(np.float32)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A chain in three stages with 32 KiB between them."""
    folder = tmp_path_factory.mktemp("faults")
    partition(build.save(build.chain(12, WIDTH), folder), stages=3, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def wanted(plan):
    loaded = load_plan(plan)
    return [run_stages(plan, loaded, given(seed), threads=1)["y"] for seed in range(8)]


def ask(pipeline, wanted, count: int, timeout: float = 60.0) -> None:
    """Send this many requests, and compare the answers."""
    futures = [pipeline.submit(given(number % 8)) for number in range(count)]
    for number, future in enumerate(futures):
        assert np.array_equal(future.result(timeout)["y"], wanted[number % 8]), number


def whole(pipeline) -> bool:
    return all(node.state == "ready" for node in pipeline.nodes)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_node_of_each_stage_killed_at_each_step_of_a_request_loses_nothing(plan, wanted, replicas):
    steps = [(stage, step) for step in STEPS for stage in range(3)]
    faults = [{"what": "kill", "at": step, "stage": stage} for stage, step in steps]
    for number, fault in enumerate(faults, 1):
        if fault["at"] != "writing an entry":  # the first entry at all: a given request may go as a message
            fault["request"] = 10 * number
    launcher = FaultyLauncher(*faults)
    with Pipeline.launch(plan, launcher=launcher, replicas=replicas, inflight=8) as pipeline:
        ask(pipeline, wanted, 10 * len(steps) + 40)
        assert launcher.happened == len(steps)
        wait_until(lambda: whole(pipeline))
        assert sum(stats.restarts for stats in pipeline.stats()) == len(steps)
        assert pipeline.lent_bytes == 0
        assert all("was killed by SIGKILL" in incident.story for incident in pipeline.incidents)


@pytest.mark.parametrize(
    ("what", "story"),
    [
        ("stop", "has been silent for"),
        ("freeze", "has been silent for"),
        ("hang", "is stuck: a request has been running for"),
        ("segfault", "was killed by SIGSEGV"),
    ],
)
def test_a_node_that_lives_and_does_nothing_is_found_and_replaced(plan, wanted, what, story):
    launcher = FaultyLauncher({"what": what, "stage": 1, "request": 20})
    with Pipeline.launch(plan, launcher=launcher, replicas=2, timings=QUICK) as pipeline:
        ask(pipeline, wanted, 60)
        wait_until(lambda: len(pipeline.incidents) == 1 and whole(pipeline))
        assert story in pipeline.incidents[0].story
        assert pipeline.stats()[2].restarts + pipeline.stats()[3].restarts == 1


def test_a_stopped_node_that_continues_before_its_limit_goes_on(plan, wanted):
    with Pipeline.launch(plan) as pipeline:
        futures = [pipeline.submit(given(number)) for number in range(4)]
        os.kill(pipeline.nodes[1].pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pipeline.nodes[1].pid, signal.SIGCONT)
        assert all(np.array_equal(f.result(60)["y"], wanted[n]) for n, f in enumerate(futures))
        assert (pipeline.incidents, pipeline.retries) == ((), 0)


def test_a_request_that_kills_every_node_is_given_up_and_the_others_go_on(plan, wanted):
    launcher = FaultyLauncher({"what": "poison", "only_once": False})
    with Pipeline.launch(plan, launcher=launcher, replicas=2) as pipeline:
        before = [pipeline.submit(given(number % 8)) for number in range(8)]
        bad = pipeline.submit({"x": np.full((64, WIDTH), 1e30, np.float32)})
        after = [pipeline.submit(given(number % 8)) for number in range(40)]
        with pytest.raises(NodeFailed, match=r"given up after it ran on 3 nodes.*stage 0 .*SIGSEGV"):
            bad.result(60)
        for number, future in enumerate(before + after):
            assert np.array_equal(future.result(60)["y"], wanted[(number if number < 8 else number - 8) % 8])
        assert len(pipeline.incidents) == 3


def test_two_nodes_killed_at_once_and_again_lose_nothing(plan, wanted):
    with Pipeline.launch(plan, replicas={1: 2}) as pipeline:
        for round_ in range(3):
            futures = [pipeline.submit(given(number)) for number in range(6)]
            for node in (pipeline.nodes[round_], pipeline.nodes[3]):
                os.kill(node.pid, signal.SIGKILL)
            assert all(np.array_equal(f.result(60)["y"], wanted[n]) for n, f in enumerate(futures))
            wait_until(lambda: whole(pipeline))
        ask(pipeline, wanted, 20)


def test_all_nodes_killed_at_once_lose_nothing(plan, wanted):
    with Pipeline.launch(plan) as pipeline:
        futures = [pipeline.submit(given(number)) for number in range(6)]
        for node in pipeline.nodes:
            os.kill(node.pid, signal.SIGKILL)
        assert all(np.array_equal(f.result(60)["y"], wanted[n]) for n, f in enumerate(futures))


def test_a_stage_that_keeps_failing_opens_its_circuit_with_the_reason_and_closes_it_again(plan, wanted):
    timings = Timings(backoff_s=0.05, circuit_failures=3, circuit_s=5.0, settled_s=60)
    launcher = FaultyLauncher(*({"what": "kill", "stage": 1, "at": "received"} for _ in range(3)))
    with Pipeline.launch(plan, launcher=launcher, timings=timings) as pipeline:
        with pytest.raises(StageUnavailable, match=r"stage 1 has no node: .*3 times in a row .*SIGKILL"):
            pipeline.run(given(), timeout=60)
        with pytest.raises(StageUnavailable):
            pipeline.run(given(), timeout=60)
        assert pipeline.nodes[1].state == "circuit open"
        wait_until(lambda: whole(pipeline))
        ask(pipeline, wanted, 8)


def test_with_one_attempt_a_loss_is_an_error_that_names_the_stage(plan, wanted):
    launcher = FaultyLauncher({"what": "kill", "stage": 1, "request": 5})
    with Pipeline.launch(plan, launcher=launcher, attempts=1) as pipeline:
        futures = [pipeline.submit(given(number % 8)) for number in range(12)]
        errors = [future.exception(60) for future in futures]
        assert isinstance(errors[5], NodeFailed)
        assert "stage 1 (node 1.0, pid" in str(errors[5])
        wait_until(lambda: whole(pipeline))
        ask(pipeline, wanted, 8)


def test_replicas_come_and_go_while_requests_go_on(plan, wanted):
    with Pipeline.launch(plan) as pipeline:
        futures = []
        for replicas in (3, 1, 2, 1):
            pipeline.scale(1, replicas)
            futures += [pipeline.submit(given(number % 8)) for number in range(40)]
            wait_until(lambda replicas=replicas: len(pipeline.nodes) == 2 + replicas and whole(pipeline))
        assert all(np.array_equal(f.result(60)["y"], wanted[n % 40 % 8]) for n, f in enumerate(futures))
        wait_until(lambda: len(psutil.Process().children()) == 3)
        assert (pipeline.incidents, pipeline.retries) == ((), 0)
        with pytest.raises(InputError, match="needs from 1 to 255 replicas"):
            pipeline.scale(1, 0)
        with pytest.raises(InputError, match="stage 7 is unknown"):
            pipeline.scale(7, 1)


def test_a_node_told_to_end_finishes_its_work_and_is_replaced(plan, wanted):
    with Pipeline.launch(plan) as pipeline:
        old = pipeline.nodes[1].pid
        futures = [pipeline.submit(given(number % 8)) for number in range(40)]
        os.kill(old, signal.SIGTERM)
        assert all(np.array_equal(f.result(60)["y"], wanted[n % 8]) for n, f in enumerate(futures))
        wait_until(lambda: whole(pipeline) and not psutil.pid_exists(old))
        assert (pipeline.incidents, pipeline.retries) == ((), 0)


def test_draining_answers_everything_and_takes_nothing_more(plan, wanted):
    with Pipeline.launch(plan) as pipeline:
        futures = [pipeline.submit(given(number)) for number in range(6)]
        pipeline.drain(timeout=60)
        assert all(future.done() for future in futures)
        assert all(np.array_equal(f.result()["y"], wanted[n]) for n, f in enumerate(futures))
        with pytest.raises(PipelineClosed, match="takes no more requests"):
            pipeline.run(given())


def test_a_request_that_is_given_up_leaves_its_place_to_others(plan, wanted):
    launcher = FaultyLauncher({"what": "hold", "stage": 0})
    with Pipeline.launch(plan, launcher=launcher, inflight=2) as pipeline:
        futures = [pipeline.submit(given(number)) for number in range(2)]
        with pytest.raises(Busy):
            pipeline.submit(given(2), block=False)
        assert futures[1].cancel()
        pipeline.submit(given(2), timeout=60)  # it waits for the place that the cancelled request gives back
        launcher.release()
        assert np.array_equal(futures[0].result(60)["y"], wanted[0])
        assert futures[1].cancelled()


def test_a_slow_replica_gets_less(plan, wanted):
    launcher = FaultyLauncher({"what": "slow", "seconds": 0.5, "stage": 1, "replica": 0, "only_once": False})
    with Pipeline.launch(plan, launcher=launcher, replicas={1: 2}, inflight=6) as pipeline:
        ask(pipeline, wanted, 60)
        slow, quick = (stats.requests for stats in pipeline.stats()[1:3])
        assert slow + quick == 60
        assert slow < quick


@pytest.mark.parametrize("full", [False, True])
def test_full_shared_memory_is_not_a_fault(plan, wanted, full):
    """Stage 2 holds a request until stage 1 has sent eight; when memory is small, it has room for two at a time."""
    faults = {"what": "count", "stage": 1, "at": "sent"}, {"what": "hold", "stage": 2, "request": 8}
    launcher = FaultyLauncher(*faults, memory_bytes=1 << 16 if full else 256 << 20)
    with Pipeline.launch(plan, launcher=launcher, inflight=8) as pipeline:
        ask(pipeline, wanted, 8)
        before = pipeline.stats()[1]
        futures = [pipeline.submit(given(number)) for number in range(8)]
        wait_until(lambda: launcher.happened == 8 + 8 + 1)  # the bytes that were sent, and those that are held
        launcher.release()
        assert all(np.array_equal(f.result(60)["y"], wanted[n]) for n, f in enumerate(futures))
        after = pipeline.stats()[1]
        shared, output = after.shared_bytes - before.shared_bytes, after.output_bytes - before.output_bytes
        assert (shared <= output // 2) is full
        assert (shared == output) is not full


CALLER = """
import sys, numpy as np
from runtime import Pipeline
with Pipeline.listen(sys.argv[1], bind=sys.argv[2]) as pipeline:
    print("ready", flush=True)
    while True:
        pipeline.run({"x": np.ones((64, 128), np.float32)})
"""


def test_nodes_notice_that_their_coordinator_died_and_end(plan, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    caller = subprocess.Popen(
        [sys.executable, "-P", "-c", CALLER, str(plan), address], stdout=subprocess.PIPE, env=python_environment
    )
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--rejoin", "1"]
    nodes = [subprocess.Popen(command, env=python_environment, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert caller.stdout.readline() == b"ready\n"
    caller.kill()
    assert [node.wait(60) for node in nodes] == [1, 1, 1]
    caller.communicate()
    Pipeline.launch(plan).close()  # removes the folder of the killed process


def test_a_request_that_comes_while_nodes_are_told_what_is_over_is_not_forgotten(chain_plan, monkeypatch):
    plain = RequestTable.oldest.fget
    answers = []

    def slowly(machine):
        found = plain(machine)
        if threading.current_thread() is threading.main_thread():
            submitting.start()  # as a caller's thread might at this moment
            submitting.join(0.3)
        return found

    with Pipeline.launch(chain_plan) as pipeline:
        given = {"x": np.ones((1, 32), np.float32)}
        submitting = threading.Thread(target=lambda: answers.append(pipeline.run(given, timeout=60)))
        monkeypatch.setattr(RequestTable, "oldest", property(slowly))
        assert pipeline._coordinator.requests.beat.oldest == 0, "the request that came meanwhile is not over"
        submitting.join(60)
    assert len(answers) == 1
