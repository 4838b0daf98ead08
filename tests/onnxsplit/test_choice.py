"""Choosing the cut: at given tensors, or with the fewest stages that fit, and merging stages again."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxsplit.errors import InputError, ModelError, ModelRefused, OnnxsplitError, PartitionError
from onnxsplit.npz import load_npz
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import partition, write_plan
from onnxsplit.session import open_session
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import verify


def planned(proto, folder: Path, **options):
    return partition(build.save(proto, folder), out=folder / "m.plan", costs="analytic", **options)


def test_cut_at_cuts_exactly_there(tmp_path):
    plan = planned(build.chain(), tmp_path, cut_at=["h1", "m4"])
    assert [cut.tensor for cut in plan.cuts] == ["h1", "m4"]
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "model.onnx"))


def test_tensors_side_by_side_make_one_boundary(tmp_path):
    plan = planned(build.diamond(), tmp_path, cut_at=["left", "right"])
    assert len(plan.stages) == 2
    assert plan.stages[1].inputs == ("left", "right")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("h_1", "is not a tensor of the model's main graph. The nearest that can: h1"),
        (
            "w2",
            "cannot cut at 'w2', which is a constant of the model: every stage that reads it holds a copy. The nearest",
        ),
        (
            "x",
            "'x', which is an input of the model: every stage that reads it takes it from the caller. The nearest that",
        ),
        ("y", "is read by no op: it is an output of the model. The nearest that can: m5, h4"),
        ("matmul2", "is the name of an op, not of a tensor; name one of its outputs: m2. The nearest that can: m2"),
        (
            "relu5",
            "is the name of an op, not of a tensor, and its outputs (y) cannot be cut either. The nearest that",
        ),
        (
            "MatMul",
            "is a type of ops, not of a tensor; name one of its outputs: m0, m1, m2 and 3 more. The nearest that",
        ),
    ],
)
def test_an_illegal_tensor_gets_the_nearest_legal_ones(tmp_path, tensor, words):
    with pytest.raises(PartitionError) as refused:
        planned(build.chain(), tmp_path, cut_at=[tensor])
    assert words in str(refused.value)
    assert not (tmp_path / "m.plan").exists()


def test_a_tensor_inside_an_atom_is_illegal(tmp_path):
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("SequenceConstruct", ["a", "x"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    proto = build.model(nodes, [build.value("x", [2])], [build.value("y", [4])])
    with pytest.raises(PartitionError, match=r"joins ops that must stay together.*nearest that can: a"):
        planned(proto, tmp_path, cut_at=["s"])


def test_auto_takes_the_fewest_stages_that_fit(tmp_path):
    layer = 32 * 32 * 4 * 2  # with the copy that the CPU's MatMul packs
    plan = planned(build.chain(6), tmp_path, stages="auto", max_memory=2 * layer + 1000)
    assert len(plan.stages) == 3
    assert all(stage.peak_memory_bytes <= 2 * layer + 1000 for stage in plan.stages)


def test_a_limit_that_nothing_fits_names_the_op(tmp_path):
    with pytest.raises(PartitionError, match=r"op 'matmul0' alone holds 8192 bytes of weights and packed copies"):
        planned(build.chain(6), tmp_path, stages="auto", max_memory=1000)
    with pytest.raises(PartitionError, match="The fewest stages that fit are 6"):
        planned(build.chain(6), tmp_path, stages=2, max_memory=9000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": "auto"}, "--max-memory"),
        ({"cut_at": ["h1"], "stages": 2}, "leave out --stages"),
        ({"stages": -1}, "at least 1"),
    ],
)
def test_requests_that_contradict_themselves(tmp_path, options, words):
    with pytest.raises(PartitionError, match=words):
        planned(build.chain(), tmp_path, **options)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_merge_gives_the_source_back(seed):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build.save(build.random_dag(seed), folder)
        subject = examine(model, costs="analytic")
        write_plan(subject, folder / "m.plan", CutOptions(stages=min(3, len(subject.atoms.ops)) or None))
        merge(folder / "m.plan", folder / "merged.onnx")
        inputs = load_npz(folder / "m.plan" / "example.npz")
        whole, merged = (
            open_session(p, threads=1, level="disabled").run(inputs) for p in (model, folder / "merged.onnx")
        )
        assert whole.keys() == merged.keys()
        assert all(np.array_equal(whole[name], merged[name], equal_nan=True) for name in whole)


def test_merge_collects_external_data(tmp_path):
    onnx.save(
        build.chain(4, width=64), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    partition(tmp_path / "m.onnx", stages=3, out=tmp_path / "m.plan", costs="analytic")
    (tmp_path / "w.bin").unlink()
    merge(tmp_path / "m.plan", tmp_path / "merged.onnx")
    assert (tmp_path / "merged.onnx.data").stat().st_size >= 4 * 64 * 64 * 4
    assert open_session(tmp_path / "merged.onnx", threads=1).run({"x": np.ones((1, 64), np.float32)})["y"].shape == (
        1,
        64,
    )


def test_a_model_of_only_passed_through_outputs_has_a_plan_without_stages(tmp_path):
    from runtime import Pipeline

    proto = build.model([], [build.value("x", [2])], [build.value("x", [2])])
    plan = planned(proto, tmp_path)
    assert plan.stages == ()
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        assert pipeline.run({"x": np.ones(2, np.float32)})["x"].tolist() == [1, 1]


def test_a_single_op_goes_into_one_stage_when_nothing_is_asked_for(tmp_path):
    proto = build.model([helper.make_node("Relu", ["x"], ["y"])], [build.value("x", [2])], [build.value("y", [2])])
    assert len(planned(proto, tmp_path).stages) == 1


def test_a_version_onnx_runtime_refuses_is_an_error_that_says_how_to_go_on(tmp_path):
    proto = build.chain()
    proto.ir_version = 99
    model = build.save(proto, tmp_path)
    with pytest.raises(ModelRefused, match=r"(?i)ir.version.*--costs analytic"):
        partition(model, out=tmp_path / "m.plan")
    assert len(partition(model, out=tmp_path / "m.plan", costs="analytic").stages) == 2


def test_an_opset_onnx_runtime_refuses_is_an_error(tmp_path):
    proto = build.chain()
    proto.opset_import[0].version = 999
    with pytest.raises(ModelRefused, match=r"(?i)opset"):
        partition(build.save(proto, tmp_path), out=tmp_path / "m.plan")


def test_inputs_that_cannot_be_passed_are_refused_by_name(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    nodes = [helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0)]
    with pytest.raises(InputError, match="input 's' is a sequence"):
        planned(build.model(nodes, [sequence], [build.value("y", None)]), tmp_path)
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    output = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, [2])
    with pytest.raises(PartitionError, match="output 'y' is a sequence, written by SequenceConstruct"):
        planned(build.model(nodes, [build.value("x", [2])], [output]), tmp_path)


def test_a_truncated_model_is_refused(tmp_path):
    path = build.save(build.chain(), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        partition(path, out=tmp_path / "m.plan")


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    model = build.save(build.chain(6, width=128), tmp_path)
    subject = examine(model, costs="analytic")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OnnxsplitError, match="cannot write"):
            write_plan(subject, tmp_path / "m.plan", CutOptions(stages=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_inputs_too_large_to_make_up_are_refused(tmp_path):
    proto = build.model(
        [helper.make_node("Relu", ["x"], ["y"])], [build.value("x", [1 << 40])], [build.value("y", None)]
    )
    with pytest.raises(InputError, match="example inputs of these shapes take"):
        planned(proto, tmp_path)


def test_shapes_that_lie_do_not_break_a_cut(tmp_path):
    proto = build.chain()
    proto.graph.value_info.append(build.value("h1", [7, 7, 7]))
    del proto.graph.output[:]
    proto.graph.output.append(build.value("y", [3, 32]))
    planned(proto, tmp_path, stages=4)
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "model.onnx"))


def test_a_negative_dimension_means_any_size(tmp_path):
    proto = build.chain()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    plan = planned(proto, tmp_path, stages=2)
    assert plan.tensors["x"].shape == ("?", 32)


def test_omitted_optional_inputs_and_outputs_survive(tmp_path):
    nodes = [
        helper.make_node("Clip", ["x", "", "most"], ["a"]),
        helper.make_node("Dropout", ["a"], ["b", ""]),
        helper.make_node("TopK", ["b", "two"], ["best", "places"]),
        helper.make_node("Add", ["places", "places"], ["y"]),
    ]
    constants = [build.constant("most", np.float32(0.5)), build.constant("two", np.array([2], np.int64))]
    proto = build.model(nodes, [build.value("x", [1, 4])], [build.value("y", [1, 2], TensorProto.INT64)], constants)
    planned(proto, tmp_path, stages=3)
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "model.onnx"))


def test_sparse_initializers_go_with_their_readers(tmp_path):
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [2], [3.0, 4.0])
    indices = helper.make_tensor("places", TensorProto.INT64, [2], [1, 2])
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Add", ["a", "sparse"], ["y"])]
    proto = build.model(nodes, [build.value("x", [4])], [build.value("y", [4])])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    planned(proto, tmp_path, stages=2)
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", ["a:0", "a/b;c/d", "with space", '{"json": [1]}', "größe", "../x"])
def test_any_tensor_name_goes(tmp_path, name):
    nodes = [helper.make_node("Relu", ["x"], [name]), helper.make_node("Neg", [name], ["y"])]
    proto = build.model(nodes, [build.value("x", [4])], [build.value("y", [4])])
    plan = planned(proto, tmp_path, cut_at=[name])
    assert plan.cuts[0].tensor == name
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", tmp_path / "model.onnx"))
