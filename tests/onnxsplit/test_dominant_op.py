"""Models whose ops are all inside one op: the message says so, and which file to use instead."""

from __future__ import annotations

import subprocess
import sys

import build
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import PartitionError
from onnxsplit.planning.planner import partition


def block(name: str, first: str, count: int) -> onnx.GraphProto:
    """A chain of ops, a body that reads ``first`` from outside."""
    nodes, last = [], first
    for step in range(count):
        nodes.append(helper.make_node("MatMul" if step % 2 else "Tanh", [last, "w"][: 1 + step % 2], [f"{name}{step}"]))
        last = f"{name}{step}"
    return helper.make_graph(nodes, name, [], [build.value(last, [4, 4])])


def weight() -> TensorProto:
    return build.constant("w", np.eye(4, dtype=np.float32))


def merged_decoder() -> onnx.ModelProto:
    """As Optimum writes decoder_model_merged.onnx: the model with and the model without a cache, in one If."""
    branches = {"then_branch": block("past", "x", 40), "else_branch": block("first", "x", 30)}
    node = helper.make_node("If", ["use_cache_branch"], ["logits"], name="optimum::if", **branches)
    inputs = [build.value("x", [4, 4]), build.value("use_cache_branch", [1], TensorProto.BOOL)]
    return build.model([node], inputs, [build.value("logits", [4, 4])], [weight()])


def one_loop() -> onnx.ModelProto:
    body = block("step", "state", 30)
    body.input.extend(
        [build.value("i", [], TensorProto.INT64), build.value("go", [], TensorProto.BOOL), build.value("state", [4, 4])]
    )
    body.node.append(helper.make_node("Identity", ["go"], ["on"]))
    body.output.insert(0, build.value("on", [], TensorProto.BOOL))
    times = build.constant("times", np.array(3, np.int64))
    node = helper.make_node("Loop", ["times", "", "x"], ["y"], name="repeat", body=body)
    return build.model([node], [build.value("x", [4, 4])], [build.value("y", [4, 4])], [weight(), times])


def one_scan() -> onnx.ModelProto:
    body = block("step", "row", 30)
    body.input.append(build.value("row", [4, 4]))
    node = helper.make_node("Scan", ["x"], ["y"], name="scan", body=body, num_scan_inputs=1)
    return build.model([node], [build.value("x", [3, 4, 4])], [build.value("y", [3, 4, 4])], [weight()])


def one_function() -> onnx.ModelProto:
    nodes = [helper.make_node("Tanh", [f"h{step}" if step else "a"], [f"h{step + 1}"]) for step in range(30)]
    function = helper.make_function("mine", "Net", ["a"], ["h30"], nodes, [helper.make_opsetid("", build.OPSET)])
    return build.model(
        [helper.make_node("Net", ["x"], ["y"], domain="mine", name="net")],
        [build.value("x", [4, 4])],
        [build.value("y", [4, 4])],
        functions=[function],
        opsets={"": build.OPSET, "mine": 1},
    )


CASES = [
    (
        merged_decoder,
        "the two branches of one If .op 'optimum::if': 30 and 40 ops; 0 are outside.*decoder_model.onnx and",
    ),
    (one_loop, "the body of one Loop .op 'repeat'.*Export one step"),
    (one_scan, "the body of one Scan .op 'scan'.*Export one step"),
    (one_function, "one call of the function 'Net'.*inline_local_functions"),
]


@pytest.mark.parametrize(("make", "words"), CASES)
@pytest.mark.parametrize("options", [{"stages": 2}, {"cut_at": ["x"]}, {"also_cut": ["nowhere"]}])
def test_a_model_in_one_op_is_explained_at_the_cut(tmp_path, make, words, options):
    model = build.save(make(), tmp_path)
    onnx.checker.check_model(str(model))
    with pytest.raises(PartitionError, match=f"cannot (be )?cut .*nearly the whole network lies in {words}"):
        partition(model, out=tmp_path / "m.plan", costs="analytic", **options)


def test_a_model_in_one_op_is_explained_where_no_number_of_stages_is_asked_for(tmp_path, python_environment):
    model = build.save(merged_decoder(), tmp_path)
    command = [sys.executable, "-m", "onnxsplit", "partition", str(model), "-o", "m.plan", "--costs", "analytic"]
    done = subprocess.run(command, cwd=tmp_path, env=python_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "It is one stage: nearly the whole network lies in the two branches of one If" in done.stdout


def test_a_function_is_put_in_place_by_the_command_that_is_named_and_can_be_cut(tmp_path):
    model = build.save(one_function(), tmp_path)
    with pytest.raises(PartitionError, match="Put the function's ops in its place: ") as refused:
        partition(model, stages=3, out=tmp_path / "m.plan", costs="analytic")
    command = str(refused.value).split("in its place: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert len(partition(tmp_path / "OUT.onnx", stages=3, out=tmp_path / "m.plan", costs="analytic").stages) == 3


def test_a_model_with_a_small_if_in_it_is_told_how_many_parts_it_has(tmp_path):
    with pytest.raises(PartitionError, match=r"its 7 ops form \d parts that can be separated"):
        partition(build.save(build.with_if(), tmp_path), stages=50, out=tmp_path / "m.plan", costs="analytic")
