"""Outputs that are left out, inputs with a default that are kept, and outputs that cannot be returned to a caller."""

from __future__ import annotations

import build
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import InputError, PartitionError
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import dry_run, examine_for, partition, write_plan
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import run_stages, verify
from onnxsplit.views.annotate import annotate

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((3, 4)).astype(np.float32)


def classifier(declared: bool = True):
    """A classifier as skl2onnx exports it: labels, and a sequence of maps that ZipMap writes."""
    nodes = [
        helper.make_node("Mul", ["X", "two"], ["scaled"]),
        helper.make_node(
            "LinearClassifier",
            ["scaled"],
            ["label", "probabilities"],
            domain="ai.onnx.ml",
            coefficients=[float(c) for c in RANDOM.standard_normal(8)],
            classlabels_ints=[0, 1],
            intercepts=[0.0, 0.1],
            post_transform="SOFTMAX",
        ),
        helper.make_node(
            "ZipMap", ["probabilities"], ["output_probability"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
        ),
    ]  # fmt: skip
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    kind = helper.make_sequence_type_proto(maps)
    probability = (
        helper.make_value_info("output_probability", kind)
        if declared
        else onnx.ValueInfoProto(name="output_probability")
    )
    return build.model(
        nodes,
        [build.value("X", [None, 4])],
        [build.value("label", [None], TensorProto.INT64), probability],
        [build.constant("two", np.float32(2))],
        opsets={"": 18, "ai.onnx.ml": 3},
    )


def two_tasks():
    """x -> p; (x, z) -> q; x -> parts, a sequence that also serves p."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("SequenceConstruct", ["h", "h"], ["parts"]),
        helper.make_node("ConcatFromSequence", ["parts"], ["joined"], axis=1),
        helper.make_node("Relu", ["joined"], ["p"]),
        helper.make_node("Add", ["h", "z"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["q"]),
    ]
    inputs = [build.value("x", ["n", 4]), build.value("z", ["n", 4])]
    outputs = [build.value("p", ["n", 8]), build.value("q", ["n", 4])]
    return build.model(nodes, inputs, outputs, [build.constant("w", RANDOM.standard_normal((4, 4), np.float32))])


def with_default(ir_version: int = 8, shape=(1,)):
    """y = relu(x * scale) * scale + shift, where scale and shift are both inputs and initializers."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Mul", ["b", "scale"], ["c"]),
        helper.make_node("Add", ["c", "shift"], ["y"]),
    ]
    inputs = [build.value("x", ["n", 4]), build.value("scale", shape), build.value("shift", [4])]
    constants = [build.constant("scale", np.array([2.0], np.float32)), build.constant("shift", np.ones(4, np.float32))]
    return build.model(nodes, inputs, [build.value("y", ["n", 4])], constants, ir_version=ir_version)


def whole(path, inputs, outputs=None):
    return onnxruntime.InferenceSession(path).run(outputs, inputs)


@pytest.mark.parametrize("declared", [True, False])
def test_an_output_of_maps_is_refused_before_anything_runs_with_what_to_do(tmp_path, monkeypatch, declared):
    monkeypatch.setattr("onnxsplit.planning.examine.find_example", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr("onnxsplit.planning.examine.measured_costs", lambda *_, **__: pytest.fail("it was run"))
    path = build.save(classifier(declared), tmp_path)
    with pytest.raises(PartitionError) as refused:
        partition(path, out=tmp_path / "plan", costs="measured")
    message = str(refused.value)
    assert "'output_probability' is a sequence of maps" in message
    assert "--drop-output output_probability" in message
    assert "options={'zipmap': False}" in message


@pytest.mark.parametrize("op_type", ["SequenceConstruct", "SplitToSequence", "Optional"])
@pytest.mark.parametrize("declared", [True, False])
def test_what_an_output_is_is_told_by_its_type_or_its_op(tmp_path, op_type, declared):
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kind = helper.make_optional_type_proto(kind) if op_type == "Optional" else helper.make_sequence_type_proto(kind)
    odd = helper.make_value_info("odd", kind) if declared else onnx.ValueInfoProto(name="odd")
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node(op_type, ["y"], ["made"]),
        helper.make_node("Identity", ["made"], ["odd"]),
    ]
    proto = build.model(nodes, [build.value("x", [2, 4])], [build.value("y", [2, 4]), odd])
    what = "an optional" if op_type == "Optional" else "a sequence"
    with pytest.raises(PartitionError, match=f"'odd' is {what}, written by {op_type}"):
        examine(build.save(proto, tmp_path), costs="analytic")


def test_a_classifier_is_cut_without_its_maps(tmp_path):
    path = build.save(classifier(), tmp_path)
    plan = partition(path, stages=2, out=tmp_path / "plan", drop_outputs=["output_probability"], rounds=1)
    assert plan.outputs == ("label",)
    assert plan.dropped_outputs == ("output_probability",)
    assert {found.output for found in verify(tmp_path / "plan", path) if found.good} == {"label"}
    found = run_stages(tmp_path / "plan", plan, {"X": X}, threads=1)
    assert np.array_equal(found["label"], whole(path, {"X": X}, ["label"])[0])
    merge(tmp_path / "plan", tmp_path / "merged.onnx")
    onnx.checker.check_model(tmp_path / "merged.onnx")
    assert np.array_equal(whole(tmp_path / "merged.onnx", {"X": X})[0], found["label"])


def test_an_output_that_is_left_out_takes_its_ops_and_inputs_along(tmp_path):
    path = build.save(two_tasks(), tmp_path)
    save_npz(tmp_path / "in.npz", {"x": X, "z": X})
    options = {"costs": "analytic", "inputs": tmp_path / "in.npz"}
    plan = partition(path, stages=2, out=tmp_path / "plan", outputs=["p"], **options)
    assert (plan.inputs, plan.dropped_inputs, plan.dropped_outputs) == (("x",), ("z",), ("q",))
    assert sum(stage.ops for stage in plan.stages) == 4
    assert load_plan(tmp_path / "plan") == plan
    assert all(found.good for found in verify(tmp_path / "plan", path, inputs=tmp_path / "in.npz"))
    expected = whole(path, {"x": X, "z": X}, ["p"])[0]
    assert np.array_equal(run_stages(tmp_path / "plan", plan, {"x": X}, threads=1)["p"], expected)
    merge(tmp_path / "plan", tmp_path / "merged.onnx")
    assert np.array_equal(whole(tmp_path / "merged.onnx", {"x": X})[0], expected)
    assert partition(path, stages=2, out=tmp_path / "plan", drop_outputs=["p"], **options).inputs == ("x", "z")


def test_names_that_are_no_outputs_and_no_output_at_all_are_refused(tmp_path):
    path = build.save(two_tasks(), tmp_path)
    for words, options in (
        ("'pp' is not an output of the model; it has p, q", {"drop_outputs": ["pp"]}),
        ("'joined' is not an output", {"outputs": ["joined"]}),
        ("keep at least one of p, q", {"drop_outputs": ["p", "q"]}),
        ("keep at least one of p, q", {"outputs": []}),
        ("leave out --drop-output", {"outputs": ["p"], "drop_outputs": ["q"]}),
        ("a list of names", {"outputs": "p"}),
    ):
        with pytest.raises(PartitionError, match=words):
            examine(path, costs="analytic", **options)


@pytest.mark.parametrize("shape", [(1,), ("k",), None])
@pytest.mark.parametrize("ir_version", [4, 8])
def test_a_kept_input_may_be_given_or_left_out(tmp_path, ir_version, shape):
    path = build.save(with_default(ir_version, shape), tmp_path)
    plan = partition(path, stages=2, out=tmp_path / "plan", keep_inputs=["scale"], rounds=1)
    assert plan.inputs == ("x", "scale")
    assert list(plan.defaults) == ["scale"]
    assert list(plan.constant_inputs) == ["shift"]
    assert plan.tensors["scale"].batch_axis is None
    for stage in plan.stages:
        onnx.checker.check_model(tmp_path / "plan" / stage.file)
    assert all(found.good for found in verify(tmp_path / "plan", path))
    merge(tmp_path / "plan", tmp_path / "merged.onnx")
    onnx.checker.check_model(tmp_path / "merged.onnx")
    for given in ({"x": X}, {"x": X, "scale": np.array([10.0], np.float32)}):
        save_npz(tmp_path / "in.npz", given)
        assert all(found.good for found in verify(tmp_path / "plan", path, inputs=tmp_path / "in.npz"))
        assert np.array_equal(whole(tmp_path / "merged.onnx", given)[0], whole(path, given)[0])


def test_a_value_for_what_became_a_constant_is_refused_with_what_to_do(tmp_path):
    path = build.save(with_default(), tmp_path)
    plan = partition(path, stages=2, out=tmp_path / "plan", costs="analytic")
    assert plan.constant_inputs == {"scale": "2.0", "shift": "[1.0, 1.0, 1.0, 1.0]"}
    given = tmp_path / "in.npz"
    save_npz(given, {"x": X, "scale": np.array([10.0], np.float32)})
    message = r"'scale' became a constant \(2.0\) .* cut again with --keep-input scale"
    with pytest.raises(InputError, match=message):
        verify(tmp_path / "plan", path, inputs=given)
    with pytest.raises(InputError, match=r"'scale' becomes a constant \(2.0\) .* add --keep-input scale"):
        partition(path, out=tmp_path / "plan", inputs=given)
    plan = partition(path, stages=2, out=tmp_path / "plan", inputs=given, keep_inputs=["scale"], costs="analytic")
    assert load_npz(tmp_path / "plan" / "example.npz")["scale"] == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [("x", "has no default, so it stays an input"), ("z", "is unknown; inputs with a default: scale, shift")],
)
def test_only_an_input_with_a_default_can_be_kept(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        examine(build.save(with_default(), tmp_path), keep_inputs=[name])


def test_a_default_in_external_data_goes_with_the_plan(tmp_path):
    proto = with_default()
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    plan = partition(
        tmp_path / "m.onnx", stages=2, out=tmp_path / "plan", keep_inputs=["scale", "shift"], costs="measured", rounds=1
    )
    found = {name: load_npz(tmp_path / "plan" / entry.name)[name] for name, entry in plan.defaults.items()}
    assert found["scale"].tolist() == [2]
    assert found["shift"].tolist() == [1, 1, 1, 1]
    assert all(found.good for found in verify(tmp_path / "plan", tmp_path / "m.onnx"))


def test_the_annotated_model_keeps_all_inputs_outputs_and_defaults(tmp_path):
    for proto, examined, given in (
        (two_tasks(), {"outputs": ["p"]}, {"x": X, "z": X}),
        (with_default(), {"keep_inputs": ["scale"]}, {"x": X}),
    ):
        path, options = build.save(proto, tmp_path), CutOptions(stages=2)
        subject = examine_for(path, options, costs="analytic", **examined)
        annotate(write_plan(subject, tmp_path / "plan", options), tmp_path / "out.onnx")
        for found, expected in zip(whole(tmp_path / "out.onnx", given), whole(path, given), strict=True):
            assert np.array_equal(found, expected)


def test_a_dry_run_and_costs_see_what_is_left(tmp_path):
    path, options = build.save(two_tasks(), tmp_path), CutOptions(stages=2)
    subject = examine_for(path, options, outputs=["q"], costs="measured")
    assert len(subject.graph.ops) == 3
    assert dry_run(subject, options).plan.outputs == ("q",)
