from __future__ import annotations

import build
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import InputError
from onnxsplit.examine import examine
from onnxsplit.graph import build_graph
from onnxsplit.inputs import dimension_choices, synthesize
from onnxsplit.plan import TensorSpec
from onnxsplit.source import open_model


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
