"""A pipeline whose device gets slower changes its plan by itself, or says what that would gain."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sleeping import Devices, SleepingLauncher
from waiting import wait_until

from onnxsplit import Pipeline
from onnxsplit.plan_files import load_plan
from runtime.recut.decision import RecutSettings
from runtime.recut.window import DriftSettings

TESTS = Path(__file__).parents[1]
NAMES = ["d0", "d1", "d2"]
OPS = 12


@pytest.fixture
def devices(tmp_path, monkeypatch) -> Devices:
    """Three devices of full speed; pipelines look at them in windows of one second."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS / "support", TESTS.parent))))  # for `sleeping`
    settings = partial(RecutSettings, drift=DriftSettings(window_s=1.0))
    monkeypatch.setattr("runtime.recut.rebalancer.RecutSettings", settings)
    (tmp_path / "speeds").mkdir()
    return Devices(tmp_path / "speeds", NAMES)


@pytest.fixture
def launch(tmp_path, devices):
    """Launches a pipeline of sleeping stages, one on each device."""
    plan = devices.plan(tmp_path, OPS)

    def one(rebalance: str) -> Pipeline:
        launcher = SleepingLauncher(load_plan(plan), devices, op_s=0.03)
        return Pipeline.launch(plan, launcher=launcher, rebalance=rebalance)

    return one


@contextmanager
def callers(pipeline: Pipeline, count: int = 6) -> Iterator[None]:
    """Threads that send requests, each with values of its own; at the end, all answers must have been right."""
    stop, wrong = threading.Event(), []

    def call(number: int) -> None:
        sent = np.full((1, 64), number, np.float32)
        while not stop.is_set():
            try:
                found = pipeline.run({"t0": sent})[f"t{OPS}"]
            except Exception as error:
                wrong.append(error)
                return
            if not np.array_equal(found, sent):
                wrong.append(found)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def ops(pipeline: Pipeline) -> dict[str, int]:
    """The number of ops on each device."""
    return {device: stage.ops for stage in pipeline.plan.stages for device in stage.devices}


def test_a_device_that_falls_to_half_gets_fewer_ops(launch, devices, caplog):
    caplog.set_level(logging.INFO)
    with launch("auto") as pipeline:
        assert ops(pipeline) == {"d0": 4, "d1": 4, "d2": 4}
        with callers(pipeline):
            wait_until(lambda: pipeline.recuts.drift, "learning the usual times")
            assert pipeline.recuts.generation == 1
            devices.set("d0", 0.5)
            wait_until(lambda: pipeline.recuts.phase == "loading", "the decision")
            wait_until(lambda: pipeline.recuts.results["kept"] == 1, "the change")
            assert pipeline.recuts.generation == 2
            assert ops(pipeline)["d0"] < 4
            assert sum(ops(pipeline).values()) == OPS
            wait_until(lambda: set(pipeline.recuts.drift) == set(NAMES), "learning the new usual times")
            assert len(pipeline.entrance.plans) == 1
    assert re.search(r"changing the plan.*device d0 runs at 0\.\d+ of its speed", caplog.text)


def test_advice_names_the_device_and_changes_nothing(launch, devices):
    with launch("advise") as pipeline:
        nodes = [node.pid for node in pipeline.nodes]
        with callers(pipeline):
            wait_until(lambda: pipeline.recuts.drift, "learning the usual times")
            devices.set("d1", 0.5)
            wait_until(lambda: "a new cut would answer" in pipeline.recuts.advice, "the advice")
            assert "device d1 runs at" in pipeline.recuts.advice
        recuts = pipeline.recuts
        assert recuts.generation == 1
        assert not any(recuts.results.values())
        assert recuts.phase == "steady"
        assert [node.pid for node in pipeline.nodes] == nodes
        assert ops(pipeline) == {"d0": 4, "d1": 4, "d2": 4}
