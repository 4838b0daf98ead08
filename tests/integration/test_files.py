"""Nodes that do not see the plan's folder get their stage, and no other files, from the coordinator."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager

import build
import numpy as np
import pytest

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.home import sweep
from runtime.timings import Timings
from runtime.wire.keys import create_for

WIDTH = 256
QUICK = Timings(beat_s=0.2, silence_s=1.5, lost_s=2)
X = {"x": np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    partition(build.save(build.chain(8, WIDTH), folder), stages=2, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def wanted(plan):
    return run_stages(plan, load_plan(plan), X, threads=1)["y"]


@contextmanager
def node(address, environment, cache, *options):
    """A node that fetches its stage into a separate cache."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--fetch", *map(str, options)]
    environment = {**environment, "XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        sweep()  # as the next node of this user does


def fetched(cache) -> list[str]:
    return sorted(
        p.name for p in (cache / "onnxsplit" / "stages").rglob("*") if p.is_file() and p.suffix in (".onnx", ".data")
    )


def files(stage) -> list[str]:
    return sorted(entry.name for entry in stage.files)


def test_each_node_fetches_its_own_stage_over_links_with_keys(plan, wanted, free_port, python_environment, tmp_path):
    create_for(tmp_path / "keys", ("a", "b"))
    address = f"tcp://127.0.0.1:{free_port}"
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        node(address, python_environment, one, "--keys", tmp_path / "keys" / "a", "--stage", 0),
        node(address, python_environment, two, "--keys", tmp_path / "keys" / "b", "--stage", 1),
        Pipeline.listen(plan, bind=address, start_timeout=120, keys=tmp_path / "keys" / "coordinator") as pipeline,
    ):
        assert np.array_equal(pipeline.run(X)["y"], wanted)
    assert [fetched(one), fetched(two)] == [files(stage) for stage in load_plan(plan).stages]


def test_a_killed_node_comes_back_with_what_was_fetched_before(plan, wanted, free_port, python_environment, tmp_path):
    address = f"tcp://127.0.0.1:{free_port}"
    with (
        node(address, python_environment, tmp_path, "--stage", 0) as first,
        node(address, python_environment, tmp_path, "--stage", 1),
        Pipeline.listen(plan, bind=address, start_timeout=120, timings=QUICK) as pipeline,
    ):
        assert np.array_equal(pipeline.run(X)["y"], wanted)
        first.kill()
        future = pipeline.submit(X)
        with node(address, python_environment, tmp_path, "--stage", 0) as second:
            assert np.array_equal(future.result(60)["y"], wanted)
            second.terminate()
            assert "fetching" not in second.communicate(timeout=60)[1]
            (cached,) = [file for file in tmp_path.rglob("*.onnx") if file.name == load_plan(plan).stages[0].file]
            cached.write_bytes(cached.read_bytes()[:-1])
            future = pipeline.submit(X)
            with node(address, python_environment, tmp_path, "--stage", 0) as third:
                assert np.array_equal(future.result(60)["y"], wanted)
                third.terminate()
                assert "damaged files in the cache are fetched again" in third.communicate(timeout=60)[1]


def test_a_pipeline_that_is_elastic_takes_more_nodes_and_lets_them_go(plan, wanted, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"

    def replicas() -> list[int]:
        ready = [node.stage for node in pipeline.nodes if node.state == "ready"]
        return [ready.count(stage) for stage in (0, 1)]

    def until(found: list[int]) -> None:
        deadline = time.monotonic() + 60
        while replicas() != found:
            assert time.monotonic() < deadline, (replicas(), found)
            assert np.array_equal(pipeline.run(X)["y"], wanted)
            time.sleep(0.02)

    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--stage"]
    started = [
        subprocess.Popen([*command, stage], env=python_environment, stderr=subprocess.DEVNULL) for stage in ("0", "1")
    ]
    try:
        with Pipeline.listen(plan, bind=address, start_timeout=120, timings=QUICK, elastic=True) as pipeline:
            started.append(subprocess.Popen([*command, "1"], env=python_environment, stderr=subprocess.DEVNULL))
            until([1, 2])
            started[1].terminate()
            until([1, 1])
            assert started[1].wait(60) == 0
            assert len(pipeline.nodes) == 2, "it had come by itself: nobody is waited for in its place"
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_node_killed_while_it_loads_before_all_are_ready_is_waited_for_again(
    plan, wanted, free_port, python_environment, tmp_path
):
    import threading

    address, ready = f"tcp://127.0.0.1:{free_port}", {}

    def listen() -> None:
        ready["pipeline"] = Pipeline.listen(plan, bind=address, start_timeout=120, timings=QUICK)

    waiting = threading.Thread(target=listen)
    waiting.start()
    with node(address, python_environment, tmp_path, "--stage", 0) as first:
        for line in first.stderr:
            if "stage loaded" in line:
                break
        first.kill()
        with (
            node(address, python_environment, tmp_path, "--stage", 0),
            node(address, python_environment, tmp_path, "--stage", 1),
        ):
            waiting.join(120)
            with ready["pipeline"] as pipeline:
                assert np.array_equal(pipeline.run(X)["y"], wanted)
                assert "has been silent" in pipeline.incidents[0].story
