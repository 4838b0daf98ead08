"""Two plans of one model are told from plans of different models, op by op and byte by byte."""

from __future__ import annotations

import build
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxsplit
from onnxsplit.planning.planner import partition
from onnxsplit.stages.same_model import why_not_same


def plan_of(model: onnx.ModelProto, folder, name: str, **options):
    partition(build.save(model, folder, f"{name}.onnx"), out=folder / f"{name}.plan", costs="analytic", **options)
    return folder / f"{name}.plan"


def test_cuts_of_one_model_are_the_same(tmp_path):
    early, late = (plan_of(build.chain(), tmp_path, name, cut_at=[name]) for name in ("h0", "h3"))
    assert why_not_same(early, late) is None
    narrow = plan_of(build.chain(6, 64), tmp_path, "narrow", stages=2, border="float16")
    plain = plan_of(build.chain(6, 64), tmp_path, "plain", stages=2)
    assert why_not_same(narrow, plain) is None
    onnxsplit.replan(plain, out=tmp_path / "anew.plan", speeds={"0": 0.1})
    if (tmp_path / "anew.plan").exists():
        assert why_not_same(plain, tmp_path / "anew.plan") is None


def one_bit(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[3]).copy()
    weight.view(np.uint32)[5, 7] ^= 1
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[3].name))


def another_op(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Sigmoid"


def one_more(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Neg", ["before"], ["y"]))


def another_type(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[3]).astype(np.float64)
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(weight, "wide"))
    model.graph.initializer[3].name = "w3"
    del model.graph.initializer[3]
    model.graph.initializer.append(numpy_helper.from_array(weight[:, :1].astype(np.float32), "w3"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (one_bit, "the weight 'w3' has other values"),
        (another_op, "the op that writes 'h1' differs"),
        (one_more, "the op that writes 'y' differs"),
        (another_type, "the weight 'w3' has another type or shape"),
    ],
)
def test_every_difference_is_named(tmp_path, change, what):
    one = plan_of(build.chain(width=128), tmp_path, "one", stages=2)
    model = build.chain(width=128)
    change(model)
    other = plan_of(model, tmp_path, "other", stages=2)
    assert why_not_same(one, other) == what


def test_weights_in_files_are_compared_too(tmp_path):
    plans = []
    for name, bit in (("one", 0), ("same", 0), ("other", 1)):
        model = build.chain(width=128)
        if bit:
            one_bit(model)
        (tmp_path / name).mkdir()
        onnx.save_model(
            model, str(tmp_path / name / "m.onnx"), save_as_external_data=True, size_threshold=0, location="m.data"
        )
        partition(tmp_path / name / "m.onnx", out=tmp_path / f"{name}.plan", stages=2, costs="analytic")
        plans.append(tmp_path / f"{name}.plan")
    inline = plan_of(build.chain(width=128), tmp_path, "inline", stages=3)
    assert why_not_same(plans[0], plans[1]) is None
    assert why_not_same(plans[0], inline) is None
    assert why_not_same(plans[0], plans[2]) == "the weight 'w3' has other values"
