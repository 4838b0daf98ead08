"""Tensors cross in place, in order, and leave nothing; batches are split and joined; replicas share weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import build
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import InputError
from onnxsplit.file_cache import cache_folder
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.wire import codec
from runtime.wire.messages.data import Fragment

ROWS, WIDTH = 64, 256
CUT_BYTES = ROWS * WIDTH * 4


def given(seed: int = 0, rows: int = ROWS):
    return {"x": np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """A chain in two stages, whose tensors are large enough for shared memory; measured, so its batch is known."""
    folder = tmp_path_factory.mktemp("wide")
    model = build.save(build.chain(8, WIDTH), folder)
    partition(model, stages=2, out=folder / "m.plan", rounds=0, dims={"batch": 16})
    return folder / "m.plan"


def expected(plan, inputs):
    return run_stages(plan, load_plan(plan), inputs, threads=1)


def maps_of_ours() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:onnxsplit")


def totals(pipeline) -> list[tuple[int, int]]:
    return [(s.shared_bytes, s.output_bytes) for s in pipeline.stats()]


def shares(pipeline, before: list[tuple[int, int]]) -> list[float]:
    """Return the share of every node's outputs since then that crossed in shared memory."""
    now = totals(pipeline)
    return [round((s - s0) / (o - o0), 3) for (s, o), (s0, o0) in zip(now, before, strict=True)]


def warm(pipeline, **options) -> list[tuple[int, int]]:
    """Run a request, because nodes may learn only from the first one which nodes read their memory."""
    pipeline.run(given(), **options)
    return totals(pipeline)


def test_large_tensors_cross_in_shared_memory_and_all_of_it_comes_back(plan):
    with Pipeline.launch(plan, micro_batch=0) as pipeline:
        before = warm(pipeline)
        for seed in range(5):
            assert np.array_equal(pipeline.run(given(seed))["y"], expected(plan, given(seed))["y"])
        assert shares(pipeline, before) == [1.0, 1.0]
        assert pipeline.lent_bytes == 0
    assert maps_of_ours() == 0


def test_recurring_requests_need_no_messages(plan, monkeypatch):
    """The caller counts its own messages, and the slots that nodes give back show that they read the lanes."""
    sent = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda message: (sent.append(message), encode(message))[1])
    with Pipeline.launch(plan, micro_batch=0, inflight=4) as pipeline:
        warm(pipeline)
        warm(pipeline)
        before = sum(isinstance(message, Fragment) for message in sent)
        futures = [pipeline.submit(given(seed)) for seed in range(20)]
        for seed, future in enumerate(futures):
            assert np.array_equal(future.result(60)["y"], expected(plan, given(seed))["y"])
            assert [visit.stage for visit in future.visits] == [0, 1]
        assert sum(isinstance(message, Fragment) for message in sent) == before
        assert pipeline.lent_bytes == 0
        assert [stats.requests for stats in pipeline.stats()] == [22, 22]
        assert [sum(n for n, _ in stats.by_cost.values()) for stats in pipeline.stats()] == [22, 22]
        assert [sum(ran_ns for _, ran_ns in s.by_cost.values()) for s in pipeline.stats()] == [
            stats.ran_ns for stats in pipeline.stats()
        ]


def test_slots_are_used_again_for_ever(plan):
    room = 6 * CUT_BYTES
    with Pipeline.launch(plan, micro_batch=0, inflight=4, inflight_bytes=room) as pipeline:
        wanted = [expected(plan, given(seed))["y"] for seed in range(3)]
        futures = [pipeline.submit(given(number % 3)) for number in range(600)]
        assert all(np.array_equal(future.result(60)["y"], wanted[n % 3]) for n, future in enumerate(futures))
        before = warm(pipeline)
        pipeline.run(given())
        assert shares(pipeline, before) == [1.0, 1.0], "slots that were lost would have left no room"


def test_tensors_without_room_in_the_arena_are_sent_as_frames(plan):
    with Pipeline.launch(plan, micro_batch=0, inflight_bytes=CUT_BYTES + 100) as pipeline:
        futures = [pipeline.submit(given(seed)) for seed in range(20)]
        for seed, future in enumerate(futures):
            assert np.array_equal(future.result(60)["y"], expected(plan, given(seed))["y"])


def test_without_shared_memory_everything_goes_as_frames(plan):
    with Pipeline.launch(plan, micro_batch=0, shared_memory=False) as pipeline:
        futures = [pipeline.submit(given(seed)) for seed in range(20)]
        for seed, future in enumerate(futures):
            assert np.array_equal(future.result(60)["y"], expected(plan, given(seed))["y"])
        assert shares(pipeline, [(0, 0), (0, 0)]) == [0.0, 0.0]
        assert maps_of_ours() == 0


def test_a_node_without_shared_memory_works_beside_one_with(plan, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address, "--stage"]
    nodes = [
        subprocess.Popen([*command, *extra], env=python_environment, stderr=subprocess.PIPE)
        for extra in (["0"], ["1", "--no-shared-memory"])
    ]
    with Pipeline.listen(plan, bind=address, start_timeout=60, micro_batch=0) as pipeline:
        for seed in range(10):
            assert np.array_equal(pipeline.run(given(seed))["y"], expected(plan, given(seed))["y"])
        assert shares(pipeline, [(0, 0), (0, 0)]) == [0.0, 0.0]
        assert pipeline.run(given(), outputs=[pipeline.plan.cuts[0].tensor]), "stage 0 shares with the caller"
        assert totals(pipeline)[0][0] > 0
    assert [len(node.communicate(timeout=60)) for node in nodes] == [2, 2]
    assert [node.returncode for node in nodes] == [0, 0]


def test_branches_share_one_tensor(tmp_path):
    partition(build.save(build.diamond(256), tmp_path), stages=4, out=tmp_path / "m.plan", costs="analytic")
    inputs = [{"x": np.full((32, 256), n, np.float32)} for n in range(40)]
    with Pipeline.launch(tmp_path / "m.plan", replicas={1: 2, 3: 2}) as pipeline:
        futures = [pipeline.submit(one) for one in inputs]
        for one, future in zip(inputs, futures, strict=True):
            assert np.array_equal(future.result(60)["y"], expected(tmp_path / "m.plan", one)["y"])
        assert all(s.shared_bytes > 0 for s in pipeline.stats())


def test_shapes_that_depend_on_data_are_never_trusted(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("NonZero", ["a"], ["where"]),
        helper.make_node("Cast", ["where"], ["y"], to=TensorProto.DOUBLE),
    ]
    proto = build.model(nodes, [build.value("x", ["n"])], [build.value("y", [1, "k"], TensorProto.DOUBLE)])
    partition(build.save(proto, tmp_path), out=tmp_path / "m.plan", cut_at=["where"], costs="analytic")
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        for seed in range(12):
            x = np.random.default_rng(seed).standard_normal(20_000).astype(np.float32)
            if seed % 3 == 0:
                x[:15_000] = -1
            assert np.array_equal(pipeline.run({"x": x})["y"][0], np.flatnonzero(x > 0))


def test_a_killed_node_leaves_no_memory_behind(plan):
    pipeline = Pipeline.launch(plan, micro_batch=0, inflight=8)
    futures = [pipeline.submit(given(seed)) for seed in range(6)]
    os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
    futures += [pipeline.submit(given(seed)) for seed in range(2)]
    for seed, future in zip([*range(6), 0, 1], futures, strict=True):
        assert np.array_equal(future.result(60)["y"], expected(plan, given(seed))["y"])
    assert pipeline.lent_bytes == 0
    pipeline.close()
    assert maps_of_ours() == 0
    assert not list(Path("/dev/shm").glob("onnxsplit*"))


def test_a_batch_is_split_over_the_pipeline_and_its_replicas_and_put_together_in_order(plan):
    assert load_plan(plan).tensors["y"].batch_axis == 0
    whole = given(rows=100)
    with Pipeline.launch(plan, micro_batch=7, replicas={1: 2}, inflight=3) as pipeline:
        found = pipeline.run(whole)["y"]
        assert np.allclose(found, expected(plan, whole)["y"], atol=1e-5)
        requests = {(s.stage, s.replica): s.requests for s in pipeline.stats()}
        assert requests[0, 0] == 15
        assert requests[1, 0] + requests[1, 1] == 15
        assert min(requests.values()) > 0
        futures = [pipeline.submit({"x": whole["x"][:n]}) for n in range(1, 40, 5)]
        assert [future.result(60)["y"].shape[0] for future in futures] == list(range(1, 40, 5))


def test_without_a_word_the_micro_batch_is_the_plan_s_own(plan):
    with Pipeline.launch(plan) as pipeline:
        pipeline.run(given(rows=64))
        assert [s.requests for s in pipeline.stats()] == [4, 4]


def test_a_batch_may_be_changed_when_submit_has_returned(plan):
    whole = given(rows=64)
    wanted = expected(plan, whole)["y"]
    with Pipeline.launch(plan, micro_batch=2, inflight=1) as pipeline:
        future = pipeline.submit(whole)
        whole["x"][:] = 0
        assert np.allclose(future.result(60)["y"], wanted, atol=1e-5)


def test_replicas_share_one_packed_copy_of_their_weights(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Pipeline.launch(plan, micro_batch=0, replicas={0: 2}) as pipeline:
        futures = [pipeline.submit(given(seed)) for seed in range(8)]
        for seed, future in enumerate(futures):
            assert np.allclose(future.result(60)["y"], expected(plan, given(seed))["y"], atol=1e-5)
        maps = [Path(f"/proc/{n.pid}/maps").read_text() for n in pipeline.nodes if n.stage == 0]
    (copy,) = [entry for entry in cache_folder("weights").iterdir() if entry.is_dir()]
    assert all(str(copy / "model.data") in text for text in maps)
    assert copy.stat().st_mode & 0o077 == 0
    made = (copy / "model.onnx").stat().st_mtime_ns
    with Pipeline.launch(plan, share_weights=True) as pipeline:
        pipeline.run(given())
    assert (copy / "model.onnx").stat().st_mtime_ns == made, "it is made once"
    assert len([entry for entry in cache_folder("weights").iterdir() if entry.is_dir()]) == 2


def test_where_no_copy_can_be_made_replicas_pack_their_own(plan, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Pipeline.launch(plan, micro_batch=0, replicas=2) as pipeline:
        assert np.array_equal(pipeline.run(given())["y"], expected(plan, given())["y"])


def test_a_run_writes_a_timeline_with_the_ops_of_the_sessions(plan, tmp_path, python_environment):
    out = tmp_path / "trace.json"
    command = [sys.executable, "-P", "-m", "onnxsplit", "run", str(plan), "--repeat", "5", "--trace", str(out)]
    subprocess.run([*command, "--trace-ops"], env=python_environment, check=True, capture_output=True)
    events = json.loads(out.read_text())["traceEvents"]
    runs = [event for event in events if event["name"] == "run"]
    assert len(runs) == 10
    assert {event["pid"] for event in runs} == {1, 2}
    ops = [event for event in events if event.get("cat") == "Node"]
    assert {event["pid"] for event in ops} == {1, 2}
    first = min(event["ts"] for event in runs)
    assert all(first - 1e6 < event["ts"] < first + 60e6 for event in ops)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inflight": 0}, "inflight must be a whole number, at least 1"),
        ({"inflight_bytes": 0}, "inflight_bytes must be a whole number, at least 1"),
        ({"micro_batch": -1}, "micro_batch must be a whole number, at least 0"),
        ({"mode": "later"}, "allowed: sync, async"),
        ({"replicas": 0}, "replicas of stage 0 must be a whole number, at least 1"),
    ],
)
def test_options_that_make_no_sense_are_named(plan, options, words):
    with pytest.raises(InputError, match=words):
        Pipeline.launch(plan, **options)


def test_an_error_that_a_callback_keeps_keeps_no_memory_of_nodes(chain_plan):
    """An error refers to the variables of all functions that called the one that raised it."""

    def mapped() -> int:
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the descriptor of the folder itself
                found += "memfd:onnxsplit" in str(link.readlink())
        return found

    kept: list[BaseException] = []

    def keep(_: object) -> None:
        try:
            raise ValueError("kept")
        except ValueError as error:
            kept.append(error)

    before = mapped()
    with Pipeline.launch(chain_plan) as pipeline:
        for _ in range(50):
            future = pipeline.submit({"x": np.ones((1, 32), np.float32)})
            future.add_done_callback(keep)
            future.result()
        assert mapped() > before
    assert len(kept) == 50
    assert mapped() == before
