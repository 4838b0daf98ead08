"""Placing plans on devices other than they were made for, and the effect of links and of the caller's host."""

from __future__ import annotations

import itertools

import build
import msgspec.structs
import pytest

from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import ClusterError, PartitionError, PlanError
from onnxsplit.partitioner import DeviceKind, Partition, Problem, Transfer, line_up, score, search
from onnxsplit.plan import CALLER
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.place import place, placed
from onnxsplit.planning.planner import partition

SLOW, FAST = Link(100_000, 10_000_000), Link(1_000, 10_000_000_000)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    partition(build.save(build.chain(12, 64), folder), stages=3, out=folder / "m.plan", costs="analytic")
    return folder / "m.plan"


def cluster(*hosts: str, links=(), speeds=None, **options) -> Cluster:
    devices = tuple(
        Device(f"d{number}", host, speed=(speeds or {}).get(host, 1.0)) for number, host in enumerate(hosts)
    )
    return Cluster(devices, {(min(pair), max(pair)): link for *pair, link in links}, **options)


def test_stages_stand_together_where_links_between_hosts_are_slow(plan):
    links = [("a", "b", SLOW), ("a", "a", FAST), ("b", "b", FAST)]
    found = placed(load_plan(plan), cluster("a", "b", "b", "b", "a", links=links))
    assert {host for stage in found.stages for host in stage.hosts} == {"b"}


def test_a_plan_goes_near_its_caller(plan):
    links = [("a", "b", SLOW), ("a", "a", FAST), ("b", "b", FAST)]
    for caller in ("a", "b"):
        there = cluster("a", "a", "a", "b", "b", "b", links=links, caller=caller)
        assert {host for stage in placed(load_plan(plan), there).stages for host in stage.hosts} == {caller}


def test_the_slowest_stage_gets_the_fastest_device_and_what_is_left_runs_replicas(plan):
    loaded = load_plan(plan)
    times = (10_000_000, 30_000_000, 12_000_000)
    stages = [msgspec.structs.replace(s, reference_time_ns=t) for s, t in zip(loaded.stages, times, strict=True)]
    loaded = msgspec.structs.replace(loaded, stages=tuple(stages))
    found = placed(loaded, cluster("a", "a", "b", speeds={"b": 4.0}))
    assert found.stages[1].hosts == ("b",)
    hybrid = placed(loaded, cluster(*"abcde"), "hybrid")
    assert sum(stage.replicas for stage in hybrid.stages) == 5
    assert hybrid.prediction.bottleneck_ns < placed(loaded, cluster(*"abcde")).prediction.bottleneck_ns


def test_placing_again_starts_from_the_same_times_and_leaves_the_files(plan, tmp_path):
    for number, speed in enumerate((4.0, 1.0)):
        file = tmp_path / f"{number}.toml"
        file.write_text(cluster("a", "b", "c", speeds=dict.fromkeys("abc", speed)).to_toml())
        place(plan if number == 0 else tmp_path / "0.plan", file, out=tmp_path / f"{number}.plan")
    before, fast, again = (load_plan(folder) for folder in (plan, tmp_path / "0.plan", tmp_path / "1.plan"))
    times = [[stage.predicted_time_ns for stage in one.stages] for one in (before, fast, again)]
    assert times[2] == times[0]
    assert times[1] == [round(time_ns / 4) for time_ns in times[0]]
    assert [s.files for s in again.stages] == [s.files for s in before.stages]
    with pytest.raises(PlanError, match="already exists; nothing was touched"):
        place(plan, tmp_path / "1.toml", out=tmp_path / "0.plan")


def test_the_verdict_is_that_of_the_new_devices(plan):
    before = load_plan(plan)
    moved = placed(before, cluster("a", "b", "c", speeds={"b": 2.0, "c": 4.0}))
    assert moved.verdict is not None
    stages, session, replicas = moved.verdict.ways
    assert stages.throughput_per_s == moved.prediction.throughput_per_s
    assert session.latency_ns == round(before.costs.whole_time_ns / 4), "the fastest device"
    assert replicas.count == 3


def test_too_few_devices_and_too_little_memory_are_said(plan):
    with pytest.raises(PartitionError, match=r"3 stages and the cluster 2 devices"):
        placed(load_plan(plan), cluster("a", "b"))
    tight = Cluster(tuple(Device(f"d{n}", memory_bytes=100) for n in range(3)), {})
    with pytest.raises(PartitionError, match="fits the devices' memory"):
        placed(load_plan(plan), tight)


def test_a_delay_counts_for_the_time_of_a_request_and_not_for_the_rate():
    flows = (Transfer(CALLER, (0,), 10), Transfer(0, (1,), 10), Transfer(1, (), 10, to_caller=True))
    quick = Problem(kinds=(DeviceKind((100, 100)),), devices=(0, 0), transfers=flows, link=Link(1, 10**9))
    late = Problem(kinds=(DeviceKind((100, 100)),), devices=(0, 0), transfers=flows, link=Link(1, 10**9, delay_ns=1000))
    cut = Partition((0, 1), ((0,), (1,)))
    assert score(late, cut).bottleneck_ns == score(quick, cut).bottleneck_ns
    assert score(late, cut).latency_ns == score(quick, cut).latency_ns + 3000, "in, across, and out"


def test_the_search_is_as_good_as_trying_all_cuts_and_devices_where_the_caller_has_links_of_its_own():
    times = (50, 70, 20, 90)
    flows = (
        Transfer(CALLER, (0,), 400),
        *(Transfer(number, (number + 1,), 100 * (number + 1)) for number in range(3)),
        Transfer(3, (), 900, to_caller=True),
    )
    link = Link(1, 10**9)
    problem = Problem(
        kinds=(DeviceKind(times), DeviceKind(tuple(time_ns // 2 for time_ns in times))),
        devices=(0, 0, 1),
        transfers=flows,
        link=link,
        links={(0, 2): Link(30, 10**9)},
        caller_links={0: link, 1: Link(1, 10**10), 2: Link(1, 10**8)},
    )
    cuts = [stages for stages in itertools.product(range(3), repeat=4) if list(stages) == sorted(stages)]
    cuts = [stages for stages in cuts if set(stages) == set(range(max(stages) + 1))]
    best = min(
        score(problem, Partition(stages, tuple((d,) for d in devices[: max(stages) + 1]))).bottleneck_ns
        for stages in cuts
        for devices in itertools.permutations(range(3))
    )
    found = search(problem, line_up(problem, None))
    assert found.bound <= best
    assert found.score.bottleneck_ns == best


def test_where_the_caller_is_must_be_known(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('caller = "z"\n[[device]]\nname = "a"\n')
    with pytest.raises(ClusterError, match="caller: 'z' is not a device or host; known: a, local"):
        load_cluster(file)
    file.write_text('caller = "z"\n[[device]]\nname = "a"\nhost = "b"\n')
    with pytest.raises(ClusterError, match="caller: 'z' is not a device or host; known: a, b, local"):
        load_cluster(file)
    there = cluster("h", links=[("h", "local", SLOW)], caller="local")
    file.write_text(there.to_toml())
    assert load_cluster(file) == there
    assert there.caller_link(there.devices[0]) == SLOW


def test_ops_stay_off_devices_that_may_not_run_them(plan, tmp_path):
    file = tmp_path / "cluster.toml"
    able = [Device(f"able{number}", "a") for number in range(3)]
    file.write_text(Cluster((Device("unable", "a", speed=100.0, not_ops=("Gemm", "MatMul")), *able), {}).to_toml())
    assert "unable" not in {stage.device for stage in place(plan, file, out=tmp_path / "p").stages}
    file.write_text(Cluster((Device("unable", "a", not_ops=("Gemm", "MatMul")), *able[:2]), {}).to_toml())
    with pytest.raises(PartitionError, match="the ops they may run"):
        place(plan, file, out=tmp_path / "q")
    assert not (tmp_path / "q").exists()
    (tmp_path / "q").write_text("a file")
    file.write_text(Cluster(tuple(able), {}).to_toml())
    with pytest.raises(PlanError, match="already exists; nothing was touched"):
        place(plan, file, out=tmp_path / "q")
