"""The results that a caller gets from real node processes over real sockets."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import wait

import build
import numpy as np
import psutil
import pytest
from faulty_node import FaultyLauncher
from onnx import TensorProto, helper

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.errors import Busy, DeadlineExceeded, LaunchFailed, PipelineClosed, PipelineError, StageFailed
from runtime.timings import Timings


def batch(rows: int = 3, width: int = 32, seed: int = 0):
    return {"x": np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)}


def expected(plan, inputs):
    return run_stages(plan, load_plan(plan), inputs, threads=1)


def planned(proto, folder, stages: int):
    partition(build.save(proto, folder), stages=stages, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.fixture(scope="module")
def chain(chain_plan):
    with Pipeline.launch(chain_plan) as pipeline:
        yield pipeline


def test_a_pipeline_gives_what_its_stages_give(chain, chain_plan):
    outputs = chain.run(batch())
    assert np.array_equal(outputs["y"], expected(chain_plan, batch())["y"])


def test_many_requests_at_once_each_get_their_own_answer(chain, chain_plan):
    inputs = [batch(rows=1 + n % 4, seed=n) for n in range(60)]
    futures = [chain.submit(given) for given in inputs]
    for given, future in zip(inputs, futures, strict=True):
        assert np.array_equal(future.result(60)["y"], expected(chain_plan, given)["y"])


def test_callers_in_many_threads_each_get_their_own_answer(chain, chain_plan):
    wrong = []

    def call(seed: int) -> None:
        for n in range(10):
            given = batch(seed=seed * 100 + n)
            if not np.array_equal(chain.run(given)["y"], expected(chain_plan, given)["y"]):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_outputs_are_the_caller_s_own_and_inputs_may_change_at_once(chain, chain_plan):
    given = batch()
    wanted = expected(chain_plan, given)["y"]
    future = chain.submit(given)
    given["x"][:] = 0
    answer = future.result(60)["y"]
    assert np.array_equal(answer, wanted)
    answer[:] = 1


def test_any_cut_tensor_can_be_asked_for_and_only_what_it_needs_runs(chain, chain_plan):
    before = {(s.stage): s.requests for s in chain.stats()}
    cut = chain.plan.cuts[0].tensor
    outputs = chain.run(batch(), outputs=[cut])
    assert np.array_equal(outputs[cut], expected(chain_plan, batch())[cut])
    after = {(s.stage): s.requests for s in chain.stats()}
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "'x' is missing"),
        ({"x": np.ones((1, 32))}, "type float64, expected float32"),
        ({"x": np.ones((1, 31), np.float32)}, "size 31 on axis 1, expected 32"),
        ({"x": np.ones(32, np.float32)}, "1 dimensions"),
        ({**batch(), "z": np.ones(1)}, "'z' is unknown"),
    ],
)
def test_wrong_inputs_are_named_and_nothing_is_sent(chain, inputs, words):
    with pytest.raises(InputError, match=words):
        chain.run(inputs)


def test_an_unknown_output_is_named_with_those_there_are(chain):
    with pytest.raises(InputError, match=r"'z' is unknown; allowed: y"):
        chain.run(batch(), outputs=["z"])


def test_nodes_and_stats_tell_what_is_there(chain, chain_plan):
    assert [(node.stage, node.replica, node.state) for node in chain.nodes] == [
        (0, 0, "ready"),
        (1, 0, "ready"),
    ]
    assert all(node.pid for node in chain.nodes)
    chain.run(batch())
    assert all(s.requests > 0 and s.run_ns > 0 for s in chain.stats()[:1])


def test_branches_join_by_request(diamond_plan):
    inputs = [{"x": np.full((1, 16), n, np.float32)} for n in range(30)]
    with Pipeline.launch(diamond_plan, replicas={1: 2, 3: 2}) as pipeline:
        futures = [pipeline.submit(given) for given in inputs]
        for given, future in zip(inputs, futures, strict=True):
            assert np.array_equal(future.result(60)["y"], expected(diamond_plan, given)["y"])
        used = {(s.stage, s.replica): s.requests for s in pipeline.stats()}
    assert used[1, 0] > 0
    assert used[1, 1] > 0
    assert used[1, 0] + used[1, 1] == 30


def test_sync_lets_one_request_in_at_a_time(chain_plan):
    with Pipeline.launch(chain_plan, mode="sync") as pipeline:
        assert pipeline.inflight == 1
        futures = [pipeline.submit(batch(seed=n)) for n in range(5)]
        assert all(future.done() for future in futures[:-1])
        assert np.array_equal(futures[-1].result(60)["y"], expected(chain_plan, batch(seed=4))["y"])


def test_busy_and_deadline(chain_plan):
    with Pipeline.launch(chain_plan, inflight=1, timings=Timings(silence_s=600)) as pipeline:
        node = psutil.Process(pipeline.nodes[0].pid)
        node.suspend()
        first = pipeline.submit(batch())
        with pytest.raises(Busy, match="1 requests are in flight"):
            pipeline.submit(batch(), block=False)
        with pytest.raises(DeadlineExceeded, match="before it was admitted"):
            pipeline.submit(batch(), timeout=0.01)
        node.resume()
        first.result(60)
        node.suspend()
        late = pipeline.submit(batch(), timeout=0.05)
        with pytest.raises(
            DeadlineExceeded, match=r"stage 0 \(node 0.0, pid \d+ on .+\) (was running|had not begun) it"
        ):
            late.result(60)
        node.resume()
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


def test_a_stage_that_cannot_run_a_request_fails_that_request_alone(tmp_path):
    plan = planned(build.failing(), tmp_path, 2)
    with Pipeline.launch(plan) as pipeline:
        bad = pipeline.submit({"x": np.ones(4, np.float32)})
        good = pipeline.submit({"x": np.ones(6, np.float32)})
        with pytest.raises(StageFailed, match=r"stage \d \(node \d.0, pid \d+ on .*Reshape"):
            bad.result(60)
        assert good.result(60)["y"].shape == (2, 3)


def test_closing_fails_what_is_in_flight(chain_plan):
    pipeline = Pipeline.launch(chain_plan, launcher=FaultyLauncher({"what": "hold", "stage": 0}))
    futures = [pipeline.submit(batch()) for _ in range(3)]
    pipeline.close()
    done, _ = wait(futures, 60)
    assert len(done) == 3
    assert all(isinstance(future.exception(), PipelineClosed) for future in futures)
    with pytest.raises(PipelineClosed):
        pipeline.run(batch())
    pipeline.close()
    assert pipeline.trouble == "the pipeline was closed"
    with pytest.raises(PipelineClosed, match="the pipeline was closed"):
        pipeline.drain(1)


def test_pass_through_outputs_need_no_node(tmp_path):
    proto = build.chain(2)
    proto.graph.output.append(build.value("x", ["batch", 32]))
    proto.graph.output.append(build.value("w1", [32, 32]))
    plan = planned(proto, tmp_path, 2)
    with Pipeline.launch(plan) as pipeline:
        outputs = pipeline.run(batch())
        assert list(outputs) == ["y", "x", "w1"]
        assert np.array_equal(outputs["x"], batch()["x"])
        assert pipeline.run(batch(), outputs=["x"]).keys() == {"x"}
        assert pipeline.run({}, outputs=["w1"])["w1"].shape == (32, 32)
        assert pipeline.stats()[1].requests == 1


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (TensorProto.STRING, np.array([["größer", ""], ["b", "c"]], dtype=object)),
        (TensorProto.BOOL, np.array([[True], [False]])),
        (TensorProto.UINT8, np.zeros((0, 3), np.uint8)),
        (TensorProto.INT64, np.array(5)),
        (TensorProto.FLOAT16, np.ones((2, 2), np.float16)),
        (TensorProto.DOUBLE, np.ones((300, 300))),
    ],
)
def test_tensors_of_every_kind_travel(tmp_path, kind, array):
    shape = [None] * array.ndim
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("x", "a"), ("a", "y"))]
    plan = planned(build.model(nodes, [build.value("x", shape, kind)], [build.value("y", shape, kind)]), tmp_path, 2)
    with Pipeline.launch(plan) as pipeline:
        found = pipeline.run({"x": array})["y"]
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()


def test_a_folder_named_runtime_where_the_user_stands_does_not_matter(tmp_path, chain_plan, monkeypatch):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Pipeline.launch(chain_plan) as pipeline:
        assert pipeline.run(batch())["y"].shape == (3, 32)


def test_a_provider_that_is_not_there_fails_the_launch_by_name(chain_plan):
    with pytest.raises(LaunchFailed, match=r"stage 1 .*provider 'cuda:0'"):
        Pipeline.launch(chain_plan, provider="1=cuda:0")


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_nodes_started_by_hand(scheme, tmp_path, chain_plan, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}" if scheme == "tcp" else f"ipc://{tmp_path}/control"
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
    nodes = [
        subprocess.Popen([*command, *extra], env=python_environment, stderr=subprocess.PIPE)
        for extra in (["--stage", "1", "--plan", str(chain_plan)], ["--threads", "1"])
    ]
    with Pipeline.listen(chain_plan, bind=address, start_timeout=120) as pipeline:
        assert np.array_equal(pipeline.run(batch())["y"], expected(chain_plan, batch())["y"])
        assert {node.pid for node in pipeline.nodes} == {node.pid for node in nodes}
    errors = [node.communicate(timeout=60)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert list(tmp_path.glob("control*")) == []


def test_a_node_with_another_plan_is_refused(chain_plan, diamond_plan, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    command = [
        sys.executable,
        "-P",
        "-m",
        "onnxsplit",
        "node",
        "--connect",
        address,
        "--plan",
        str(diamond_plan),
    ]
    node = subprocess.Popen(command, env=python_environment, stderr=subprocess.PIPE)
    with pytest.raises(LaunchFailed, match="holds another plan"):
        Pipeline.listen(chain_plan, bind=address, start_timeout=120)
    node.communicate(timeout=60)
    assert node.returncode == 1


def test_waiting_for_nodes_that_never_come_ends_with_their_names(chain_plan, free_port):
    with pytest.raises(LaunchFailed, match=r"not ready after 0 s: stage 0 \(node 0.0\), stage 1"):
        Pipeline.listen(chain_plan, bind=f"tcp://127.0.0.1:{free_port}", start_timeout=0.1)


def test_an_address_in_use_is_named(chain_plan, free_port):
    import socket

    with (
        socket.create_server(("127.0.0.1", free_port)),
        pytest.raises(PipelineError, match="cannot listen at"),
    ):
        Pipeline.listen(chain_plan, bind=f"tcp://127.0.0.1:{free_port}")
