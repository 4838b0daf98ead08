"""Nodes on a Ray cluster of several hosts, which are processes of this one; one is killed under load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import build
import custom
import msgspec.structs
import numpy as np
import psutil
import pytest
from served import PENDING, Served
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.errors import LaunchFailed
from runtime.home import sweep
from runtime.timings import Timings

pytest.importorskip("ray", reason="needs Ray: pip install 'onnxsplit[ray]'")
from runtime.launch.ray import RayLauncher

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and files
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
QUICK = Timings(beat_s=0.2, silence_s=3)
X = {"x": np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)}
SOON = {  # a lost host is detected after a second
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,  # a connection that is refused fails at once
    "health_check_failure_threshold": 2,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "memory": 2 << 30}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    partition(build.save(build.chain(8), folder), stages=3, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def wanted(plan):
    return run_stages(plan, load_plan(plan), X, threads=1)["y"]


@pytest.fixture(scope="module")
def cluster():
    """A head that runs nothing, and five hosts h0 to h4."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_name": "head", "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**head, "_system_config": SOON})
    made.hosts = [made.add_node(wait=False, node_name=f"h{number}", **NODE) for number in range(5)]
    made.wait_for_nodes()
    made.killed = set()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", made.address)
        yield made
    made.shutdown()
    sweep()  # the next pipeline of this user does this: no process is left on the killed host


def hosts(pipeline) -> list[str]:
    return [node.host for node in pipeline.nodes]


def test_a_host_killed_under_load_is_made_up_for_by_another_and_nothing_is_lost(plan, wanted, cluster):
    loaded = load_plan(plan)
    with Pipeline.launch(plan, launcher=RayLauncher(loaded, placement="strict-spread"), timings=QUICK) as pipeline:
        assert len(set(hosts(pipeline))) == 3
        lost = hosts(pipeline)[1]
        pending = [pipeline.submit(X) for _ in range(6)]
        cluster.killed.add(int(lost[1:]))
        cluster.remove_node(cluster.hosts[int(lost[1:])], allow_graceful=False)
        deadline = time.monotonic() + 60
        while not pipeline.incidents or not all(node.state == "ready" for node in pipeline.nodes):
            assert np.array_equal(pending.pop(0).result(60)["y"], wanted)
            pending.append(pipeline.submit(X))
            assert time.monotonic() < deadline, pipeline.incidents
        assert all(np.array_equal(future.result(60)["y"], wanted) for future in pending)
        assert lost not in hosts(pipeline)


def planned_for(plan, *hosts: str):
    """Return the plan as if it was made for a cluster, with each stage on one of these hosts."""
    loaded = load_plan(plan)
    stages = [msgspec.structs.replace(s, hosts=(host,)) for s, host in zip(loaded.stages, hosts, strict=True)]
    return msgspec.structs.replace(loaded, stages=tuple(stages))


def test_a_launcher_beside_another_has_what_the_first_leaves_free_and_says_so_if_that_is_too_little(
    plan, cluster, tmp_path, monkeypatch
):
    partition(build.save(build.chain(8), tmp_path), stages=1, out=tmp_path / "m.plan", costs="analytic")
    monkeypatch.setattr("runtime.launch.ray._GROUP_S", 3.0)
    launcher = RayLauncher(load_plan(plan))
    with Pipeline.launch(plan, launcher=launcher) as old:
        with pytest.raises(LaunchFailed, match=r"no room for 3 nodes as spread: .*, of which .* are free"):
            launcher.beside(load_plan(plan))
        beside = launcher.beside(load_plan(tmp_path / "m.plan"), background_s=5.0)
        with Pipeline.launch(tmp_path / "m.plan", launcher=beside) as new:
            assert np.allclose(new.run(X)["y"], old.run(X)["y"], atol=1e-5)
            assert set(hosts(new)).isdisjoint(hosts(old))


def test_nodes_go_where_the_plan_has_them(plan, wanted, cluster):
    left = sorted(set(range(5)) - cluster.killed)
    there = [f"h{number}" for number in (left[2], left[0], left[1])]
    with Pipeline.launch(plan, launcher=RayLauncher(planned_for(plan, *there))) as pipeline:
        assert np.array_equal(pipeline.run(X)["y"], wanted)
        assert hosts(pipeline) == there


def test_hosts_load_their_own_custom_op_library_where_it_is_named(cluster, tmp_path):
    library = custom.other_build(tmp_path)
    given = {"s": np.array(["ab", "xyz"], dtype=object)}
    made = partition(
        build.save(custom.lengths(), tmp_path), stages=2, out=tmp_path / "m.plan", custom_ops=[library], rounds=1
    )
    with Pipeline.launch(tmp_path / "m.plan", launcher=RayLauncher(made, custom_ops=[str(library)])) as pipeline:
        assert pipeline.run(given, timeout=60)["y"].tolist() == [4.0, 9.0]
    with pytest.raises(LaunchFailed, match=r"stage ([01]) .*refused: stage \1 .*'libops\.so'.*given: none"):
        Pipeline.launch(tmp_path / "m.plan", launcher=RayLauncher(made))
    with pytest.raises(InputError, match=r"RayLauncher\(custom_ops="):
        Pipeline.launch(tmp_path / "m.plan", launcher=RayLauncher(made), custom_ops=[library])


def test_what_a_cluster_has_no_room_for_is_said_with_what_it_has(plan, cluster, monkeypatch):
    monkeypatch.setattr("runtime.launch.ray._GROUP_S", 1.0)
    there = f"h{min(set(range(5)) - cluster.killed)}"
    with pytest.raises(LaunchFailed, match=r"no room for 3 nodes as strict-spread: they need CPU 1.*; it has"):
        RayLauncher(planned_for(plan, there, there, there), placement="strict-spread")


def test_a_cluster_that_is_named_and_not_there_is_said_at_once(plan, monkeypatch, free_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")
    with pytest.raises(LaunchFailed, match=r"no Ray cluster answers at .* \(RAY_ADDRESS\).*ray start --head"):
        RayLauncher(load_plan(plan))
    with pytest.raises(InputError, match="placement 'everywhere' is unknown; allowed: spread, strict-spread, pack"):
        RayLauncher(load_plan(plan), placement="everywhere")


def test_serve_starts_a_cluster_of_its_own_ends_in_peace_and_leaves_nothing(plan, python_environment):
    """The only command that a user types: ``onnxsplit serve plan/ --launcher ray``.

    Ray handles SIGTERM itself once it is started, and used to abort a process that had not ended 3 s later.
    """
    environment, begun = {**python_environment, "RAY_ADDRESS": "local"}, time.time()
    lasting = ("--timing", "silence_s=300")
    with Served(plan, "--launcher", "ray", *lasting, environment=environment) as served, ThreadPoolExecutor() as pool:
        body = {"inputs": [{"name": "x", "shape": [2, 32], "datatype": "FP32", "data": X["x"].tolist()}]}
        assert served.json("/v2/models/m/infer", body)["outputs"][0]["shape"] == [2, 32]
        command = [sys.executable, "-P", "-m", "onnxsplit", "status", "--json", "--pid", str(served.process.pid)]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert '"host":' in shown.stdout
        (pipeline,) = json.loads(shown.stdout)["pipelines"]
        nodes = [psutil.Process(node["pid"]) for node in pipeline["nodes"]]
        for node in nodes:
            node.suspend()
        accepted = pool.submit(served.json, "/v2/models/m/infer", body)
        wait_until(lambda: served.metric(PENDING) == 1)
        served.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(5)
        for node in nodes:
            node.resume()
        assert accepted.result(60)["outputs"][0]["shape"] == [2, 32]
    wait_until(lambda: not daemons_since(begun), "the end of Ray's daemons", every_s=0.1)


def daemons_since(begun: float) -> list[psutil.Process]:
    """Return Ray's daemons of this test run, by its own folder."""
    started = [p for p in psutil.process_iter(["name", "create_time"]) if p.info["create_time"] > begun]
    return [p for p in started if p.info["name"] in ("gcs_server", "raylet") and is_ours(p)]


def is_ours(process: psutil.Process) -> bool:
    try:
        return process.environ().get("TMPDIR") == os.environ["TMPDIR"]
    except psutil.Error:
        return False
