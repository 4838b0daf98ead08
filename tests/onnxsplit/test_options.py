"""The options of a cut, from the API to the plan."""

from __future__ import annotations

import build
import numpy as np
import pytest
from onnx import helper

from onnxsplit.cluster import Cluster, Device
from onnxsplit.errors import ClusterError, InputError, ModelError, PartitionError
from onnxsplit.planning import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import dry_run, examine_for, partition
from onnxsplit.planning.sweep import sweep
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify


def heads(length: int = 3, width: int = 32):
    """A backbone of MatMuls, and two heads a and b."""
    weight = build.constant("w", np.eye(width, dtype=np.float32) / 2)
    nodes, last = [], "x"
    for step in range(length):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"h{step}"], name=f"/back/{step}"))
        last = f"h{step}"
    for head in "ab":
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"{head}0"], name=f"/{head}/0"))
        nodes.append(helper.make_node("Relu", [f"{head}0"], [head], name=f"/{head}/1"))
    outputs = [build.value(name, ["n", width]) for name in "ab"]
    return build.model(nodes, [build.value("x", ["n", width])], outputs, [weight])


@pytest.fixture
def model(tmp_path):
    return build.save(heads(), tmp_path)


def cut(model, **options):
    return partition(model, out=model.with_suffix(".plan"), costs="analytic", **options)


def cluster_file(model, *devices: Device, links=None):
    file = model.with_name("cluster.toml")
    file.write_text(Cluster(devices, links or {}).to_toml())
    return file


def stage_of(model, op: str) -> int:
    import onnx

    for file in sorted(model.with_suffix(".plan").glob("stage*.onnx")):
        if any(node.name == op for node in onnx.load(file).graph.node):
            return int(file.stem.removeprefix("stage"))
    raise AssertionError(op)


def test_each_task_gets_a_part_and_needs_no_other(model):
    plan = cut(model, strategy="task")
    assert len(plan.stages) == 3
    assert plan.outputs_need == {"a": (0, 1), "b": (0, 2)}
    assert {stage_of(model, f"/back/{i}") for i in range(3)} == {0}
    assert all(c.good for c in verify(model.with_suffix(".plan"), model))


def test_tasks_can_share_a_part(model):
    plan = cut(model, strategy="task", tasks=[["a", "b"]], stages=2)
    assert plan.outputs_need["a"] == plan.outputs_need["b"]


def test_a_backbone_is_cut_further_when_there_are_more_stages(model):
    plan = cut(model, strategy="task", stages=5)
    assert len(plan.stages) == 5
    assert not set(plan.outputs_need["a"]) & set(plan.outputs_need["b"]) - set(range(3))


def test_layers_are_slices_of_the_models_order(model):
    cut(model, strategy="layer", stages=3)
    order = [stage_of(model, name) for name in ("/back/0", "/back/1", "/back/2", "/a/0", "/a/1", "/b/0", "/b/1")]
    assert order == sorted(order)


def test_ops_that_match_stay_together(model):
    cut(model, stages=3, together=["/back/*"])
    assert len({stage_of(model, f"/back/{i}") for i in range(3)}) == 1


def test_a_tensor_to_keep_is_not_cut_and_one_to_cut_is(model):
    plan = cut(model, stages=3, also_cut=["h0"], no_cut=["h2"])
    crossing = {c.tensor for c in plan.cuts}
    assert "h0" in crossing
    assert "h2" not in crossing


def test_former_names_of_options_do_the_same_with_a_warning(model):
    with pytest.warns(FutureWarning) as warned:
        plan = cut(model, stages=3, cut=["h0"], keep=["h2"])
    assert [str(one.message).partition(";")[0] for one in warned] == [
        "the option 'cut' is now 'also_cut'",
        "the option 'keep' is now 'no_cut'",
    ]
    assert plan.cuts == cut(model, stages=3, also_cut=["h0"], no_cut=["h2"]).cuts


def test_fast_devices_get_more(model, tmp_path):
    model = build.save(build.chain(20, 256), tmp_path, "chain.onnx")
    file = cluster_file(model, Device("slow", speed=0.25), Device("fast"))
    plan = cut(model, cluster=file, stages=2)
    time_of = {stage.device: stage.predicted_time_ns for stage in plan.stages}
    assert time_of["slow"] == pytest.approx(time_of["fast"], rel=0.35)
    ops = {stage.device: stage.ops for stage in plan.stages}
    assert ops["fast"] > 2 * ops["slow"]
    assert all(stage.devices == (stage.device,) for stage in plan.stages)


def test_ops_go_where_they_may(model):
    file = cluster_file(model, Device("plain", not_ops=("Relu",)), Device("relu", speed=0.5))
    cut(model, cluster=file)
    plan = cut(model, cluster=file, stages=2)
    assert {plan.stages[stage_of(model, f"/{head}/1")].device for head in "ab"} == {"relu"}


def test_ops_sit_where_they_are_placed(model):
    file = cluster_file(model, Device("one"), Device("two"))
    plan = cut(model, cluster=file, place={"/b/*": "two"})
    assert {plan.stages[stage_of(model, f"/b/{i}")].device for i in (0, 1)} == {"two"}


def test_replicas_of_the_whole_and_of_stages(model, tmp_path):
    plan = cut(model, parallel="data", devices=3)
    assert [stage.replicas for stage in plan.stages] == [3]
    model = build.save(build.chain(2, 512), tmp_path, "chain.onnx")
    plan = cut(model, parallel="hybrid", devices=4, stages=2)
    assert sum(stage.replicas for stage in plan.stages) == 4


def test_a_memory_limit_makes_hybrid_cut(tmp_path):
    model = build.save(build.chain(8, 256), tmp_path)
    free = cut(model, parallel="hybrid", devices=4)
    tight = cut(model, parallel="hybrid", devices=4, max_memory=free.costs.whole_weight_bytes * 6 // 10)
    assert len(free.stages) == 1
    assert len(tight.stages) > 1
    assert max(stage.peak_memory_bytes for stage in tight.stages) <= free.costs.whole_weight_bytes * 6 // 10


@pytest.mark.parametrize("objective", ["throughput", "latency", "memory"])
def test_every_objective_makes_a_plan_with_its_proof(model, objective):
    plan = cut(model, stages=2, objective=objective)
    assert plan.objective == objective
    assert plan.prediction.gap >= 0
    assert (plan.prediction.lower_bound_bytes is not None) == (objective == "memory")
    assert plan.prediction.op_lower_bound_ns <= plan.prediction.lower_bound_ns


def test_a_dry_run_writes_nothing(model):
    options = CutOptions(stages=2)
    subject = examine_for(model, options, costs="analytic")
    before = sorted(model.parent.iterdir())
    plan = dry_run(subject, options).plan
    assert len(plan.stages) == 2
    assert sorted(model.parent.iterdir()) == before


def test_a_sweep_tells_what_each_number_of_stages_gives(model):
    rows = sweep(examine_for(model, CutOptions(), costs="analytic"), range(1, 5))
    assert [row.stages for row in rows] == [1, 2, 3, 4]
    assert all(row.bottleneck_ns >= row.lower_bound_ns > 0 and row.peak_memory_bytes > 0 for row in rows)


BAD = [
    ({"stages": 3, "parallel": "data"}, "one stage, not 3"),
    ({"stages": 2, "devices": 4}, "--parallel hybrid"),
    ({"tasks": [["a"]]}, "--strategy task"),
    ({"strategy": "task", "tasks": [["z"]]}, "'z' is not an output.*a, b"),
    ({"strategy": "task", "tasks": [["a"], ["a"]]}, "more than one group"),
    ({"strategy": "layer", "parallel": "hybrid"}, "needs --strategy network"),
    ({"place": {"x": "y"}}, "give --cluster FILE"),
    ({"together": ["nothing*"]}, "no op's name matches 'nothing\\*'.*'/back/0'"),
    ({"no_cut": ["zzz"]}, "--no-cut: 'zzz' is not a tensor"),
    ({"also_cut": ["zzz"]}, "cannot cut at 'zzz'"),
    ({"also_cut": ["h0"], "no_cut": ["h0"]}, "cannot cut at 'h0', which joins"),
    ({"cut_at": ["h0"], "strategy": "task"}, "leave out --strategy"),
    ({"gap": -1.0}, "--gap"),
    ({"time_limit": 0.0}, "--time-limit"),
    ({"stages": 99}, "cannot be cut into 99"),
    ({"stages": "auto", "parallel": "hybrid", "max_memory": 9}, "leave out --cluster and --parallel"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_contradictions_are_named(model, options, message):
    with pytest.raises(PartitionError, match=message):
        cut(model, **options)
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]


def test_unknown_devices_are_named(model):
    file = cluster_file(model, Device("one"), Device("two"))
    with pytest.raises(PartitionError, match="'three' is not a device of the cluster; it has one, two"):
        cut(model, cluster=file, place={"/b/*": "three"})
    with pytest.raises(PartitionError, match="no cut was found that fits the ops they may run"):
        cut(model, cluster=cluster_file(model, Device("one", not_ops=("Relu",))))
    with pytest.raises(ClusterError, match="cluster init"):
        cut(model, cluster=model.with_name("absent.toml"))


@pytest.mark.parametrize(
    "value", [0, -1, 256, 10**9, 2**70, pytest.param(10**5_000, id="5000 digits"), 1.0, float("nan"), True, "2", [2]]
)
@pytest.mark.parametrize("name", ["stages", "devices"])
def test_an_invalid_number_of_stages_or_devices_is_refused(name, value):
    with pytest.raises(PartitionError, match=f"--{name} must be a whole number, at least 1 and at most 255, not "):
        CutOptions(**{name: value}).check()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e30, True, "1"])
@pytest.mark.parametrize("name", ["gap", "time_limit", "rounds", "max_memory"])
def test_other_numbers_have_bounds_too(name, value):
    with pytest.raises(PartitionError, match=f"--{name.replace('_', '-')} must be a"):
        CutOptions(**{name: value}).check()


def test_integers_of_numpy_will_do():
    options = CutOptions(stages=np.int64(2), max_memory=np.uint32(1 << 20), gap=np.float32(0.5))
    options.check()
    assert type(options.stages) is int
    with pytest.raises(PartitionError, match="--stages"):
        CutOptions(stages=np.bool_(True)).check()


@pytest.mark.parametrize("size", [-1, 2**31, 10**30, 1.5, True, "2"])
def test_a_dimension_has_a_size_that_there_is(model, size):
    with pytest.raises(InputError, match="dimension 'n' must be a whole number, at least 0 and at most 2147483647"):
        cut(model, dims={"n": size})


@pytest.mark.parametrize("threads", [-1, 10**9, 2**70, 1.5, True])
def test_a_session_has_a_number_of_threads_that_there_is(model, threads):
    with pytest.raises(InputError, match="threads must be a whole number, at least 1 and at most 1024"):
        open_session(model, threads=threads)


def test_a_model_whose_weights_exceed_the_free_memory_is_not_run(model, monkeypatch):
    monkeypatch.setattr(examine, "free_memory_bytes", lambda: 1000)
    plan = partition(model, out=model.with_suffix(".plan"))
    assert plan.costs.source == "analytic"
    assert "its weights take 4096 bytes, and 1000 bytes of memory are free" in str(plan.costs.note)
    with pytest.raises(ModelError, match="does not run here"):
        partition(model, out=model.with_suffix(".plan"), costs="measured")
