"""Models that ONNX Runtime's optimiser saved: cut, merged, and loaded at every level."""

from __future__ import annotations

from pathlib import Path

import build
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import ModelRefused
from onnxsplit.model.ort_optimised import is_ort_optimised, rename_initializers
from onnxsplit.model.source import open_model
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import partition, write_plan
from onnxsplit.session import open_session
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import run_stages, verify

LEVELS = ("disabled", "basic", "extended", "all")


class Net:
    """Builder of a network with random weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self._random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"{kind}{len(self.nodes)}", **attributes))
        return out

    def weight(self, *shape: int) -> str:
        return self.constant((self._random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32))

    def constant(self, value) -> str:
        self.weights.append(build.constant(f"w{len(self.weights)}", value))
        return self.weights[-1].name

    def linear(self, x: str, width: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(width, width)), self.weight(width))

    def finished(self, last: str, shape) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [last], ["y"]))
        return build.model(self.nodes, [build.value("x", shape)], [build.value("y", None)], self.weights)


def attention() -> onnx.ModelProto:
    """Two blocks of a transformer at fixed sizes, whose reshapes for Gemm ONNX Runtime 1.32 names twice."""
    net, last = Net(), "x"
    heads, joined = net.constant(np.array([2, 4, 4, 4])), net.constant(np.array([2, 4, 16]))
    for _ in range(2):
        normed = net.op("LayerNormalization", net.linear(last, 16), net.weight(16), net.weight(16), axis=-1)
        parts = [net.op("Reshape", net.linear(normed, 16), heads) for _ in range(2)]
        parts.append(net.op("Reshape", net.op("MatMul", normed, net.weight(16, 16)), heads))
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        q, k, v = (net.op("Transpose", part, perm=order) for part, order in zip(parts, orders, strict=True))
        scores = net.op("Softmax", net.op("Div", net.op("MatMul", q, k), net.constant(np.float32(2))))
        mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        last = net.op("Add", net.linear(net.op("Reshape", mixed, joined), 16), normed)
    return net.finished(last, [2, 4, 16])


def convolutions() -> onnx.ModelProto:
    """Convolutions with normalisation, residuals and pooling; the level 'all' gives them a blocked layout."""
    net, last = Net(), "x"
    for step in range(3):
        made = net.op("Conv", last, net.weight(16, 16 if step else 3, 3, 3), pads=[1] * 4)
        ones = [net.constant(np.full(16, value, np.float32)) for value in (1.1, 0.1, 0.0, 1.0)]
        made = net.op("Relu", net.op("BatchNormalization", made, *ones))
        last = net.op("Add", made, last) if step else made
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.op("MaxPool", last, kernel_shape=[2, 2])))
    return net.finished(net.linear(pooled, 16), ["n", 3, 8, 8])


def quantised() -> onnx.ModelProto:
    net, last = Net(), "x"
    scale, zero, zero_weight = (net.constant(v) for v in (np.float32(0.05), np.uint8(128), np.int8(0)))
    small = net.constant(np.float32(0.004))
    for step in range(3):
        last = net.op("DequantizeLinear", net.op("QuantizeLinear", last, scale, zero), scale, zero)
        weight = net.constant(np.random.default_rng(step).integers(-90, 90, (8, 8 if step else 3, 3, 3), np.int8))
        weight = net.op("DequantizeLinear", weight, small, zero_weight)
        last = net.op("Relu", net.op("Conv", last, weight, pads=[1] * 4))
    last = net.op("DequantizeLinear", net.op("QuantizeLinear", last, scale, zero), scale, zero)
    return net.finished(last, ["n", 3, 8, 8])


def perceptron() -> onnx.ModelProto:
    net, last = Net(), "x"
    for _ in range(4):
        last = net.op("Relu", net.linear(last, 16))
    return net.finished(net.op("MatMul", net.weight(4, 2), last), [2, 16])


NETS = {make.__name__: make for make in (attention, convolutions, quantised, perceptron)}
SHAPES = {"attention": (2, 4, 16), "convolutions": (2, 3, 8, 8), "quantised": (2, 3, 8, 8), "perceptron": (2, 16)}


def inputs_of(name: str) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal(SHAPES[name]).astype(np.float32)}


def saved(model: Path, level: str, name: str) -> Path:
    """Return the model that ONNX Runtime's optimiser saves."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(model.parent / name)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return model.parent / name


def check(model: Path, folder: Path, inputs, *, costs: str) -> Path:
    """Cut a model in two and at many tensors; stages and merged model load at every level with equal results."""
    expected = open_session(model, threads=1, level="disabled").run(inputs)["y"]
    subject = examine(model, costs=costs, inputs=inputs, threads=1)
    assert subject.costs.source == costs
    for stages in dict.fromkeys((min(6, len(subject.atoms.ops)), min(2, len(subject.atoms.ops)))):
        plan = write_plan(subject, folder / "plan", CutOptions(stages=stages, rounds=0, strategy="layer")).plan
        merge(folder / "plan", folder / "merged.onnx")
        for level in LEVELS:
            found = run_stages(folder / "plan", plan, inputs, threads=1, level=level)["y"]
            merged = open_session(folder / "merged.onnx", threads=1, level=level).run(inputs)["y"]
            for result in (found, merged):
                assert np.abs(result - expected).max() <= 0.051, level  # one quantisation step
        assert all(comparison.exact for comparison in verify(folder / "plan", model))
    return folder / "merged.onnx"


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("name", NETS)
def test_a_model_that_the_optimiser_saved_is_cut_and_merged(tmp_path, name, level):
    model = saved(build.save(NETS[name](), tmp_path), level, "saved.onnx")
    check(model, tmp_path, inputs_of(name), costs="analytic")


@pytest.mark.parametrize(("name", "level"), [("attention", "basic"), ("convolutions", "all")])
def test_a_saved_model_is_cut_by_measured_costs(tmp_path, name, level):
    """ONNX Runtime refuses the attention saved at 'basic' at any higher level; the stages load at all."""
    model = saved(build.save(NETS[name](), tmp_path), level, "saved.onnx")
    check(model, tmp_path, inputs_of(name), costs="measured")


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("name", ["attention", "convolutions"])
def test_a_model_that_was_saved_cut_merged_and_saved_again_is_cut_again(tmp_path, name, level):
    model = saved(build.save(NETS[name](), tmp_path), "basic", "saved.onnx")
    for turn in range(2):
        merged = check(model, tmp_path, inputs_of(name), costs="analytic")
        model = saved(merged, level, f"again{turn}.onnx")
    check(model, tmp_path, inputs_of(name), costs="analytic")


def test_a_stage_that_the_optimiser_saved_is_cut_merged_and_loaded(tmp_path):
    model = build.save(attention(), tmp_path)
    partition(model, stages=2, out=tmp_path / "whole", costs="analytic", strategy="layer")
    plan, inputs = load_plan(tmp_path / "whole"), inputs_of("attention")
    values = run_stages(tmp_path / "whole", plan, inputs, threads=1, level="disabled")
    stage = saved(tmp_path / "whole" / plan.stages[1].file, "basic", "saved.onnx")
    check(stage, tmp_path, {name: values[name] for name in plan.stages[1].inputs}, costs="analytic")


def test_borders_and_the_caller_s_tensors_keep_their_names(tmp_path):
    model = saved(build.save(attention(), tmp_path), "basic", "saved.onnx")
    written = {name for node in onnx.load(model).graph.node for name in node.output}
    plan = partition(model, stages=3, out=tmp_path / "plan", costs="analytic", strategy="layer")
    assert (plan.inputs, plan.outputs) == (("x",), ("y",))
    assert {cut.tensor for cut in plan.cuts} <= written


def test_a_model_that_was_not_saved_by_the_optimiser_keeps_its_names(tmp_path):
    model = build.save(attention(), tmp_path)
    assert open_model(model).proto == onnx.load(model)


def test_new_names_reach_bodies_and_annotations_and_leave_the_caller_s_alone():
    """A subgraph that defines the name itself, an input with a default, and an output keep their names."""
    then = helper.make_graph([helper.make_node("Add", ["x", "w_token_1"], ["a"])], "then", [], [build.value("a", None)])
    shadow = build.constant("w_token_1", np.float32(7))
    other = helper.make_graph(
        [helper.make_node("Add", ["x", "w_token_1"], ["b"])], "other", [], [build.value("b", None)], [shadow]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["c"], then_branch=then, else_branch=other),
        helper.make_node("Mul", ["c", "default_token_2"], ["y"]),
    ]
    names = ("w_token_1", "default_token_2", "given_token_3")
    constants = [build.constant(name, np.float32(2)) for name in names] + [build.constant("yes", np.bool_(True))]
    inputs = [build.value("x", []), build.value("default_token_2", [])]
    proto = build.model(nodes, inputs, [build.value("y", []), build.value("given_token_3", [])], constants)
    annotation = proto.graph.quantization_annotation.add(tensor_name="c")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w_token_1")
    assert is_ort_optimised(proto)
    rename_initializers(proto)
    once = proto.SerializeToString(deterministic=True)
    rename_initializers(proto)
    assert proto.SerializeToString(deterministic=True) == once
    new, default, given, _ = (tensor.name for tensor in proto.graph.initializer)
    assert new != "w_token_1"
    assert (default, given) == names[1:]
    bodies = {attribute.name: attribute.g for attribute in proto.graph.node[0].attribute}
    assert bodies["then_branch"].node[0].input[1] == new
    assert bodies["else_branch"].node[0].input[1] == "w_token_1"
    assert annotation.quant_parameter_tensor_names[0].value == new
    onnx.checker.check_model(proto)


def test_a_level_at_which_a_model_is_refused_is_not_chosen(tmp_path):
    """ONNX Runtime may change how it treats the whole model; the plan's level must be one at which it loads."""
    model = saved(build.save(attention(), tmp_path), "basic", "saved.onnx")
    refused = []
    for level in LEVELS:
        try:
            open_session(model, threads=1, level=level)
        except ModelRefused:
            refused.append(level)
    plan = partition(model, stages=2, out=tmp_path / "plan", costs="measured", rounds=1)
    assert plan.costs.whole_optimization_level not in refused
