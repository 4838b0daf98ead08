"""Odd requests against real nodes: each ends alone, and the pipeline is afterwards as it was before."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading

import build
import numpy as np
import pytest
from onnx import TensorProto, helper
from waiting import wait_until

from onnxsplit.errors import InputError
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.errors import DeadlineExceeded, NotSeparable, PipelineClosed, PipelineError, StageFailed
from runtime.wire import codec


def batch(rows: int = 3, width: int = 32):
    return {"x": np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)}


def expected(plan, inputs):
    return run_stages(plan, load_plan(plan), inputs, threads=1)


def with_batch_axes(plan, folder):
    """A copy of a plan that says, rightly or not, that the first axis of every input and output is the batch."""
    copy = shutil.copytree(plan, folder / "claimed.plan")
    said = json.loads((copy / "plan.json").read_text())
    for name in (*said["inputs"], *said["outputs"]):
        said["tensors"][name]["batch_axis"] = 0
    (copy / "plan.json").write_text(json.dumps(said))
    return copy


@pytest.fixture(scope="module")
def batched_plan(chain_plan, tmp_path_factory):
    return with_batch_axes(chain_plan, tmp_path_factory.mktemp("batched"))


@pytest.fixture(scope="module")
def string_plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strings")
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("s", "a"), ("a", "y"))]
    ends = [build.value("s", ["n"], TensorProto.STRING)], [build.value("y", ["n"], TensorProto.STRING)]
    partition(build.save(build.model(nodes, *ends), folder), stages=2, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


@pytest.mark.parametrize("kind", [{"timeout": "5"}, {"timeout": float("inf")}, {"outputs": "y"}, {"outputs": [["y"]]}])
def test_a_refused_call_takes_no_place(chain_plan, kind):
    with Pipeline.launch(chain_plan, inflight=1) as pipeline:
        for _ in range(3):
            with pytest.raises(InputError):
                pipeline.submit(batch(), **kind)
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


def test_a_big_endian_array_means_its_values(chain_plan):
    with Pipeline.launch(chain_plan) as pipeline:
        found = pipeline.run({"x": batch()["x"].astype(">f4")})["y"]
    assert np.array_equal(found, expected(chain_plan, batch())["y"])


def test_with_one_attempt_what_a_caller_writes_after_submit_is_not_computed(chain_plan):
    with Pipeline.launch(chain_plan, attempts=1) as pipeline:
        pipeline.run(batch())
        os.kill(pipeline.nodes[0].pid, signal.SIGSTOP)
        given = batch()
        futures = [pipeline.submit(given) for _ in range(2)]
        os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
        with pytest.raises(PipelineError):
            futures[0].result(60)
        later = pipeline.submit(given)  # waits for the next node
        given["x"][:] = -7
        assert np.array_equal(later.result(60)["y"], expected(chain_plan, batch())["y"])


def test_a_batch_of_many_parts_ends_after_drain(batched_plan):
    with Pipeline.launch(batched_plan, micro_batch=1, inflight=8) as pipeline:
        assert np.array_equal(pipeline.run(batch(64))["y"], expected(batched_plan, batch(64))["y"])
        pipeline.drain(60)
        with pytest.raises(PipelineClosed):
            pipeline.submit(batch(64)).result(60)


def test_batches_of_many_parts_and_little_time_end_and_leave_their_places(batched_plan):
    with Pipeline.launch(batched_plan, micro_batch=1, inflight=4) as pipeline:
        for timeout in (1e-4, 1e-3, 3e-3, 1e-2):
            future = pipeline.submit(batch(64), timeout=timeout)
            error = future.exception(60)
            if error is None:
                assert np.array_equal(future.result()["y"], expected(batched_plan, batch(64))["y"])
            else:
                assert isinstance(error, DeadlineExceeded)
                assert "stage" in str(error)
        assert np.array_equal(pipeline.run(batch(64), timeout=60)["y"], expected(batched_plan, batch(64))["y"])


def test_parts_that_cannot_be_joined_end_their_request_alone(tmp_path):
    """A row's length depends on the longest row of its batch, so its parts do not fit together."""
    nodes = [
        helper.make_node("ReduceMax", ["lengths"], ["longest"], keepdims=1),
        helper.make_node("Slice", ["x", "zero", "longest", "one"], ["cut"]),
        helper.make_node("Relu", ["cut"], ["y"]),
    ]
    ends = [build.value("x", ["b", "t"]), build.value("lengths", ["b"], TensorProto.INT64)], [build.value("y", None)]
    numbers = [build.constant(n, np.array([v])) for n, v in (("zero", 0), ("one", 1))]
    model = build.save(build.model(nodes, *ends, numbers), tmp_path)
    partition(model, stages=2, out=tmp_path / "m.plan", costs="analytic")
    plan = with_batch_axes(tmp_path / "m.plan", tmp_path)
    ragged = {"x": np.ones((2, 9), np.float32), "lengths": np.array([3, 7])}
    even = {"x": np.ones((2, 9), np.float32), "lengths": np.array([7, 7])}
    with Pipeline.launch(plan, micro_batch=1, inflight=2) as pipeline:
        for _ in range(3):
            with pytest.raises(NotSeparable, match=r"'y' came back as .*micro_batch=0"):
                pipeline.submit(ragged).result(60)
        assert pipeline.submit(even, timeout=60).result(60)["y"].shape == (2, 7)


def test_a_callback_that_raises_does_not_affect_other_requests(chain_plan):
    def wrong(_):
        raise SystemExit("a caller's mistake")

    with Pipeline.launch(chain_plan, inflight=2) as pipeline:
        for _ in range(4):
            future = pipeline.submit(batch())
            future.add_done_callback(wrong)
            future.result(60)
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


def test_a_callback_may_submit_and_is_told_when_it_would_wait_for_itself(chain_plan):
    seen, over = [], threading.Event()

    def again(_):
        try:
            second = pipeline.submit(batch())
            second.add_done_callback(lambda done: (seen.append(done.result()["y"]), over.set()))
            second.result(60)
        except PipelineError as error:
            seen.append(error)

    with Pipeline.launch(chain_plan, inflight=2) as pipeline:
        pipeline.submit(batch()).add_done_callback(again)
        assert over.wait(60)
        assert any("cannot wait for another request" in str(entry) for entry in seen)
        assert np.array_equal(seen[-1], expected(chain_plan, batch())["y"])


def test_what_a_node_cannot_read_ends_its_request_with_the_stage_s_name(string_plan, monkeypatch):
    with Pipeline.launch(string_plan, inflight=1) as pipeline:
        given = {"s": np.array(["a", "b"], object)}
        monkeypatch.setattr(codec, "_encode_strings", lambda _: np.array([1, 1], "<u4").tobytes() + b"\xffb")
        with pytest.raises(StageFailed, match=r"stage 0 .*the fragment from the caller cannot be read"):
            pipeline.submit(given).result(60)
        monkeypatch.undo()
        assert pipeline.run(given, timeout=60)["y"].tolist() == ["a", "b"]


def test_what_is_too_large_for_the_wire_is_refused_and_not_sent_again_and_again(chain_plan, monkeypatch):
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 100_000)
    with Pipeline.launch(chain_plan, inflight=1, shared_memory=False) as pipeline:
        with pytest.raises(StageFailed, match="at most 100000 can be sent"):
            pipeline.submit(batch(1000)).result(60)
        assert pipeline.run(batch(), timeout=60)["y"].shape == (3, 32)


def test_a_coordinator_that_fails_says_so_and_leaves_nobody_waiting(chain_plan, monkeypatch):
    with Pipeline.launch(chain_plan) as pipeline:
        assert pipeline.trouble is None
        os.kill(pipeline.nodes[0].pid, signal.SIGSTOP)
        future = pipeline.submit(batch())

        def fails(_):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(pipeline._coordinator._machine, "handle", fails)
        with pytest.raises(PipelineClosed, match=r"the coordinator failed: ZeroDivisionError"):
            future.result(60)
        assert "ZeroDivisionError" in pipeline.trouble
        with pytest.raises(PipelineClosed, match="ZeroDivisionError"):
            pipeline.run(batch())


def test_a_request_that_cannot_be_sent_ends_with_the_reason_and_leaves_its_place(chain_plan, monkeypatch):
    with Pipeline.launch(chain_plan, inflight=1) as pipeline:
        payloads = pipeline._coordinator.requests._payloads

        def full(*_):
            raise MemoryError("no room for it")

        for name in ("reserve_whole", "send"):
            with monkeypatch.context() as patched:
                patched.setattr(payloads, name, full)
                with pytest.raises(PipelineError, match="no room for it"):
                    pipeline.submit(batch()).result(60)
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some meet the garbage collector
def test_interrupts_of_a_caller_lose_no_place(chain_plan):
    """A signal handler that raises in the middle of submit, again and again, as Ctrl-C does."""

    def interrupt(*_):
        raise KeyboardInterrupt

    source = random.Random(1)
    before = signal.signal(signal.SIGALRM, interrupt)
    with Pipeline.launch(chain_plan, inflight=3) as pipeline:
        pipeline.run(batch())
        interrupted = 0
        try:
            for _ in range(300):
                signal.setitimer(signal.ITIMER_REAL, source.uniform(2e-5, 1.5e-3))
                try:
                    pipeline.submit(batch(), timeout=60)
                except KeyboardInterrupt:
                    interrupted += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interrupted
        wait_until(lambda: pipeline.admission.inside == 0, "all places free")
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


def test_a_pipeline_may_be_closed_in_a_callback(chain_plan):
    pipeline = Pipeline.launch(chain_plan)
    pipeline.submit(batch()).add_done_callback(lambda _: pipeline.close())
    wait_until(lambda: pipeline.ended, "the pipeline ends")
    pipeline.close()
    with pytest.raises(PipelineClosed):
        pipeline.run(batch())


def test_a_progress_callback_that_raises_does_not_stop_the_work(chain_plan):
    def wrong(_ready, _total):
        raise ValueError("a caller's mistake")

    with Pipeline.launch(chain_plan, progress=wrong) as pipeline:
        pipeline.scale(0, 2)
        wait_until(lambda: len([n for n in pipeline.nodes if n.state == "ready"]) == 3, "the second node is ready")
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork with threads is the point
def test_a_fork_cannot_use_its_parent_s_pipeline(chain_plan):
    with Pipeline.launch(chain_plan) as pipeline:
        child = os.fork()
        if child == 0:
            try:
                pipeline.submit(batch())
            except PipelineError as error:
                os._exit(0 if "fork" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(pipeline.run(batch(), timeout=60)["y"], expected(chain_plan, batch())["y"])


def test_a_pipeline_that_drains_says_so(chain_plan):
    with Pipeline.launch(chain_plan) as pipeline:
        pipeline.drain(60)
        assert "takes no more requests" in pipeline.trouble
