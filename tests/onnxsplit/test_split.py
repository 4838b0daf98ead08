"""Real cuts: for every graph, the stages give the model's results."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from checked import check_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxsplit.cluster import Link
from onnxsplit.errors import PartitionError, PlanError
from onnxsplit.planning.examine import examine
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from onnxsplit.stages.verify import run_stages, verify


def split(proto: onnx.ModelProto, folder: Path, stages: int, **options):
    model = build.save(proto, folder)
    return partition(model, stages=stages, out=folder / "m.plan", costs="analytic", **options), model


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_random_graphs_give_the_same_in_stages(seed):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build.save(build.random_dag(seed), folder)
        atoms = len(examine(model, costs="analytic").atoms.ops)
        if not atoms:
            return
        stages = random.Random(seed).randint(1, min(5, atoms))
        partition(model, stages=stages, out=folder / "m.plan", costs="analytic")
        assert all(c.exact and c.good for c in verify(folder / "m.plan", model))
        check_plan(folder / "m.plan", model)


def test_captures_become_inputs_of_the_stage(tmp_path):
    plan, model = split(build.with_if(), tmp_path, 6)
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))
    assert max(len(stage.inputs) for stage in plan.stages) >= 3


def test_symbolic_names_versions_and_metadata_carry_over(tmp_path):
    proto = build.chain()
    proto.metadata_props.add(key="alphabet", value="abc")
    proto.ir_version = 9
    split(proto, tmp_path, 3)
    for index in range(3):
        stage = onnx.load(tmp_path / "m.plan" / f"stage{index}.onnx")
        assert stage.ir_version == 9
        assert stage.metadata_props[0].value == "abc"
        assert stage.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        onnx.checker.check_model(stage, full_check=True)


def test_a_stage_holds_only_what_it_needs(tmp_path):
    plan, _ = split(build.chain(6), tmp_path, 3)
    assert [stage.weight_bytes for stage in plan.stages] == [2 * 32 * 32 * 4] * 3


def test_stages_run_at_other_sizes_than_they_were_cut_at(tmp_path):
    plan, model = split(build.chain(), tmp_path, 2)
    inputs = {"x": np.random.default_rng(0).random((7, 32), dtype=np.float32)}
    whole = open_session(model, threads=1, level="disabled").run(inputs)
    parts = run_stages(tmp_path / "m.plan", plan, inputs, threads=1, level="disabled")
    assert np.array_equal(whole["y"], parts["y"])


def test_outputs_that_pass_through_need_no_stage(tmp_path):
    proto = build.chain(2)
    proto.graph.output.append(build.value("x", ["batch", 32]))
    proto.graph.output.append(build.value("w1", [32, 32]))
    plan, model = split(proto, tmp_path, 2)
    assert plan.outputs_need == {"y": (0, 1), "x": (), "w1": ()}
    assert plan.passthrough["x"].input == "x"
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))


def test_external_data_goes_into_each_stage_s_own_file(tmp_path):
    proto = build.chain(4, width=64)
    model = tmp_path / "model.onnx"
    onnx.save(proto, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    plan = partition(model, stages=2, out=tmp_path / "m.plan", costs="analytic")
    assert [[file.name for file in stage.files] for stage in plan.stages] == [
        ["stage0.onnx", "stage0.data"],
        ["stage1.onnx", "stage1.data"],
    ]
    (tmp_path / "weights.bin").rename(tmp_path / "gone.bin")
    inputs = {"x": np.ones((1, 64), np.float32)}
    assert run_stages(tmp_path / "m.plan", plan, inputs, threads=1)["y"].shape == (1, 64)


def test_external_data_of_several_pieces_is_copied_byte_for_byte(tmp_path):
    proto = build.chain(2, width=700)  # 1.9 MB a weight
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    partition(tmp_path / "m.onnx", stages=2, out=tmp_path / "m.plan", costs="analytic")
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "m.onnx"))


def test_functions_called_inside_bodies_go_with_their_stage(tmp_path):
    double = onnx.helper.make_function(
        "mine",
        "Double",
        ["a"],
        ["b"],
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        [onnx.helper.make_opsetid("", 18)],
    )
    again = onnx.helper.make_function(
        "mine", "Again", ["a"], ["b"], [onnx.helper.make_node("Double", ["a"], ["b"], domain="mine")],
        [onnx.helper.make_opsetid("mine", 1)],
    )  # fmt: skip
    proto = build.with_if()
    proto.functions.extend([double, again])
    proto.opset_import.add(domain="mine", version=1)
    choice = next(node for node in proto.graph.node if node.op_type == "If")
    body = next(a.g for a in choice.attribute if a.name == "else_branch")
    body.node[1].op_type, body.node[1].domain = "Again", "mine"
    del body.node[1].input[1]
    plan, model = split(proto, tmp_path, 4)
    kept = [len(onnx.load(tmp_path / "m.plan" / stage.file).functions) for stage in plan.stages]
    assert sorted(kept) == [0, 0, 0, 2]
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))


def test_measured_costs_find_where_the_time_goes(tmp_path):
    """The first of nine products takes a hundred times as long as the others, so most are in the other stage."""
    shapes = [(1024, 1024), (1024, 8), *[(8, 8)] * 7]
    weights = [build.constant(f"w{n}", np.ones(shape, np.float32)) for n, shape in enumerate(shapes)]
    nodes = [helper.make_node("MatMul", [f"h{n}", f"w{n}"], [f"h{n + 1}"]) for n in range(9)]
    proto = build.model(nodes, [build.value("h0", ["batch", 1024])], [build.value("h9", ["batch", 8])], weights)
    plan = partition(build.save(proto, tmp_path), stages=2, out=tmp_path / "m.plan", dims={"batch": 64}, rounds=1)
    assert plan.stages[0].ops < plan.stages[1].ops
    assert plan.costs.source == "measured"
    assert plan.dims == {"batch": 64}
    assert all(stage.measured_time_ns for stage in plan.stages)
    times = [stage.measured_time_ns for stage in plan.stages]
    host = plan.costs.host
    beside = host.node_ns + host.hop_ns + 2 * (host.tensor_ns + Link().transfer_ns(0))
    assert 0.99 * max(times) <= plan.prediction.bottleneck_ns <= 1.2 * max(times) + beside


def test_more_stages_than_parts_names_the_largest(tmp_path):
    with pytest.raises(PartitionError, match="Ask for 4 stages or fewer"):
        split(build.diamond(), tmp_path, 9)
    assert not (tmp_path / "m.plan").exists()


def test_no_stages_is_refused(tmp_path):
    with pytest.raises(PartitionError, match="at least 1"):
        split(build.diamond(), tmp_path, 0)


def test_a_plan_is_replaced_whole(tmp_path):
    split(build.chain(), tmp_path, 4)
    split(build.chain(), tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "m.plan").iterdir()) == [
        "costs.npz",
        "example.npz",
        "plan.json",
        "stage0.onnx",
        "stage1.onnx",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.plan", "model.onnx"]


def test_a_folder_that_is_not_a_plan_is_not_changed(tmp_path):
    (tmp_path / "m.plan").mkdir()
    (tmp_path / "m.plan" / "letters.txt").write_text("dear")
    with pytest.raises(PlanError, match="nothing was touched"):
        split(build.chain(), tmp_path, 2)
    assert [p.name for p in (tmp_path / "m.plan").iterdir()] == ["letters.txt"]


def test_a_plan_of_another_model_is_not_verified(tmp_path):
    split(build.chain(), tmp_path, 2)
    other = build.save(build.diamond(), tmp_path, "other.onnx")
    with pytest.raises(PlanError, match="another model"):
        verify(tmp_path / "m.plan", other)


def test_a_wrong_stage_is_found_by_verify(tmp_path):
    """The check can fail: it detects a stage that doubles its result."""
    plan, model = split(build.chain(), tmp_path, 2)
    file = tmp_path / "m.plan" / "stage1.onnx"
    stage = onnx.load(file)
    stage.graph.initializer[0].CopyFrom(
        build.constant(stage.graph.initializer[0].name, 2 * onnx.numpy_helper.to_array(stage.graph.initializer[0]))
    )
    file.write_bytes(stage.SerializeToString())
    import msgspec

    from onnxsplit.stages.model_file import file_entry

    entry = file_entry(file)
    stages = (plan.stages[0], msgspec.structs.replace(plan.stages[1], files=(entry,)))
    (tmp_path / "m.plan" / "plan.json").write_bytes(msgspec.structs.replace(plan, stages=stages).to_json())
    assert not any(comparison.good for comparison in verify(tmp_path / "m.plan", model))
