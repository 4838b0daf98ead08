from __future__ import annotations

import build
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import InputError
from onnxsplit.model.example_inputs import dimension_choices, synthesize
from onnxsplit.model.graph import build_graph
from onnxsplit.model.source import open_model
from onnxsplit.npz import load_npz
from onnxsplit.plan import TensorSpec
from onnxsplit.planning.examine import examine
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify


def spec(*shape):
    return TensorSpec(dtype="float32", shape=shape)


def test_batch_is_one_and_pictures_have_the_usual_size():
    assert next(dimension_choices({"x": spec("N", 3, "h", "w")}, {})) == {"N": 1, "h": 224, "w": 224}


def test_given_sizes_stay():
    found = list(dimension_choices({"x": spec("N", 3, "h", "w")}, {"h": 48}))
    assert {choice["h"] for choice in found} == {48}


def test_many_free_dimensions_do_not_explode():
    specs = {f"i{k}": spec(*(f"d{k}{j}" for j in range(4))) for k in range(8)}
    assert len(list(dimension_choices(specs, {}))) <= 64


def test_an_unknown_dimension_names_those_there_are():
    with pytest.raises(InputError, match="free dimensions are: batch"):
        next(dimension_choices({"x": spec("batch", 3)}, {"bach": 1}))


def test_ids_lie_within_the_table_they_index_and_masks_are_ones(tmp_path):
    table = build.constant("table", np.zeros((7, 4), np.float32))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "weights"], ["y"]),
    ]
    kind = TensorProto.INT64
    inputs = [build.value("ids", ["b", 64], kind), build.value("mask", ["b", 64, 1], kind)]
    proto = build.model(nodes, inputs, [build.value("y", None)], [table])
    graph = build_graph(open_model(build.save(proto, tmp_path)))
    specs = {
        "ids": TensorSpec(dtype="int64", shape=("b", 64)),
        "mask": TensorSpec(dtype="int64", shape=("b", 64, 1)),
    }
    made = synthesize(graph, specs, {"ids": (1, 64), "mask": (1, 64, 1)})
    assert made["ids"].max() <= 6
    assert len(np.unique(made["ids"])) > 3
    assert made["mask"].min() == 1


def test_sizes_are_tried_until_the_model_runs(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = build.constant("w", np.ones((16, 2), np.float32))
    proto = build.model(nodes, [build.value("x", ["b", "width"])], [build.value("y", ["b", 2])], [weight])
    assert examine(build.save(proto, tmp_path), costs="measured").dims == {"b": 1, "width": 16}


def test_a_model_that_runs_on_nothing_falls_back_with_its_reason(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = build.constant("w", np.ones((1717, 2), np.float32))
    proto = build.model(nodes, [build.value("x", ["b", "width"])], [build.value("y", ["b", 2])], [weight])
    path = build.save(proto, tmp_path)
    subject = examine(path)
    assert subject.costs.source == "analytic"
    assert "--inputs" in (subject.note or "")
    with pytest.raises(InputError, match="ran on none"):
        examine(path, costs="measured")


def decoder(mask_name: str):
    """One attention step over a cache: the mask must be as long as the past and the new tokens together."""
    kind = TensorProto.INT64
    table = build.constant("table", np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["new"]),
        helper.make_node("Concat", ["past", "new"], ["present"], axis=1),
        helper.make_node("Transpose", ["present"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["new", "keys"], ["scores"]),
        helper.make_node("Cast", ["mask"], ["bias"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["bias", "one"], ["row"]),
        helper.make_node("Add", ["scores", "row"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"]),
        helper.make_node("MatMul", ["weights", "present"], ["y"]),
    ]
    inputs = [
        build.value("ids", ["batch", "sequence_length"], kind),
        build.value("mask", ["batch", mask_name], kind),
        build.value("past", ["batch", "past_sequence_length", 8]),
    ]
    outputs = [build.value("y", ["batch", "sequence_length", 8]), build.value("present", ["batch", mask_name, 8])]
    return build.model(nodes, inputs, outputs, [table, build.constant("one", np.array([1]))])


@pytest.mark.parametrize("name", ["past_sequence_length + sequence_length", "past_sequence_length + 1"])
def test_dimensions_that_are_formulas_get_the_sizes_they_say(tmp_path, name):
    path = build.save(decoder(name), tmp_path)
    subject = examine(path, costs="measured")
    sizes = subject.dims
    assert sizes[name] == sizes["past_sequence_length"] + sizes["sequence_length"]
    assert subject.inputs["mask"].shape == (1, sizes[name])
    assert partition(path, stages=2, out=tmp_path / "plan", rounds=0).dims == sizes


def test_an_empty_past_can_be_asked_for(tmp_path):
    path = build.save(decoder("past_sequence_length + sequence_length"), tmp_path)
    dims = {"past_sequence_length": 0, "sequence_length": 5}
    plan = partition(path, stages=2, out=tmp_path / "plan", dims=dims, rounds=1, costs="measured")
    assert plan.dims == {"batch": 1, **dims, "past_sequence_length + sequence_length": 5}
    assert load_npz(tmp_path / "plan" / "example.npz")["past"].shape == (1, 0, 8)
    assert all(found.good for found in verify(tmp_path / "plan", path))


def test_a_size_below_0_and_the_size_of_a_formula_are_refused(tmp_path):
    specs = {"x": spec("n", "n + 1"), "y": spec("m", "n-m")}
    assert next(dimension_choices(specs, {"n": 4, "m": 4})) == {"n": 4, "m": 4}
    with pytest.raises(InputError, match=r"'n \+ 1' follows from 'n'; give that instead: --dim n=N"):
        next(dimension_choices(specs, {"n + 1": 4}))
    with pytest.raises(InputError, match="at least 0"):
        next(dimension_choices(specs, {"n": -1}))
    with pytest.raises(InputError, match=r"'n-m' has no size of 0 to .* at n=3, m=4"):
        next(dimension_choices(specs, {"n": 3, "m": 4}))


def test_names_that_are_no_formulas_stay_free(tmp_path):
    names = ("foo bar", "unk__12", "Reshape_dim_0", "hidden-size")
    found = next(dimension_choices({"x": spec(*names)}, dict.fromkeys(names, 3)))
    assert found == dict.fromkeys(names, 3)


def graph_network(summed: str):
    """Messages along edges: nodes are looked up by edge_index, and summed at their targets."""
    kind = TensorProto.INT64
    weight = build.constant("w", np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32))
    constants = [
        weight, build.constant("from", np.array(0)), build.constant("to", np.array(1)),
        build.constant("last", np.array([1])),
    ]  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gather", ["edge_index", "from"], ["source"], axis=0),
        helper.make_node("Gather", ["edge_index", "to"], ["target"], axis=0),
        helper.make_node("Gather", ["h", "source"], ["message"], axis=0),
        helper.make_node("Shape", ["h"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Unsqueeze", ["target", "last"], ["column"]),
    ]
    if summed == "ScatterND":
        nodes.append(helper.make_node("ScatterND", ["zeros", "column", "message"], ["sum"], reduction="add"))
    else:
        nodes += [
            helper.make_node("Shape", ["message"], ["wide"]),
            helper.make_node("Expand", ["column", "wide"], ["rows"]),
            helper.make_node("ScatterElements", ["zeros", "rows", "message"], ["sum"], axis=0, reduction="add"),
        ]
    nodes.append(helper.make_node("Relu", ["sum"], ["y"]))
    inputs = [build.value("x", ["num_nodes", 4]), build.value("edge_index", [2, "num_edges"], kind)]
    return build.model(nodes, inputs, [build.value("y", ["num_nodes", 4])], constants)


@pytest.mark.parametrize("summed", ["ScatterElements", "ScatterND"])
def test_integers_that_index_another_input_stay_within_it(tmp_path, summed):
    path = build.save(graph_network(summed), tmp_path)
    assert examine(path, costs="measured").inputs["x"].shape == (1, 4)
    subject = examine(path, costs="analytic", dims={"num_nodes": 7, "num_edges": 40})
    edges = subject.inputs["edge_index"]
    assert edges.shape == (2, 40)
    assert edges.max() == 6
