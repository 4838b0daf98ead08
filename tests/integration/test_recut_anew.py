"""Planning a pipeline's model anew while it serves: the plan stays if it is better, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import pytest
from onnx import TensorProto, helper
from sleeping import Devices, SleepingLauncher
from waiting import wait_until

import onnxsplit
from onnxsplit import InputError, Pipeline, PipelineClosed, RecutFailed, RecutRefused
from runtime.launch.local import LocalLauncher
from runtime.recut import warming
from runtime.recut.plan_folder import PlanFolder

X = np.arange(64, dtype=np.float32)[None]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of plans that are made while a pipeline serves, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnxsplit" / "recuts"


@pytest.fixture
def sleeping(tmp_path, monkeypatch):
    """A pipeline of twelve ops of 5 ms in three stages on three devices, and the speeds of these."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[up] / name) for up, name in ((1, "support"), (2, "")))
    )
    (tmp_path / "speeds").mkdir()
    devices = Devices(tmp_path / "speeds", ["d0", "d1", "d2"])
    folder = devices.plan(tmp_path)
    launcher = SleepingLauncher(onnxsplit.load_plan(folder), devices, op_s=0.005)
    with Pipeline.launch(folder, launcher=launcher) as pipeline:
        yield pipeline, devices


@contextmanager
def busy(pipeline: Pipeline):
    """Requests in flight in every stage, whose answers are checked."""
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            if not np.array_equal(pipeline.run({"t0": X})["t12"], X):
                wrong.append(True)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong


def ops(pipeline: Pipeline) -> list[int]:
    return [stage.ops for stage in pipeline.plan.stages]


def test_a_slow_device_gets_fewer_ops(sleeping, cache):
    pipeline, devices = sleeping
    devices.set("d0", 0.4)
    with busy(pipeline):
        wait_until(lambda: sum(node.requests for node in pipeline.stats()) > 30)
        recut = pipeline.recut().result(120)
        assert recut.kept
        assert recut.predicted_gain > 1.2
        assert recut.measured_gain is not None
        slow = next(stage for stage in pipeline.plan.stages if stage.device == "d0")
        assert slow.ops < 4
        assert sum(ops(pipeline)) == 12
        assert len(list(cache.glob("*/new.plan"))) == 1
    pipeline.close()
    assert list(cache.iterdir()) == []


def test_a_plan_that_turns_out_worse_is_taken_back(sleeping, cache, monkeypatch):
    pipeline, _ = sleeping
    nodes = [node.pid for node in pipeline.nodes]
    wrong = {"d0": 0.2}, [20_000_000] * 3
    monkeypatch.setattr("runtime.recut.recutter.measured", lambda *_: wrong)
    with busy(pipeline):
        recut = pipeline.recut().result(120)
        assert not recut.kept
        assert recut.predicted_gain > 1.2
        assert recut.measured_gain < 0.97
        assert "the old plan comes back" in recut.why
        assert ops(pipeline) == [4, 4, 4]
        assert [node.pid for node in pipeline.nodes] == nodes  # they have waited
        assert len(pipeline.entrance.plans) == 1
    assert pipeline.recuts.results["rolled_back"] == 1
    assert list(cache.iterdir()) == []
    assert np.array_equal(pipeline.run({"t0": X})["t12"], X)


def test_nothing_changes_where_no_plan_is_better(sleeping, cache):
    pipeline, _ = sleeping
    nodes = [node.pid for node in pipeline.nodes]
    recut = pipeline.recut(devices={"d0": 1.0}).result(60)
    assert (recut.kept, recut.new) == (False, recut.old)
    assert "no cut of the model is better" in recut.why
    assert [node.pid for node in pipeline.nodes] == nodes
    assert list(cache.iterdir()) == []


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    onnxsplit.partition(build.save(build.chain(24, 256), folder), stages=2, out=folder / "c.plan", costs="analytic")
    return folder / "c.plan"


def test_a_plan_that_cannot_be_made_or_kept_changes_nothing(chain, tmp_path, monkeypatch):
    with Pipeline.launch(chain, threads=1) as pipeline:
        with pytest.raises(InputError, match="'nobody' is neither a device nor a host of the plan; these are 0, 1"):
            pipeline.recut(devices={"nobody": 0.5})
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(RecutFailed, match=r"cannot be kept in .*/file/onnxsplit/recuts: .*XDG_CACHE_HOME"):
            pipeline.recut(devices={"0": 0.3}).result(60)
        assert pipeline.recuts.phase == "steady"
        assert pipeline.recuts.results["failed"] == 1
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert pipeline.recut(devices={"0": 0.3}).result(60).kept


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system")
def test_a_full_disk_leaves_nothing_behind(chain, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(small))
        with Pipeline.launch(chain, threads=1) as pipeline:
            with pytest.raises(RecutFailed, match="No space left on device"):
                pipeline.recut(devices={"0": 0.3}).result(60)
            assert list((small / "onnxsplit" / "recuts").iterdir()) == []
            assert pipeline.run({"x": np.ones((1, 256), np.float32)})["y"].shape == (1, 256)
    finally:
        subprocess.run(["umount", small], check=True)


def test_planning_is_given_up_when_the_pipeline_closes(chain, cache):
    pipeline = Pipeline.launch(chain, threads=1)
    recut = pipeline.recut(devices={"0": 0.3})
    pipeline.close()
    with pytest.raises(PipelineClosed):
        recut.result(10)
    assert not cache.exists() or list(cache.iterdir()) == []


class Plain:
    """A launcher of a user's, which cannot start nodes beside others."""

    def __init__(self) -> None:
        self._own = LocalLauncher(memory_bytes=0)
        self.rendezvous = self._own.rendezvous

    def start(self, **words):
        return self._own.start(**words)

    def profile(self, stage, replica):
        return self._own.profile(stage, replica)

    def close(self, *, keep_logs):
        self._own.close(keep_logs=keep_logs)


def test_a_launcher_that_cannot_start_a_second_plan_is_named(chain):
    with (
        Pipeline.launch(chain, threads=1, launcher=Plain()) as pipeline,
        pytest.raises(RecutRefused, match="started by a Plain, which has no method beside"),
    ):
        pipeline.recut(chain).result(60)


def test_plans_of_killed_processes_are_removed(cache, tmp_path):
    program = (
        "import os, signal; from runtime.recut.plan_folder import PlanFolder; "
        "kept = PlanFolder(lambda path: path.mkdir()); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([os.sys.executable, "-c", program], env={**os.environ}, check=False)
    (left,) = cache.glob("*/new.plan")
    for lock in cache.glob("*.lock"):
        os.utime(lock, (0, 0))
    own = PlanFolder(lambda path: path.mkdir())
    assert own.plan is not None
    assert not left.exists()
    assert {each.stem for each in cache.iterdir()} == {own.plan.parent.name}
    own.close()
    own.close()
    assert list(cache.iterdir()) == []


def test_random_answers_are_known_even_if_two_runs_agree_by_chance(monkeypatch):
    numbers = iter([1.0, 1.0, 0.0])
    monkeypatch.setattr(warming, "_answer", lambda *_: {"y": np.float32([next(numbers)]), "sure": np.float32([2])})
    expected = {"y": np.float32([1]), "sure": np.float32([2])}
    own = warming._own_differences(None, warming.Sample({}, ("y",)), {"y": expected["y"]}, 1e-3, lambda: False)
    assert own["y"] > 1e-3
    numbers = itertools.repeat(1.0)
    own = warming._own_differences(None, warming.Sample({}, ("y", "sure")), expected, 1e-3, lambda: False)
    assert own == {"y": 0.0, "sure": 0.0}


def test_answers_that_no_two_runs_share_are_not_compared(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("RandomNormalLike", ["h"], ["noise"]),
        helper.make_node("Add", ["h", "noise"], ["sum"]),
        helper.make_node("Neg", ["sum"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    model = build.save(build.model(nodes, ends[:1], ends[1:]), tmp_path)
    for name in ("h", "sum"):
        onnxsplit.partition(model, out=tmp_path / f"{name}.plan", cut_at=[name], costs="analytic")
    with Pipeline.launch(tmp_path / "h.plan", threads=1) as pipeline:
        assert pipeline.recut(tmp_path / "sum.plan").result(60).kept
