"""The generator of load against real pipelines and servers."""

from __future__ import annotations

import os
import signal
import threading

import build
import numpy as np
import pytest

from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.load.loop import measure
from runtime.load.patterns import ClosedLoop, OpenLoop
from runtime.load.pipeline import PipelineTarget
from runtime.load.windows import Measuring

SHORT = Measuring(warmup_s=0.2, window_s=0.3, stability=10)


@pytest.fixture(scope="module")
def pipeline(chain_plan):
    with Pipeline.launch(chain_plan, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def target(pipeline):
    rows = [{"x": np.full((rows, 32), rows, np.float32)} for rows in (1, 2, 3)]
    return PipelineTarget(pipeline, rows)


def counted(pipeline) -> int:
    return pipeline.stats()[0].requests


def test_a_pipeline_answers_each_request_of_an_open_loop(target):
    point = measure(target, OpenLoop(per_s=100, poisson=True), Measuring(warmup_s=0, requests=60))
    assert point.latency.count == 60
    assert point.latency.p50_ns >= point.service.p50_ns > 0
    assert not point.failed


def test_a_pipeline_answers_a_closed_loop_of_more_requests_than_it_admits(target, pipeline):
    point = measure(target, ClosedLoop(concurrency=4 * pipeline.inflight), SHORT)
    assert point.latency.count > 3
    assert not point.failed


def test_a_number_of_requests_is_sent_and_counted_by_the_pipeline_too(target, pipeline):
    before = counted(pipeline)
    point = measure(target, ClosedLoop(concurrency=2), Measuring(warmup_s=0, requests=57))
    assert point.latency.count == 57
    assert counted(pipeline) - before == 57


def test_a_failing_request_is_a_failure_and_not_an_answer(tmp_path):
    plan = tmp_path / "m.plan"
    partition(build.save(build.failing(), tmp_path), stages=1, out=plan, costs="analytic", dims={"n": 3})
    with Pipeline.launch(plan, threads=1) as pipeline:
        inputs = [{"x": np.ones(size, np.float32)} for size in (3, 4)] + [{"nothing": np.ones(3, np.float32)}]
        point = measure(PipelineTarget(pipeline, inputs), OpenLoop(per_s=60), Measuring(warmup_s=0, requests=60))
    assert point.failures == {"StageFailed": 20, "InputError": 20}
    assert point.latency.count == 20


def test_ctrl_c_gives_what_was_measured_so_far(target):
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    endless = Measuring(warmup_s=0, window_s=0.2, stability=1e-9, most_windows=10_000)
    point = measure(target, OpenLoop(per_s=200), endless, progress=lambda _: begun.set())
    assert point.interrupted
    assert point.windows >= 1
    assert point.latency.count > 0
