"""A short form of benchmarks/faults/soak.py: nodes are killed and stopped under load, and every answer is right."""

from __future__ import annotations

import os
import random
import signal

import build
import numpy as np

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime import Pipeline
from runtime.timings import Timings

KILLS, STOPS = 5, 2


def test_nodes_killed_and_stopped_at_random_under_load_lose_nothing(tmp_path):
    partition(build.save(build.chain(12), tmp_path), stages=3, out=tmp_path / "m.plan", costs="analytic")
    plan, choices = load_plan(tmp_path / "m.plan"), random.Random(0)
    inputs = [{"x": np.random.default_rng(n).standard_normal((2, 32)).astype(np.float32)} for n in range(8)]
    wanted = [run_stages(tmp_path / "m.plan", plan, x, threads=1)["y"] for x in inputs]
    signals = [signal.SIGKILL] * KILLS + [signal.SIGSTOP] * STOPS
    choices.shuffle(signals)
    timings = Timings(beat_s=0.2, silence_s=1.5)
    with Pipeline.launch(tmp_path / "m.plan", replicas=2, timings=timings, inflight=8) as pipeline:
        answered, harmed = 0, set()
        pending = [(n % 8, pipeline.submit(inputs[n % 8])) for n in range(8)]
        while signals or len(pipeline.incidents) < len(harmed) or not all(n.state == "ready" for n in pipeline.nodes):
            number, future = pending.pop(0)
            assert np.array_equal(future.result(60)["y"], wanted[number])
            answered += 1
            pending.append((answered % 8, pipeline.submit(inputs[answered % 8])))
            ready = [node.pid for node in pipeline.nodes if node.state == "ready" and node.pid not in harmed]
            if signals and ready and answered >= 20 * (len(harmed) + 1):
                victim = choices.choice(ready)
                os.kill(victim, signals.pop())
                harmed.add(victim)
        for number, future in pending:
            assert np.array_equal(future.result(60)["y"], wanted[number])
        assert len(harmed) == KILLS + STOPS
        assert pipeline.lent_bytes == 0
        assert sum(stats.restarts for stats in pipeline.stats()) >= len(harmed)
