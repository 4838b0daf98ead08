"""Changing the plan of a pipeline while it serves: nothing is lost or wrong, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import build
import numpy as np
import ports
import psutil
import pytest
from onnx import numpy_helper
from waiting import wait_until

import onnxsplit
from onnxsplit import InputError, Pipeline, PipelineClosed, RecutFailed, RecutRefused, StageUnavailable
from runtime.recut.phases import TRANSITIONS, RecutPhase
from runtime.transition_table import Machine

X = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, Path]:
    """Plans of one model: cut early, cut late, in three stages, and with one wrong weight."""
    folder = tmp_path_factory.mktemp("plans")
    model = build.save(build.chain(), folder)
    cuts = {"early": ["h0"], "late": ["h4"], "three": ["h1", "h3"]}
    found = {name: folder / f"{name}.plan" for name in cuts}
    for name, cut_at in cuts.items():
        onnxsplit.partition(model, out=found[name], cut_at=cut_at, effort="quick")
    wrong = build.chain()
    weight = numpy_helper.to_array(wrong.graph.initializer[2]).copy()
    weight[3, 3] += 0.5
    wrong.graph.initializer[2].CopyFrom(numpy_helper.from_array(weight, wrong.graph.initializer[2].name))
    (folder / "wrong").mkdir()
    found["wrong"] = folder / "wrong.plan"
    onnxsplit.partition(build.save(wrong, folder / "wrong"), out=found["wrong"], cut_at=["h4"], effort="quick")
    found["other"] = folder / "other.plan"
    onnxsplit.partition(build.chain(width=16), out=found["other"], effort="quick")
    return found


@pytest.fixture
def pipeline(plans):
    with Pipeline.launch(plans["early"], threads=1) as launched:
        yield launched


@contextmanager
def callers(pipeline: Pipeline, count: int = 4):
    """Threads that send requests, each with values of its own; yields the number of answers of each so far."""
    answered, problems, stop = [0] * count, [], threading.Event()
    inputs = [X * (number + 1) for number in range(count)]
    expected = [pipeline.run({"x": x})["y"] for x in inputs]

    def call(number: int) -> None:
        while not stop.is_set():
            try:
                found = pipeline.run({"x": inputs[number]})["y"]
            except Exception as error:
                problems.append(error)
                return
            if not np.allclose(found, expected[number], rtol=1e-4, atol=1e-5):
                problems.append(found)
                return
            answered[number] += 1

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(call, number) for number in range(count)]
        try:
            yield answered
        finally:
            stop.set()
            for each in running:
                each.result()
    assert not problems


def more(answered: list[int], count: int = 20) -> None:
    """Wait until every caller has got some more answers."""
    before = list(answered)
    wait_until(lambda: all(now >= then + count for now, then in zip(answered, before, strict=True)))


def test_requests_go_on_while_the_plan_changes(pipeline, plans):
    before = {node.pid for node in pipeline.nodes}
    with callers(pipeline) as answered:
        for name in ("three", "late", "early"):
            more(answered)
            recut = pipeline.recut(plans[name]).result(120)
            assert recut.kept
            assert recut.new != recut.old
            assert pipeline.plan == onnxsplit.load_plan(plans[name])
            more(answered)
    assert before.isdisjoint(node.pid for node in pipeline.nodes)
    assert len(pipeline.nodes) == 2
    assert pipeline.entrance.current.number == 4
    assert len(pipeline.entrance.plans) == 1
    assert pipeline.admission.inside == 0


def test_requests_of_an_event_loop_and_in_parts_go_on_too(pipeline, plans):
    batch = np.concatenate([X * number for number in range(1, 13)])
    expected = pipeline.run({"x": batch})["y"]
    assert pipeline.plan.tensors["x"].batch_axis == 0

    async def call() -> int:
        recut, answered = pipeline.recut(plans["three"]), 0
        while not (recut.done() and answered > 20):
            found = await asyncio.gather(*(pipeline.arun({"x": batch}) for _ in range(3)))
            assert all(np.allclose(one["y"], expected, rtol=1e-4, atol=1e-5) for one in found)
            answered += len(found)
        assert recut.result().kept
        return answered

    assert asyncio.run(call()) > 20
    maps = list(pipeline.map([{"x": X}] * 5))
    assert len(maps) == 5


def test_a_tensor_between_stages_can_be_asked_for_only_where_it_is_one(pipeline, plans):
    assert pipeline.run({"x": X}, outputs=["h0"])["h0"].shape == (1, 32)
    with callers(pipeline):
        pipeline.recut(plans["late"]).result(120)
    assert pipeline.run({"x": X}, outputs=["h4"])["h4"].shape == (1, 32)
    with pytest.raises(InputError, match=r"output 'h0' is unknown now: the model was cut elsewhere.*allowed: y, h4"):
        pipeline.run({"x": X}, outputs=["h0"])
    with pytest.raises(InputError, match="output 'nothing' is unknown; allowed"):
        pipeline.run({"x": X}, outputs=["nothing"])


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        (
            "other",
            RecutRefused,
            r"is a plan of another model: its 'x' is float32 \[batch, 16\], and this pipeline's is",
        ),
        ("wrong", RecutFailed, "is a plan of another model: the weight 'w2' has other values"),
    ],
)
def test_a_plan_with_other_answers_takes_no_request(pipeline, plans, name, error, what):
    nodes = [node.pid for node in pipeline.nodes]
    with callers(pipeline) as answered:
        with pytest.raises(error, match=what):
            pipeline.recut(plans[name]).result(120)
        more(answered)
    assert [node.pid for node in pipeline.nodes] == nodes
    assert len(pipeline.entrance.plans) == 1
    assert pipeline.recut(plans["late"]).result(120).kept  # it can be changed afterwards


def test_a_plan_whose_nodes_cannot_start_is_given_up(pipeline, plans, tmp_path):
    broken = tmp_path / "broken.plan"
    shutil.copytree(plans["late"], broken)
    file = broken / "stage1.onnx"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))  # the size is that of the plan, the content is not
    with callers(pipeline) as answered:
        with pytest.raises(RecutRefused, match=r"stage1.onnx: its SHA-256 is not the plan's"):
            pipeline.recut(broken).result(120)
        more(answered)
    with pytest.raises(RecutRefused, match=r"nothing.plan is not a plan directory: it is missing"):
        pipeline.recut(tmp_path / "nothing.plan").result(120)
    assert len(pipeline.entrance.plans) == 1


def test_wrong_arguments_are_refused_at_once(pipeline, plans):
    with pytest.raises(InputError, match="leave out plan, or leave out devices"):
        pipeline.recut(plans["late"], devices={"0": 0.5})
    for devices, what in [
        ({"0": 0}, "the speed of '0' must be a number from 1e-06 to 1e\\+06, not 0;"),
        ({"0": float("nan")}, "the speed of '0' must be a number from 1e-06 to 1e\\+06, not nan;"),
        ({0: 1.0}, "devices are named by text"),
        ([1.0], "devices must map names to speeds"),
    ]:
        with pytest.raises(InputError, match=what):
            pipeline.recut(devices=devices)
    with pytest.raises(InputError, match="must be a folder"):
        pipeline.recut(7)


def test_only_one_change_at_a_time(pipeline, plans):
    first = pipeline.recut(plans["late"])
    with pytest.raises(RecutRefused, match="is being changed already"):
        pipeline.recut(plans["three"])
    assert first.result(120).kept


class Watched(Machine):
    """A state machine that waits in one of its states until a test lets it go on."""

    def __init__(self, phase: RecutPhase) -> None:
        super().__init__("recut", TRANSITIONS, RecutPhase.STEADY)
        self.phase, self.reached, self.go_on = phase, threading.Event(), threading.Event()

    def go(self, change):
        state = super().go(change)
        if state is self.phase:
            self.reached.set()
            self.go_on.wait(60)
        return state


@pytest.mark.parametrize("phase", [RecutPhase.WARMING, RecutPhase.SWAPPED, RecutPhase.PROVING])
def test_a_pipeline_can_be_closed_in_every_phase(plans, phase):
    pipeline = Pipeline.launch(plans["early"], threads=1)
    watched = pipeline._recutter._machine = Watched(phase)
    recut = pipeline.recut(plans["late"])
    assert watched.reached.wait(60)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    time.sleep(0.05)
    watched.go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    with suppress(PipelineClosed):  # the plan may just have been kept
        assert recut.result(10).kept
    with pytest.raises(PipelineClosed):
        pipeline.recut(plans["late"])
    with pytest.raises(PipelineClosed):
        pipeline.run({"x": X})


def test_a_pipeline_can_be_closed_while_a_plan_loads(plans):
    pipeline = Pipeline.launch(plans["early"], threads=1)
    recut = pipeline.recut(plans["late"])
    wait_until(lambda: len(pipeline.entrance.plans) == 2)
    assert pipeline.recuts.phase == "loading"
    pipeline.close()
    with pytest.raises(PipelineClosed):
        recut.result(10)
    assert pipeline.recuts.phase == "ended"


def test_killed_nodes_of_both_plans_lose_nothing(pipeline, plans):
    killed = threading.Event()

    def kill() -> None:
        """Kill a node of the old plan, then one of the new plan as soon as it has started."""
        os.kill(pipeline.nodes[0].pid, signal.SIGKILL)
        wait_until(lambda: len(pipeline.entrance.plans) == 2)
        new = pipeline.entrance.plans[-1].coordinator
        wait_until(lambda: any(node.state == "ready" for node in new.nodes()))
        os.kill(next(node.pid for node in new.nodes() if node.state == "ready"), signal.SIGKILL)
        killed.set()

    with callers(pipeline) as answered:
        recut = pipeline.recut(plans["late"])
        threading.Thread(target=kill).start()
        assert killed.wait(60)
        try:
            kept = recut.result(120).kept
        except RecutFailed:  # the node died before the plan was ready, which counts as a failed start
            kept = False
        more(answered)
        if not kept:
            assert pipeline.recut(plans["late"]).result(120).kept
            more(answered)
    assert len(pipeline.incidents) >= 1


def test_a_change_is_refused_where_memory_is_short(pipeline, plans, monkeypatch):
    monkeypatch.setattr("runtime.recut.beside.free_memory_bytes", lambda: 10 << 20)
    with pytest.raises(RecutRefused, match=r"need about [0-9]+ MiB beside those that run, and 10 MiB are free"):
        pipeline.recut(plans["late"]).result(60)
    assert len(pipeline.entrance.plans) == 1


def test_replicas_by_stage_need_the_same_stages(plans):
    with Pipeline.launch(plans["early"], threads=1, replicas={0: 1, 1: 2}) as pipeline:
        with pytest.raises(RecutRefused, match="replicas by stage, and the new plan has 3 stages instead of 2"):
            pipeline.recut(plans["three"]).result(60)
        assert pipeline.recut(plans["late"]).result(120).kept
        assert len(pipeline.nodes) == 3


def test_a_dropped_pipeline_ends_what_it_has_begun(plans):
    pipeline = Pipeline.launch(plans["early"], threads=1)
    recut = pipeline.recut(plans["late"])
    door = pipeline.entrance
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del pipeline
    with pytest.raises(PipelineClosed):
        recut.result(60)
    wait_until(lambda: door.current.coordinator.ended)
    wait_until(lambda: len(door.plans) == 1)


def pipeline_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("onnxsplit-*"))


def test_a_plan_whose_pipeline_ends_before_it_starts_leaves_no_folder_or_descriptor(plans, monkeypatch):
    """The door says that it is closed. The old plan stays, so that its own descriptors hide nothing."""
    with Pipeline.launch(plans["early"], threads=1) as pipeline:
        folders, descriptors = pipeline_folders(), psutil.Process().num_fds()
        monkeypatch.setattr(pipeline.entrance, "add", lambda _: False)
        with pytest.raises(PipelineClosed):
            pipeline.recut(plans["late"]).result(60)
        wait_until(lambda: pipeline_folders() <= folders)
        wait_until(lambda: psutil.Process().num_fds() <= descriptors)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_caller_s_function_may_end_its_thread(pipeline, plans):
    recut = pipeline.recut(plans["late"])
    recut.add_done_callback(lambda _: sys.exit(3))
    assert recut.result(120).kept
    wait_until(lambda: pipeline.recuts.phase == "steady")
    assert pipeline.run({"x": X}, timeout=60)
    assert sum(pipeline.recuts.results.values()) == 1


def test_it_is_said_why_a_node_by_hand_does_not_start_its_successor(plans, tmp_path, free_port, python_environment):
    address = f"tcp://127.0.0.1:{free_port}"
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
    fixed = ["--bind", f"tcp://127.0.0.1:{ports.free_port()}"]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(subprocess.Popen([*command, *more], env=python_environment)) for more in ([], fixed)
        ]
        for node in nodes:
            stack.callback(node.kill)
        with Pipeline.listen(plans["early"], bind=address, start_timeout=40) as pipeline:
            with pytest.raises(RecutFailed, match=r"cannot start its successor: .*it listens at a fixed port"):
                pipeline.recut(plans["late"]).result(120)
            assert np.array_equal(pipeline.run({"x": X})["y"], pipeline.run({"x": X})["y"])
            assert len(pipeline.entrance.plans) == 1
            with pytest.raises(
                RecutFailed, match="it listens at a fixed port"
            ):  # the first successor is not in the way
                pipeline.recut(plans["late"]).result(120)
        assert [node.wait(30) for node in nodes] == [0, 0]


def test_a_new_plan_that_cannot_serve_is_taken_back(pipeline, plans, monkeypatch):
    """Its nodes die again and again while it is proved; requests that had entered it are answered by the old plan."""
    nodes = [node.pid for node in pipeline.nodes]
    answers = []
    recut = pipeline.recut(plans["late"])
    wait_until(lambda: pipeline.recuts.phase == "proving" or recut.done())
    new = pipeline.entrance.current.coordinator
    deaths = threading.Event()

    def kill() -> None:
        while not deaths.is_set():
            for node in new.nodes():
                if node.stage == 1 and node.pid:
                    with suppress(ProcessLookupError):
                        os.kill(node.pid, signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = [pipeline.submit({"x": X}) for _ in range(3)]
    try:
        with pytest.raises(RecutFailed, match="the new plan cannot serve: stage 1 has no node that is ready"):
            recut.result(120)
    finally:
        deaths.set()
        killer.join()
    assert [node.pid for node in pipeline.nodes] == nodes
    assert pipeline.run({"x": X})["y"].shape == (1, 32)
    for answer in answers:
        with suppress(StageUnavailable):  # refused when the last node of the stage was given up
            assert answer.result(60)["y"].shape == (1, 32)


def test_a_tensor_between_stages_that_somebody_asks_for_is_no_obstacle(pipeline, plans):
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            with suppress(InputError):  # once the plan has changed
                pipeline.run({"x": X}, outputs=["h0"])

    caller = threading.Thread(target=call)
    caller.start()
    try:
        assert pipeline.recut(plans["late"]).result(120).kept
    finally:
        stop.set()
        caller.join()


def test_draining_waits_for_what_has_entered_and_ends_a_change(pipeline, plans):
    recut = pipeline.recut(plans["late"])
    wait_until(lambda: len(pipeline.entrance.plans) == 2)
    future = pipeline.submit({"x": X})
    pipeline.drain(60)
    assert future.done()
    with pytest.raises(PipelineClosed):
        recut.result(60)
    with pytest.raises(PipelineClosed):
        pipeline.run({"x": X})


def test_the_number_of_nodes_stays_where_the_caller_has_set_it(pipeline, plans):
    pipeline.scale(0, 2)
    wait_until(lambda: sum(node.state == "ready" for node in pipeline.nodes) == 3)
    recut = pipeline.recut(plans["late"])
    with pytest.raises(RecutRefused, match=r"is being changed \(loading\); scale it when that is over"):
        pipeline.scale(1, 2)
    assert recut.result(120).kept
    assert [sum(node.stage == stage for node in pipeline.nodes) for stage in (0, 1)] == [2, 1]
    pipeline.scale(1, 2)


def test_functions_that_are_called_when_the_plan_changes_may_fail_or_close_it(pipeline, plans):
    def fail() -> None:
        raise ValueError("a fault of the caller's")

    pipeline.on_recut(fail)
    assert pipeline.recut(plans["late"]).result(120).kept
    assert len(pipeline.entrance.plans) == 1
    pipeline.on_recut(pipeline.close)
    recut = pipeline.recut(plans["early"])
    with pytest.raises(PipelineClosed):
        recut.result(120)
