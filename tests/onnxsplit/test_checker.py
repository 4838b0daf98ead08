"""ONNX's checker accepts every stage and every merged model, for every kind of source."""

from __future__ import annotations

import build
import numpy as np
import onnx
import pytest
from checked import check_plan
from onnx import TensorProto, helper

from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from onnxsplit.stages.verify import verify


def of_2018() -> onnx.ModelProto:
    """IR 3, opset 7: every initializer must be listed as an input."""
    source, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for step in range(4):
        weights.append(build.constant(f"w{step}", source.standard_normal((3, 3, 3, 3)).astype(np.float32) / 5))
        nodes.append(helper.make_node("Conv", [last, f"w{step}"], [f"c{step}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{step}"], [last := f"r{step}"]))
    inputs = [build.value("x", [1, 3, 8, 8]), *(build.value(tensor.name, list(tensor.dims)) for tensor in weights)]
    outputs = [build.value(last, [1, 3, 8, 8]), build.value("w1", [3, 3, 3, 3])]
    return build.model(nodes, inputs, outputs, weights, ir_version=3, opsets={"": 7})


def overridable() -> onnx.ModelProto:
    proto = build.chain(4)
    proto.graph.input.extend([build.value("w1", [32, 32]), build.value("w2", [32, 32])])
    return proto


def passing_through() -> onnx.ModelProto:
    proto = build.chain(3)
    proto.graph.output.extend([build.value("x", ["batch", 32]), build.value("w1", [32, 32])])
    return proto


def with_sparse_weight() -> onnx.ModelProto:
    proto = build.chain(3, width=4)
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(build.constant("bias", np.ones(2, np.float32)))
    sparse.indices.CopyFrom(build.constant("", np.array([1, 3], np.int64)))
    proto.graph.node.append(helper.make_node("Add", ["y", "bias"], ["z"]))
    proto.graph.output.append(build.value("z", ["batch", 4]))
    return proto


def quantised() -> onnx.ModelProto:
    constants = [build.constant("scale", np.float32(0.1)), build.constant("zero", np.uint8(128))]
    nodes, last = [], "x"
    for step in range(3):
        nodes.append(helper.make_node("Tanh", [last], [f"t{step}"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"t{step}", "scale", "zero"], [f"q{step}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{step}", "scale", "zero"], [last := f"d{step}"]))
    proto = build.model(nodes, [build.value("x", [4, 4])], [build.value("d2", [4, 4])], constants)
    annotation = proto.graph.quantization_annotation.add(tensor_name="t1")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    return proto


def loop_and_sequence() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["more"], ["again"]), helper.make_node("Add", ["sum", "h"], ["next"])],
        "body",
        [
            build.value("step", [], TensorProto.INT64),
            build.value("more", [], TensorProto.BOOL),
            build.value("sum", [4]),
        ],
        [build.value("again", [], TensorProto.BOOL), build.value("next", [4])],
    )
    nodes = [
        helper.make_node("Tanh", ["x"], ["h"]),
        helper.make_node("Loop", ["times", "", "x"], ["looped"], body=body),
        helper.make_node("SequenceConstruct", ["looped", "h"], ["both"]),
        helper.make_node("ConcatFromSequence", ["both"], ["joined"], axis=0),
        helper.make_node("Relu", ["joined"], ["y"]),
    ]
    return build.model(
        nodes, [build.value("x", [4])], [build.value("y", [8])], [build.constant("times", np.array(3, np.int64))]
    )


def functions() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Mixed", ["x", "w"], ["a"], domain="mine"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("Mixed", ["b", "x"], ["y"], domain="mine"),
    ]
    weight = build.constant("w", np.ones((4, 4), np.float32))
    return build.model(
        nodes, [build.value("x", [4, 4])], [build.value("y", [4, 4])], [weight],
        functions=build.mixed_functions(), opsets={"": build.OPSET, "mine": 1},
    )  # fmt: skip


KINDS = {
    make.__name__: make
    for make in (
        of_2018, overridable, passing_through, with_sparse_weight, quantised, loop_and_sequence, functions,
        build.chain, build.diamond, build.with_if, build.echo, build.heads,
    )
}  # fmt: skip


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stages_and_merged_models_pass_the_checker(tmp_path, kind, external):
    proto, model = KINDS[kind](), tmp_path / "model.onnx"
    onnx.checker.check_model(proto)
    onnx.save(proto, model, save_as_external_data=external, location="w.bin", size_threshold=0)
    for stages in (2, 3):
        partition(model, stages=stages, out=tmp_path / "m.plan", costs="analytic")
        check_plan(tmp_path / "m.plan", model)


def test_shapes_are_known_behind_an_input_and_a_weight_that_are_outputs(tmp_path):
    """Before, inference treated the shapes of such outputs, and of all tensors computed from them, as unknown."""
    plan = partition(build.save(passing_through(), tmp_path), stages=3, out=tmp_path / "m.plan", costs="analytic")
    assert all(spec.shape is not None for spec in plan.tensors.values())
    assert all(cut.bytes for cut in plan.cuts)


def test_a_model_of_2018_gives_the_same_in_stages_and_merged(tmp_path):
    model = build.save(of_2018(), tmp_path)
    partition(model, stages=3, out=tmp_path / "m.plan", rounds=1)
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))
    check_plan(tmp_path / "m.plan", model)
    inputs = {"x": np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)}
    whole, merged = (
        open_session(file, threads=1, level="disabled").run(inputs) for file in (model, tmp_path / "merged.onnx")
    )
    assert all(np.array_equal(whole[name], merged[name]) for name in whole)
