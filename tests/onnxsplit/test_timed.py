"""What runs of a model cost, on an idle and on a busy machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import build
import numpy as np
import psutil
import pytest

from onnxsplit.errors import ModelError
from onnxsplit.npz import save_npz
from onnxsplit.session import host_cores
from onnxsplit.timed import Runs, TimedModel, low_quartile, reused_workers, run_together
from onnxsplit.timed_worker import WorkerAnswer

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
    answer = WorkerAnswer(
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


def test_models_take_turns_in_one_process_that_ends_with_the_block(tmp_path):
    model, inputs = build.save(build.chain(2), tmp_path), tmp_path / "in.npz"
    save_npz(inputs, {"x": np.ones((2, 32), np.float32)})
    mine = psutil.Process()
    before = {child.pid for child in mine.children()}

    def workers() -> list[int]:
        return [child.pid for child in mine.children() if child.pid not in before]

    with reused_workers():
        with TimedModel(model, inputs, threads=1) as timed:
            timed.run(0.0)
            (first,) = workers()
        with TimedModel(model, inputs, threads=1) as timed, TimedModel(model, inputs, threads=1) as other:
            assert len(workers()) == 2
            assert first in workers()
            assert [len(runs.wall_ns) for runs in run_together([timed, other], 0.0)] == [2, 2]
        assert len(workers()) == 2
        with pytest.raises(ModelError), TimedModel(model, tmp_path / "none.npz", threads=1):
            pass
        assert len(workers()) == 1, "a process that failed takes no other model"
    assert workers() == []


def test_the_processor_time_around_runs_counts_as_this_programs(tmp_path):
    model, inputs = build.save(build.chain(2), tmp_path), tmp_path / "in.npz"
    save_npz(inputs, {"x": np.ones((2, 32), np.float32)})
    with TimedModel(model, inputs, threads=1) as timed:
        runs = timed.run(0.05, least=3)
        assert runs.used_ns >= sum(runs.cpu_ns) > 0
        (later,) = run_together([timed], 0.0)
        assert later.used_ns < runs.used_ns + 50 * MS, "only what was used since the last answer"
