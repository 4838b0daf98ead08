"""What runs of a model cost, on an idle and on a busy machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import build
import numpy as np
import pytest

from onnxsplit.npz import save_npz
from onnxsplit.session import host_cores
from onnxsplit.timed import Runs, TimedModel, _Answer, low_quartile

MS = 1_000_000


def busy_loops(stack, count):
    for _ in range(count):
        loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        stack.callback(loop.kill)


def test_a_run_in_one_thread_costs_its_processor_time():
    runs = Runs(wall_ns=[900, 500, 700, 800], cpu_ns=[400, 410, 420, 430], by_cpu=True)
    assert runs.cost_ns == 400


@pytest.mark.parametrize(
    ("delayed_ms", "waited", "cost_ms"), [(3_100, 11, 1_800), (2_000, 11, 4_900), (2_000, 0, 1_800)]
)
def test_a_long_run_that_waits_for_an_instant_costs_its_processor_time(tmp_path, delayed_ms, waited, cost_ms):
    """A run of 1.8 s beside two other processes, which gives its core up a few times for microseconds."""
    answer = _Answer(
        wall_ns=[4_900 * MS], cpu_ns=[1_800 * MS], caller_ns=[1_800 * MS], waited=waited, delayed_ns=delayed_ms * MS
    )
    assert TimedModel(tmp_path, tmp_path, threads=1)._runs(answer).cost_ns == cost_ms * MS


def test_a_run_in_threads_that_wait_for_cores_costs_its_part_of_the_work():
    assert Runs([900, 800, 950], [820, 800, 810], False, [410, 420, 430]).cost_ns == 410


def test_a_run_in_threads_never_costs_more_than_its_shortest_wall_time():
    assert Runs([400, 410, 430], [820, 800, 810], False, [500, 600, 700]).cost_ns == 400


def test_threads_beside_busy_processes_are_seen_to_wait_for_cores(tmp_path):
    model, inputs = build.save(build.chain(20, 512), tmp_path), tmp_path / "in.npz"
    save_npz(inputs, {"x": np.ones((256, 512), np.float32)})
    with ExitStack() as stack:
        busy_loops(stack, 2 * host_cores())
        runs = stack.enter_context(TimedModel(model, inputs, threads=max(2, host_cores()))).run(0.5, least=10)
    assert len(runs.shared_ns) == len(runs.wall_ns) >= 10
    assert all(0 < shared <= total for shared, total in zip(runs.shared_ns, runs.cpu_ns, strict=True))
    assert runs.cost_ns <= low_quartile(runs.wall_ns)
