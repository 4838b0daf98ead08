"""A server adds and ends nodes by load, with real processes: no request is lost or wrong, and no process stays."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import psutil
import pytest
from decoders import gqa
from faulty_node import FaultyLauncher
from processes import running
from served import Served
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.balance.autoscale import Autoscaler, StageLoad
from runtime.balance.replicas import ReplicaRange
from runtime.errors import PipelineClosed
from runtime.timings import Timings

SLOW = {"what": "slow", "seconds": 0.2, "stage": 1, "only_once": False}  # it waits, so it needs no processor
QUICK = ("--threads", "1", "--timing", "beat_s=0.2", "--scale-up-after", "0.6", "--scale-down-after", "2")
UP_TO_THREE = {1: ReplicaRange(least=1, most=3)}
INPUTS = 4

SERVER = """
import json, sys
import runtime.starting
from faulty_node import FaultyLauncher
from onnxsplit.cli import main
faults = json.loads(sys.argv.pop(1))
runtime.starting.LocalLauncher = lambda memory_bytes, custom_ops: FaultyLauncher(*faults, memory_bytes=memory_bytes)
main()
"""


def given(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((1, 32)).astype(np.float32)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """A chain in two stages."""
    folder = tmp_path_factory.mktemp("autoscaling")
    partition(build.save(build.chain(6), folder), stages=2, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def wanted(plan) -> list[np.ndarray]:
    loaded = load_plan(plan)
    return [run_stages(plan, loaded, given(seed), threads=1)["y"] for seed in range(INPUTS)]


@pytest.fixture
def serve(plan, python_environment):
    """Start ``onnxsplit serve`` whose nodes have faults."""
    support = str(Path(__file__).parents[1] / "support")
    environment = {**python_environment, "PYTHONPATH": os.pathsep.join([python_environment["PYTHONPATH"], support])}

    def start(*faults: dict[str, object], replicas: str = "1=1:3") -> Served:
        program = ("-c", SERVER, json.dumps([SLOW, *faults]))
        return Served(plan, "--replicas", replicas, *QUICK, environment=environment, program=program)

    return start


@contextmanager
def load(ask: Callable[[int], np.ndarray], wanted: list[np.ndarray], *, callers: int = 8, pause_s: float = 0.0):
    """Ask from several threads, one request after the other in each, and compare all answers at the end."""
    over, wrong, answered = threading.Event(), list[object](), list[int]()

    def call(number: int) -> None:
        while not over.is_set():
            try:
                if not np.allclose(ask(number % INPUTS), wanted[number % INPUTS], rtol=1e-5):
                    wrong.append(number)
            except BaseException as error:
                wrong.append(error)
                return
            answered.append(number)
            over.wait(pause_s)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def by_http(server: Served) -> Callable[[int], np.ndarray]:
    def ask(seed: int) -> np.ndarray:
        x = given(seed)["x"]
        body = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": x.ravel().tolist()}]}
        (output,) = server.json("/v2/models/m/infer", body)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    return ask


def nodes_of(server: Served) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if running([child.pid])]


def up(server: Served) -> float:
    return server.metric("onnxsplit_node_up", 'stage="1"')


def test_a_server_grows_under_load_survives_a_kill_and_shrinks_again(serve, wanted, python_environment):
    with serve() as server:
        assert (len(nodes_of(server)), up(server)) == (2, 1)
        with load(by_http(server), wanted) as answered:
            wait_until(lambda: up(server) == 3, "the growth to three nodes of stage 1")
            nodes = nodes_of(server)
            assert len(nodes) == 4
            nodes[-1].kill()
            wait_until(lambda: server.metric("onnxsplit_node_restarts_total") == 1 and up(server) == 3)
            shown = subprocess.run(
                [sys.executable, "-P", "-m", "onnxsplit", "status", "--pid", str(server.process.pid)],
                env=python_environment, capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            before = len(answered)
            wait_until(lambda: len(answered) > before + 15)
        assert shown.count("3 (1–3)") == 3  # noqa: RUF001
        assert server.metric("onnxsplit_stage_replicas_max", 'stage="1"') == 3
        assert server.metric("onnxsplit_stage_replicas_min", 'stage="1"') == 1
        with load(by_http(server), wanted, callers=1, pause_s=0.4):
            wait_until(lambda: server.metric("onnxsplit_stage_replicas", 'stage="1"') < 3, "shrinking under a low load")
        wait_until(lambda: len(nodes_of(server)) == 2, "the end of all nodes that were added")
        assert server.metric("onnxsplit_stage_replicas", 'stage="1"') == 1
        wait_until(lambda: "stage 1: 2 to 1 replica" in "".join(server.log))
        assert server.metric("nv_inference_request_failure") == 0
    log = "".join(server.log)
    assert "stage 1: 1 to 2 replicas: " in log
    assert "its nodes were busy" in log
    assert "stage 1: 2 to 3 replicas: " in log


def test_a_server_with_fixed_replicas_stays_as_it_is_and_says_so(serve, wanted):
    with serve(replicas="1=2") as server:
        with load(by_http(server), wanted) as answered:
            wait_until(lambda: len(answered) > 40)
        assert up(server) == 2
        limits = [server.metric(f"onnxsplit_stage_replicas{end}", 'stage="1"') for end in ("", "_min", "_max")]
        assert limits == [2, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_server_that_ends_while_a_node_starts_leaves_no_process(serve, wanted, number):
    starting = {"what": "slow", "seconds": 5, "at": "starting", "stage": 1, "replica": 1, "only_once": False}
    server = serve(starting)
    with load(by_http(server), wanted):
        wait_until(lambda: len(nodes_of(server)) == 3, "the start of a node")
        nodes = [node.pid for node in nodes_of(server)]
    server.process.send_signal(number)
    status = server.wait()
    wait_until(lambda: not running(nodes), "the end of the nodes")
    assert status == (-number if number == signal.SIGKILL else 0)


def test_a_node_that_does_not_start_is_given_up_in_one_line_and_requests_go_on(plan, wanted, caplog):
    caplog.set_level(logging.INFO, "runtime.coordinator")
    killed = {"what": "kill", "at": "starting", "stage": 1, "replica": 1, "only_once": False}
    launcher = FaultyLauncher(SLOW, killed)

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if "stage=1 replica=1" in r.getMessage()]

    options = {"replicas": UP_TO_THREE, "scale_up_after": 0.6, "timings": Timings(beat_s=0.2)}
    with (
        Pipeline.launch(plan, launcher=launcher, threads=1, **options) as pipeline,
        load(lambda seed: pipeline.run(given(seed), timeout=60)["y"], wanted) as answered,
    ):
        wait_until(lambda: any("given up" in line for line in lines()))
        before = len(answered)
        wait_until(lambda: len(answered) > before + 15)
        assert [each.nodes for each in pipeline.replicas] == [1, 1]
        assert pipeline.retries == 0
    started, given_up = lines()
    assert started.startswith("node starts")
    assert given_up.startswith("replica given up: it did not start stage=1 replica=1 reason=")
    assert "SIGKILL" in given_up
    assert given_up.endswith("next_try_s=30")


def test_a_node_that_is_killed_while_it_leaves_loses_nothing(plan, wanted):
    with Pipeline.launch(plan, launcher=FaultyLauncher(SLOW), replicas={1: 2}, threads=1) as pipeline:
        leaves = pipeline.nodes[-1].pid
        futures = [pipeline.submit(given(number % INPUTS)) for number in range(8)]
        pipeline.scale(1, 1)
        wait_until(lambda: len(pipeline.nodes) == 2)
        os.kill(leaves, signal.SIGKILL)
        assert all(np.array_equal(f.result(60)["y"], wanted[n % INPUTS]) for n, f in enumerate(futures))
        assert [each.nodes for each in pipeline.replicas] == [1, 1]


def test_a_decoder_gets_nodes_and_loses_them_while_texts_go_on(tmp_path):
    model = build.save(gqa(), tmp_path)
    partition(model, stages=2, out=tmp_path / "m.plan")
    prompts = [[5, 71, 13, 88, row] for row in range(INPUTS)]
    slow = {**SLOW, "seconds": 0.1}
    options = {"scale_up_after": 0.6, "scale_down_after": 2.0, "timings": Timings(beat_s=0.2), "max_rows": 4}
    with Pipeline.launch(
        tmp_path / "m.plan", launcher=FaultyLauncher(slow), threads=1, replicas=UP_TO_THREE, **options
    ) as pipeline:

        def ask(seed: int) -> np.ndarray:
            return np.array(pipeline.generate(prompts[seed], max_tokens=8, stop_tokens=()).result(60).tokens)

        wanted = [ask(seed) for seed in range(INPUTS)]
        with load(ask, wanted):
            wait_until(lambda: sum(node.state == "ready" for node in pipeline.nodes) >= 3, "another node")
        with load(ask, wanted, callers=1):  # its text keeps a node busy, which has rows left
            wait_until(lambda: len(pipeline.nodes) == 2, "the end of the nodes that were added")
        assert pipeline.incidents == ()


def test_a_decoder_whose_caches_are_full_gets_another_node(tmp_path):
    """Two sequences fit into the caches of stage 0, which could run sixteen at once and hardly runs."""
    partition(build.save(gqa(), tmp_path), stages=2, out=tmp_path / "m.plan")
    decoder = load_plan(tmp_path / "m.plan").decoder
    assert decoder is not None
    sizes = [45 * decoder.token_bytes(stage) + decoder.fixed_bytes(stage) for stage in (0, 1)]
    slow = {**SLOW, "seconds": 0.1, "stage": 0}
    options = {"scale_up_after": 0.6, "timings": Timings(beat_s=0.2), "max_length": 45}
    options["replicas"] = {0: ReplicaRange(least=1, most=2)}
    with Pipeline.launch(
        tmp_path / "m.plan", launcher=FaultyLauncher(slow), threads=1, cache_bytes=2 * max(sizes) + 1, **options
    ) as pipeline:
        texts = [pipeline.generate([5, 71, 13, 88, row], max_tokens=40, stop_tokens=()) for row in range(6)]
        wait_until(lambda: len(pipeline.nodes) == 3, "another node")
        for text in texts:
            text.cancel()


def test_one_request_at_a_time_waits_for_nothing_whatever_its_size(plan, monkeypatch):
    seen = list[StageLoad]()
    look = Autoscaler.look

    def spy(self, now_ns, loads, host):
        seen.append(loads[1])
        return look(self, now_ns, loads, host)

    monkeypatch.setattr(Autoscaler, "look", spy)
    options = {"replicas": UP_TO_THREE, "timings": Timings(beat_s=0.02), "micro_batch": 0}
    with Pipeline.launch(plan, launcher=FaultyLauncher({**SLOW, "seconds": 1}), threads=1, **options) as pipeline:
        alone = pipeline.submit({"x": np.zeros((64, 32), np.float32)})
        wait_until(lambda: seen and seen[-1].busy_s > 0)
        assert seen[-1].waiting == 0
        others = [pipeline.submit({"x": np.zeros((64, 32), np.float32)}) for _ in range(3)]
        wait_until(lambda: round(seen[-1].waiting) >= 2)
        assert all(future.result(60)["y"].shape[0] == 64 for future in (alone, *others))
    assert max(load.waiting for load in seen) <= 4


def test_what_is_asked_of_a_pipeline_that_is_closed_or_too_large_is_refused(plan):
    with Pipeline.launch(plan, threads=1) as pipeline:
        with pytest.raises(InputError, match="the stages have 256 replicas together"):
            pipeline.scale(0, 255)
        assert len(pipeline.nodes) == 2
    with pytest.raises(PipelineClosed):
        pipeline.scale(1, 2)


def test_a_node_that_is_not_needed_leaves_and_is_not_lost(plan, caplog):
    caplog.set_level(logging.INFO, "runtime.coordinator")
    with Pipeline.launch(plan, replicas={1: 2}, threads=1) as pipeline:
        pipeline.scale(1, 1)
        wait_until(lambda: "node has left stage=1 replica=1" in caplog.text)
    assert "node lost" not in caplog.text


def test_a_range_starts_with_its_least_number_and_bounds_what_is_asked_for(plan, wanted):
    with Pipeline.launch(plan, replicas={0: ReplicaRange(least=2, most=3)}, threads=1) as pipeline:
        assert [str(each) for each in pipeline.replicas] == ["2 (2–3)", "1"]  # noqa: RUF001
        pipeline.scale(0, 3)
        wait_until(lambda: [node.state for node in pipeline.nodes] == ["ready"] * 4)
        with pytest.raises(InputError, match="stage 0 needs from 2 to 3 replicas, not 1"):
            pipeline.scale(0, 1)
        assert np.array_equal(pipeline.run(given(0))["y"], wanted[0])


def test_ranges_are_refused_where_nodes_are_not_started_here(plan):
    with pytest.raises(InputError, match=r"replicas 1:3 are a range.* elastic=True"):
        Pipeline.listen(plan, bind="tcp://127.0.0.1:1", replicas=UP_TO_THREE)


@pytest.mark.parametrize(
    ("words", "what"),
    [(("--launcher", "ray"), "Ray's autoscaler"), (("--launcher", "none", "--bind", "tcp://127.0.0.1:1"), "--elastic")],
)
def test_serve_refuses_ranges_with_other_launchers_and_says_what_scales_there(plan, python_environment, words, what):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit", "serve", str(plan), "--replicas", "1:4", *words],
        env=python_environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--replicas 1:4 lets the load decide, which is for --launcher local" in done.stderr
    assert what in done.stderr


def test_a_coordinator_that_cannot_look_at_its_host_goes_on(plan, wanted, monkeypatch):
    looks = []

    def fails() -> int:
        looks.append(1)
        raise OSError("too many open files")

    monkeypatch.setattr("runtime.coordinator.scaling.free_memory_bytes", fails)
    with Pipeline.launch(plan, replicas=UP_TO_THREE, threads=1, timings=Timings(beat_s=0.05)) as pipeline:
        wait_until(lambda: len(looks) > 5)
        assert np.array_equal(pipeline.run(given(0))["y"], wanted[0])
