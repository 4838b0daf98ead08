"""Changing the plan of a pipeline while it serves: nothing is lost, wrong or answered twice, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from waiting import wait_until

import onnxsplit
from onnxsplit import InputError, Pipeline, PipelineClosed, RecutFailed, RecutRefused
from runtime.recut.phases import RecutPhase

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
