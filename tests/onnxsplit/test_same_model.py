"""Two plans of one model are told from plans of different models, op by op and byte by byte."""

from __future__ import annotations

import hashlib

import build
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxsplit
from onnxsplit.errors import PlanError
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


def with_stored(tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
    """The chain, after which ops hold the tensors: in an attribute, or in a branch if they are numbers of a matrix."""
    model = build.chain(width=64)
    model.graph.node[-1].output[0] = "last"
    inner, last = tensors
    branch = [helper.make_node("Mul", ["last", inner.name], ["made"])]
    ends = [onnx.helper.make_tensor_value_info("made", onnx.TensorProto.FLOAT, None)]
    one, other = (helper.make_graph(branch, name, [], ends, [inner]) for name in ("then", "else"))
    model.graph.node.extend(
        [
            helper.make_node("If", ["flag"], ["chosen"], then_branch=one, else_branch=other),
            helper.make_node("Constant", [], ["held"], value=last),
            helper.make_node("Add", ["chosen", "held"], ["y"]),
        ]
    )
    model.graph.input.append(build.value("flag", [], onnx.TensorProto.BOOL))
    return model


def stored(folder, name: str, values, *, outside: bool, **options):
    """A plan of the chain with two matrices in a branch and in an attribute, which lie in a file with ``outside``."""
    model = with_stored([numpy_helper.from_array(array, tensor) for tensor, array in zip("ab", values, strict=True)])
    (folder / name).mkdir()
    onnx.save_model(
        model,
        str(folder / name / "m.onnx"),
        save_as_external_data=outside,
        size_threshold=0,
        location="m.data",
        convert_attribute=True,
    )
    partition(folder / name / "m.onnx", out=folder / f"{name}.plan", costs="analytic", **options)
    return folder / f"{name}.plan"


def test_weights_in_branches_and_attributes_are_compared_wherever_they_lie(tmp_path):
    values = [np.full((64, 64), value, np.float32) for value in (1, 2)]
    plans = [
        stored(tmp_path, f"{stages}-{outside}", values, outside=outside, stages=stages)
        for stages in (2, 3)
        for outside in (False, True)
    ]
    assert [why_not_same(plans[0], plan) for plan in plans] == [None] * 4
    for place, op in ((0, "chosen"), (1, "held")):
        changed = [array.copy() for array in values]
        changed[place][5, 7] += 1e-6
        other = stored(tmp_path, f"other-{place}", changed, outside=True, stages=2)
        assert why_not_same(plans[1], other) == f"the op that writes {op!r} differs"
        assert why_not_same(plans[0], other) == f"the op that writes {op!r} differs"


def test_defaults_of_inputs_are_compared(tmp_path):
    plans = []
    for number in (1.0, 1.0, 2.0):
        model = build.chain()
        model.graph.node[-1].output[0] = "last"
        model.graph.node.append(helper.make_node("Mul", ["last", "scale"], ["y"]))
        model.graph.input.append(build.value("scale", [1]))
        model.graph.initializer.append(numpy_helper.from_array(np.array([number], np.float32), "scale"))
        plans.append(plan_of(model, tmp_path, str(len(plans)), stages=2 + len(plans) % 2, keep_inputs=["scale"]))
    assert why_not_same(*plans[:2]) is None
    assert why_not_same(plans[0], plans[2]) == "the weight 'scale' has other values"


def test_the_way_that_numbers_are_stored_makes_no_difference(tmp_path):
    def labelled(labels: list[str]) -> onnx.ModelProto:
        model = build.chain()
        model.graph.initializer.append(helper.make_tensor("labels", onnx.TensorProto.STRING, [2], labels))
        model.graph.node.extend(
            [
                helper.make_node("Equal", ["labels", "labels"], ["same"]),
                helper.make_node("Cast", ["same"], ["number"], to=onnx.TensorProto.FLOAT),
                helper.make_node("DequantizeLinear", ["small", "step"], ["wide"]),
                helper.make_node("Add", ["number", "wide"], ["z"]),
            ]
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "step"))
        model.graph.output.append(build.value("z", [2]))
        return model

    plans = []
    for labels, raw in ((["a", "b\0c"], False), (["a", "b\0c"], True), (["a\0b", "c"], True)):
        model = labelled(labels)
        small = helper.make_tensor("small", onnx.TensorProto.INT4, [2], b"\x7e" if raw else [-2, 7], raw=raw)
        model.graph.initializer.append(small)
        model.opset_import[0].version = 21
        model.ir_version = 10
        plans.append(plan_of(model, tmp_path, str(len(plans)), stages=2))
    assert why_not_same(*plans[:2]) is None
    assert why_not_same(plans[1], plans[2]) == "the weight 'labels' has other values"


def shared_weight() -> onnx.ModelProto:
    """A chain whose second and last products have one weight."""
    model = build.chain(width=64)
    weights = [node for node in model.graph.node if node.op_type == "MatMul"]
    weights[-1].input[1] = weights[1].input[1]
    return model


def test_every_copy_of_a_weight_is_compared(tmp_path):
    plan, changed = (plan_of(shared_weight(), tmp_path, name, stages=2) for name in ("plan", "changed"))
    names = [{each.name for each in onnx.load(changed / f"stage{stage}.onnx").graph.initializer} for stage in (0, 1)]
    assert "w1" in names[0] & names[1], "the test is about a weight that both stages have"
    assert why_not_same(plan, changed) is None

    part = onnx.load(changed / "stage1.onnx")
    held = next(each for each in part.graph.initializer if each.name == "w1")
    array = numpy_helper.to_array(held).copy()
    array.view(np.uint32)[5, 7] ^= 1
    held.CopyFrom(numpy_helper.from_array(array, "w1"))
    onnx.save(part, changed / "stage1.onnx")
    with pytest.raises(PlanError, match=r"stage1.onnx: its SHA-256 is not the plan's"):
        why_not_same(plan, changed)

    text = (changed / "plan.json").read_text()
    old = hashlib.sha256((plan / "stage1.onnx").read_bytes()).hexdigest()
    content = (changed / "stage1.onnx").read_bytes()
    assert len(content) == (plan / "stage1.onnx").stat().st_size
    (changed / "plan.json").write_text(text.replace(old, hashlib.sha256(content).hexdigest()))
    assert why_not_same(plan, changed) == "the weight 'w1' has other values"
