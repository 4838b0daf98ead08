"""Whether a cut pays: the verdict of a plan, the overhead of requests, and the samples that times come from."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import build
import msgspec
import pages
import pytest
from click.testing import CliRunner
from waiting import wait_until

from onnxsplit import host_costs
from onnxsplit.cli import cli
from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.effort import EFFORTS
from onnxsplit.errors import ModelError
from onnxsplit.machine_load import CpuTimes, process_needed_s
from onnxsplit.partitioner import (
    CALLER,
    DeviceKind,
    Effort,
    Overhead,
    Partition,
    Problem,
    Transfer,
    line_up,
    lower_bound,
    score,
    search,
)
from onnxsplit.plan import TYPICAL_HOST
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.planning.sampling import BETWEEN_PROCESSES, LEAST_INTERVAL, Samples, spread, take_samples
from onnxsplit.planning.target import alike, of_cluster
from onnxsplit.planning.verdict import verdict
from onnxsplit.planning.whole_sessions import SessionTimes
from onnxsplit.timed import Runs

MS = 1_000_000


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    return partition(build.save(build.chain(), folder), stages=2, out=folder / "m.plan", costs="analytic")


def predicted(plan, bottleneck_ns: int, whole_ns: int, **changes):
    """The plan with another bottleneck and another time of the whole model."""
    prediction = msgspec.structs.replace(
        plan.prediction, bottleneck_ns=bottleneck_ns, throughput_per_s=1e9 / bottleneck_ns, latency_ns=2 * bottleneck_ns
    )
    costs = msgspec.structs.replace(plan.costs, whole_time_ns=whole_ns)
    return msgspec.structs.replace(plan, prediction=prediction, costs=costs, **changes)


def sessions(one_ms: float, wide_ms: float, copies_ms: float) -> SessionTimes:
    return SessionTimes(
        one_ns=int(one_ms * MS), wide_threads=2, wide_ns=int(wide_ms * MS), copies=2, copies_ns=int(copies_ms * MS),
        drift=0.0, interval=0.01, disturbed=0.0,
    )  # fmt: skip


def target(**changes):
    return replace(alike(2, **changes), host=TYPICAL_HOST)


def test_a_cut_that_pays_is_compared_with_each_other_way(plan):
    found = verdict(predicted(plan, 41 * MS, 76 * MS), sessions(76, 43, 77), target())
    assert found is not None
    assert found.text == (
        "2 stages: 1.85 x one session with one thread, 1.05 x one session with 2 threads; 2 replicas: 1.96 x."
    )
    assert found.cut_pays
    assert [(way.kind, way.count, way.threads, way.source) for way in found.ways] == [
        ("stages", 2, 1, "predicted"),
        ("session", 1, 1, "measured"),
        ("session", 1, 2, "measured"),
        ("replicas", 2, 1, "predicted"),
    ]


def test_a_cut_that_loses_says_what_to_do_instead(plan):
    found = verdict(predicted(plan, 343_000, 151_000), sessions(0.151, 0.151, 0.151), target())
    assert found is not None
    assert not found.cut_pays
    assert found.text == (
        "Cutting makes this slower here (0.151 -> 0.343 ms a request). Keep it whole, in one session with one thread."
    )


def test_the_page_shows_the_verdicts_of_a_cut_that_pays_and_of_one_that_loses(plan):
    texts = [
        verdict(predicted(plan, 41 * MS, 76 * MS), sessions(76, 43, 77), target()).text,
        verdict(predicted(plan, 343_000, 151_000), sessions(0.151, 0.151, 0.151), target()).text,
    ]
    shown = pages.block_of("docs/cutting.md", "2 stages: ").splitlines()
    assert all(re.fullmatch(pages.pattern(line), text) for line, text in zip(shown, texts, strict=True))


def test_replicas_are_advised_where_they_beat_a_cut_that_loses(plan):
    found = verdict(predicted(plan, 9 * MS, 8 * MS), sessions(8, 8, 8.1), target())
    assert found is not None
    assert found.text.endswith("or use --parallel data (2 replicas: 1.84 x).")
    assert not found.cut_pays


def with_stages(plan, *replicas: int):
    """The plan with one stage for each number of replicas."""
    stages = tuple(msgspec.structs.replace(plan.stages[0], index=i, replicas=n) for i, n in enumerate(replicas))
    return msgspec.structs.replace(plan, stages=stages)


@pytest.mark.parametrize(
    ("replicas", "name"),
    [((1,), "1 stage"), ((2,), "2 replicas"), ((1, 1), "2 stages"), ((2, 1), "2 stages on 3 nodes")],
)
def test_a_verdict_names_the_plan_by_its_stages_and_replicas(plan, replicas, name):
    found = verdict(predicted(with_stages(plan, *replicas), 41 * MS, 76 * MS), sessions(76, 43, 77), target())
    assert found is not None
    assert found.text.startswith(f"{name}: 1.85 x one session with one thread")


@pytest.mark.parametrize(("replicas", "head"), [(1, "1 stage is slower"), (2, "2 replicas are slower")])
def test_a_plan_of_one_stage_that_loses_is_not_called_a_cut(plan, replicas, head):
    found = verdict(predicted(with_stages(plan, replicas), 343_000, 151_000), sessions(0.151, 0.15, 0.151), target())
    assert found is not None
    assert found.text == (
        f"{head} here than one session that is called directly (0.151 -> 0.343 ms a request). Keep it whole, in one "
        "session with one thread."
    )


@pytest.mark.parametrize(("wide_ms", "threads"), [(0.146, "one thread"), (0.1, "2 threads")])
def test_a_session_with_more_threads_is_advised_only_if_it_is_clearly_faster(plan, wide_ms, threads):
    found = verdict(predicted(plan, 343_000, 151_000), sessions(0.151, wide_ms, 0.151), target())
    assert found is not None
    assert found.text.endswith(f"Keep it whole, in one session with {threads}.")


def test_a_model_that_does_not_fit_on_a_device_must_be_cut(plan):
    limit = plan.costs.whole_peak_memory_bytes - 1
    found = verdict(predicted(plan, 90 * MS, 76 * MS), sessions(76, 40, 77), target(max_memory_bytes=limit))
    assert found is not None
    assert found.text == "The whole model does not fit on one device, so it must be cut."
    assert found.cut_pays, "no way that fits is faster"
    assert [way.fits for way in found.ways] == [True, False, False, False]


def test_devices_of_a_cluster_run_the_whole_model_at_their_speeds(plan):
    cluster = Cluster((Device("slow", "a", speed=1.0), Device("fast", "b", speed=4.0)), {}, caller="a")
    found = verdict(
        predicted(plan, 41 * MS, 80 * MS), sessions(80, 43, 77), replace(of_cluster(cluster), host=TYPICAL_HOST)
    )
    assert found is not None
    _, session, replicas = found.ways
    assert session.latency_ns == 20 * MS
    assert session.source == "predicted"
    assert replicas.throughput_per_s == pytest.approx(1 / 0.08 + 1 / 0.02, rel=0.02)


def test_replicas_behind_a_slow_link_wait_for_their_inputs(plan):
    """Inputs and outputs of 64 kB take 64 s on the way to the second device, and its run 80 ms."""
    shape = msgspec.structs.replace(plan.tensors["x"], shape=(1, 8_000))
    wide = msgspec.structs.replace(plan, tensors={**plan.tensors, "x": shape, plan.outputs[0]: shape})
    links = {("a", "b"): Link(0, 1_000)}
    cluster = Cluster((Device("near", "a"), Device("far", "b")), links, caller="a")
    found = verdict(predicted(wide, 79 * MS, 80 * MS), None, replace(of_cluster(cluster), host=TYPICAL_HOST))
    assert found is not None
    assert found.ways[-1].throughput_per_s == pytest.approx(1 / 0.08, rel=0.01)
    assert found.cut_pays


def test_the_plan_of_a_measured_model_has_a_verdict_and_an_interval(tmp_path):
    model = build.save(build.chain(), tmp_path)
    done = CliRunner().invoke(cli, ["partition", str(model), "-o", str(tmp_path / "m.plan")], catch_exceptions=False)
    plan = load_plan(tmp_path / "m.plan")
    assert plan.verdict is not None
    assert plan.costs.interval is not None
    assert plan.costs.interval > BETWEEN_PROCESSES
    assert not plan.verdict.cut_pays, "a chain of a few small ops is faster whole"
    assert plan.verdict.text.startswith("Cutting makes this slower here (")
    assert plan.verdict.text in done.output.splitlines()


def test_a_plan_does_not_need_the_sessions_that_it_is_compared_with(tmp_path, monkeypatch):
    """The memory may end where the whole model is loaded beside the stages."""

    def refuse(self, threads):
        raise ModelError("no memory")

    monkeypatch.setattr("onnxsplit.planning.whole_sessions.WholeSessions._session", refuse)
    plan = partition(build.save(build.chain(), tmp_path), stages=2, out=tmp_path / "m.plan", effort="quick")
    assert plan.costs.source == "measured"
    assert plan.verdict is not None
    assert [way.source for way in plan.verdict.ways if way.kind == "session"] == ["predicted"]


def small_problem(times: tuple[int, ...], overhead: Overhead | None, devices: int = 2) -> Problem:
    flows = [Transfer(CALLER, (0,), 0)]
    flows += [Transfer(atom, (atom + 1,), 0) for atom in range(len(times) - 1)]
    flows.append(Transfer(len(times) - 1, (), 0, to_caller=True))
    return Problem((DeviceKind(times),), (0,) * devices, tuple(flows), link=Link(0, 10**9), overhead=overhead)


def test_a_request_occupies_each_node_and_the_cores_of_the_host():
    overhead = Overhead(node_ns=10, caller_ns=50, threads=(1, 1), cores=2)
    figures = score(small_problem((100, 100), overhead), Partition((0, 1), ((0,), (1,))))
    assert figures.stage_ns == (110, 110)
    assert figures.host_ns == (110 + 110 + 50) // 2
    assert figures.bottleneck_ns == 135
    assert figures.latency_ns == 220


def test_more_stages_than_cores_share_the_cores_and_take_longer():
    overhead = Overhead(node_ns=0, caller_ns=0, threads=(1,) * 4, cores=2)
    figures = score(small_problem((100,) * 4, overhead, 4), Partition((0, 1, 2, 3), ((0,), (1,), (2,), (3,))))
    assert max(figures.stage_ns) == 100
    assert figures.bottleneck_ns == 240
    replicas = score(small_problem((400,), overhead, 4), Partition((0,), ((0, 1, 2, 3),)))
    assert replicas.bottleneck_ns == 200


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_the_bound_with_overhead_is_never_above_the_best_cut(stages, cores):
    overhead = Overhead(node_ns=7, caller_ns=5, threads=(1,) * stages, cores=cores)
    problem = small_problem((30, 10, 20, 40), overhead, stages)
    found = search(problem, line_up(problem, stages), Effort(seconds=None))
    assert found.bound == found.score.value, "the search proves its result"
    assert lower_bound(problem, line_up(problem, stages)) <= found.score.value
    assert found.score == score(problem, found.partition)


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_holds_where_the_cores_are_the_limit(seed):
    """The host's cores are charged with transfers, too: the bound must not be above what any cut reaches."""
    chance = random.Random(seed)
    atoms, stages = 6, chance.choice([2, 3])
    flows = [Transfer(CALLER, (0,), chance.randrange(9))]
    for atom in range(atoms - 1):
        readers = tuple(
            sorted(chance.sample(range(atom + 1, atoms), k=min(atoms - 1 - atom, chance.choice([0, 1, 2]))))
        )
        flows.append(Transfer(atom, readers, chance.randrange(1, 40), to_caller=chance.random() < 0.2))
    flows.append(Transfer(atoms - 1, (), 3, to_caller=True))
    problem = Problem(
        (DeviceKind(tuple(chance.randrange(1, 30) for _ in range(atoms))),), (0,) * stages, tuple(flows),
        link=Link(chance.randrange(5), 10**9),
        overhead=Overhead(node_ns=chance.randrange(9), caller_ns=chance.randrange(50), threads=(1,) * stages, cores=1),
    )  # fmt: skip
    devices = tuple((stage,) for stage in range(stages))
    edges = [(flow.writer, reader) for flow in flows if flow.writer != CALLER for reader in flow.readers]
    best = min(
        score(problem, Partition(stage_of, devices)).value
        for stage_of in itertools.product(range(stages), repeat=atoms)
        if len(set(stage_of)) == stages and all(stage_of[one] <= stage_of[other] for one, other in edges)
    )
    found = search(problem, line_up(problem, stages), Effort(seconds=None))
    assert found.bound <= best <= found.score.value


def test_fewer_stages_are_taken_where_more_would_only_cost_the_cores(tmp_path):
    cluster = Cluster(tuple(Device(f"cpu{number}") for number in range(4)), {})
    file = tmp_path / "cluster.toml"
    file.write_text(cluster.to_toml())
    plan = partition(build.save(build.chain(), tmp_path), cluster=file, out=tmp_path / "m.plan", costs="analytic")
    assert len(plan.stages) == 1, "the ops of the chain take less than a request costs a node"


def test_samples_that_are_apart_widen_the_interval():
    assert spread([100, 100, 100]) == LEAST_INTERVAL
    assert spread([100, 110, 150, 100, 100]) == pytest.approx(0.1), "one disturbed sample does not widen it"
    assert spread([100, 110]) == pytest.approx(0.2), "two samples tell less"
    assert Samples((((100, 100),), ((10, 20),)), 0.0).spread == pytest.approx(2.0)
    assert Samples((((100, 104, 100),),), 0.0).interval == pytest.approx(0.05), "other processes differ by 3 %"
    assert Samples((((100, 100, 100),),), 1.0).interval == pytest.approx(0.086, abs=1e-3), "others use the caches"


class _Model:
    """A timed model whose runs take the given times in turn."""

    def __init__(self, times_ns: list[int]) -> None:
        self.times_ns = times_ns
        self.taken = 0


def test_samples_are_taken_in_turns_and_again_where_they_are_far_apart(monkeypatch):
    steady, unsteady = _Model([100]), _Model([100, 300])
    order = []

    def together(models, seconds, *, least):
        order.append(models[0])
        for model in models:
            model.taken += 1
        times = [model.times_ns[model.taken % len(model.times_ns)] for model in models]
        return [Runs([time_ns], [time_ns], by_cpu=True) for time_ns in times]

    monkeypatch.setattr("onnxsplit.planning.sampling.run_together", together)
    budget = replace(EFFORTS["normal"], samples=4)
    first = take_samples([[steady], [steady]], budget)
    assert (len(first.costs_ns[0][0]), first.typical_ns(0)) == (4, (100,))
    order.clear()
    second = take_samples([[steady], [unsteady]], budget)
    assert len(second.costs_ns[1][0]) == 8
    assert order[:4] == [steady, unsteady, steady, unsteady]
    assert second.typical_ns(1) == (100,)


def test_a_slow_model_is_run_once_for_each_sample_and_its_first_run_counts(monkeypatch):
    model = _Model([10**10])

    def together(models, seconds, *, least):
        model.taken += 1
        return [Runs([10**10], [10**10], by_cpu=True)]

    monkeypatch.setattr("onnxsplit.planning.sampling.run_together", together)
    assert len(take_samples([[model]], EFFORTS["normal"]).costs_ns[0][0]) == model.taken == 2


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(("run_s", "counted"), [(0.11, (4, 2)), (0.16, (3, 1)), (0.3, (2, 1))])
def test_a_run_of_a_tenth_of_a_second_gets_more_samples_without_its_first_run(monkeypatch, run_s, counted, again):
    times = iter([run_s + 0.002, *[run_s] * 20])

    def together(models, seconds, *, least):
        time_ns = round(next(times) * 1e9)
        return [Runs([time_ns], [time_ns], by_cpu=True)]

    monkeypatch.setattr("onnxsplit.planning.sampling.run_together", together)
    budget = replace(EFFORTS["normal"], samples=5, least_samples=2)
    (samples,) = take_samples([[_Model([])]], budget, again=again).costs_ns[0]
    first_counts = run_s == 0.3
    assert len(samples) == counted[0 if again else 1]
    assert set(samples[first_counts:]) <= {round(run_s * 1e9)}


def test_the_load_of_others_is_what_this_program_did_not_use():
    before, after = CpuTimes(10.0, 1.0, 100.0), CpuTimes(25.0, 2.0, 120.0)
    assert after.busy_share_since(before, own_s=6.0) == pytest.approx(0.5)
    assert after.stolen_share_since(before) == pytest.approx(0.05)
    assert after.idle_s_since(before) == pytest.approx(4.0)
    assert before.busy_share_since(before) == 0.0


def test_measured_costs_of_this_host_are_kept_and_others_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host_costs.host_costs() == TYPICAL_HOST
    mine = msgspec.structs.replace(TYPICAL_HOST, source="measured", node_ns=1)
    file = host_costs.keep_host_costs(mine)
    assert file == tmp_path / "onnxsplit" / "host.json"
    assert host_costs.host_costs() == mine
    file.write_text(file.read_text().replace("cores", "other cores"))
    assert host_costs.host_costs() == TYPICAL_HOST
    file.write_text("{")
    assert host_costs.host_costs() == TYPICAL_HOST


@pytest.mark.parametrize(
    "change",
    [{"bytes_per_s": 0}, {"bytes_per_s": 0.5}, {"node_ns": 2**53 - 1}, {"tensor_ns": 2**53 - 1}, {"hop_ns": -1}],
)
def test_measured_costs_that_cannot_be_true_are_not_used(tmp_path, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = host_costs.keep_host_costs(msgspec.structs.replace(TYPICAL_HOST, source="measured", **change))
    assert file.is_file()
    assert host_costs.host_costs() == TYPICAL_HOST


def test_a_file_of_costs_that_is_no_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = host_costs.keep_host_costs(msgspec.structs.replace(TYPICAL_HOST, source="measured"))
    assert host_costs.host_costs().source == "measured"
    file.write_bytes(file.read_bytes() + b" " * (1 << 20))
    assert host_costs.host_costs() == TYPICAL_HOST
    file.unlink()
    os.mkfifo(file)  # reading it would wait for a writer
    assert host_costs.host_costs() == TYPICAL_HOST


def test_doctor_measures_what_requests_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = CliRunner().invoke(cli, ["doctor", "--measure", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["host_costs"]["source"] == "measured"
    assert 1_000 < found["host_costs"]["node_ns"] < 100 * MS
    assert Path(found["host_costs_file"]).is_file()
    assert 0 <= found["doctor"]["busy_share"] <= 1


def test_the_processor_time_of_a_process_grows_as_it_works_and_is_unknown_once_it_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        wait_until(lambda: (process_needed_s(child.pid) or 0.0) > 0.05)
    finally:
        child.kill()
        child.wait()
    assert process_needed_s(child.pid) is None
