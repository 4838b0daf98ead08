"""A batch axis is claimed only if the structure of the model proves it and trials agree."""

from __future__ import annotations

import build
import deceivers
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsplit.planning.planner import partition
from runtime import Pipeline

FREE = ["batch", 8]


def axes(proto, tmp_path, **options):
    plan = partition(build.save(proto, tmp_path), stages=2, out=tmp_path / "m.plan", rounds=0, **options)
    return {name: plan.tensors[name].batch_axis for name in (*plan.inputs, *plan.outputs)}


def model(*nodes, outputs, inputs=None, weights=()):
    inputs = inputs or [build.value("x", FREE)]
    return build.model(
        [helper.make_node(*node[:3], **(node[3:] or ({},))[0]) for node in nodes], inputs, outputs, weights
    )


def test_a_chain_has_a_batch_axis(tmp_path):
    assert axes(build.chain(4, 16), tmp_path) == {"x": 0, "y": 0}


def test_an_output_may_have_its_batch_on_another_axis(tmp_path):
    proto = model(
        ("Relu", ["x"], ["a"]),
        ("Transpose", ["a"], ["y"]),
        outputs=[build.value("y", [8, "batch"])],
    )
    assert axes(proto, tmp_path) == {"x": 0, "y": 1}


@pytest.mark.parametrize(
    "mixing",
    [
        ("ReduceMean", ["a", "axis"], ["m"], {"keepdims": 1}),
        ("ReduceMax", ["a", "axis"], ["m"], {"keepdims": 1}),
    ],
)
def test_a_model_whose_rows_affect_each_other_has_no_batch_axis(tmp_path, mixing):
    proto = model(
        ("Relu", ["x"], ["a"]),
        mixing,
        ("Sub", ["a", "m"], ["y"]),
        outputs=[build.value("y", FREE)],
        weights=[build.constant("axis", np.array([0], np.int64))],
    )
    assert axes(proto, tmp_path) == {"x": None, "y": None}


def test_one_output_without_it_spoils_it_for_all(tmp_path):
    proto = model(
        ("Relu", ["x"], ["y"]),
        ("ReduceSum", ["y"], ["total"], {"keepdims": 0}),
        outputs=[build.value("y", FREE), build.value("total", [])],
    )
    assert set(axes(proto, tmp_path).values()) == {None}


def test_an_input_for_all_rows_has_no_batch_axis_and_the_others_do(tmp_path):
    proto = model(
        ("Relu", ["x"], ["a"]),
        ("Mul", ["a", "scale"], ["y"]),
        inputs=[build.value("x", FREE), build.value("scale", [8])],
        outputs=[build.value("y", FREE)],
    )
    assert axes(proto, tmp_path) == {"x": 0, "scale": None, "y": 0}


def test_a_fixed_batch_cannot_be_proven(tmp_path):
    proto = model(
        ("Relu", ["x"], ["a"]),
        ("Tanh", ["a"], ["y"]),
        inputs=[build.value("x", [4, 8])],
        outputs=[build.value("y", [4, 8])],
    )
    assert axes(proto, tmp_path) == {"x": None, "y": None}


def test_costs_by_arithmetic_prove_nothing(tmp_path):
    assert axes(build.chain(4, 16), tmp_path, costs="analytic") == {"x": None, "y": None}


@pytest.mark.parametrize("net", deceivers.DECEIVERS, ids=lambda net: net.__name__)
def test_nothing_is_claimed_of_a_net_whose_rows_act_on_each_other(tmp_path, net):
    plan = partition(build.save(net(), tmp_path), stages=1, out=tmp_path / "m.plan", rounds=0, dims={"batch": 2})

    assert {spec.batch_axis for spec in plan.tensors.values()} == {None}
    assert plan.batch.why_not
    assert plan.batch.trials == 0


@pytest.mark.parametrize("net", deceivers.HONEST, ids=lambda net: net.__name__)
def test_rows_that_do_not_know_each_other_are_claimed(tmp_path, net):
    plan = partition(build.save(net(), tmp_path), stages=1, out=tmp_path / "m.plan", rounds=0)

    assert {name: plan.tensors[name].batch_axis for name in ("x", "y")} == {"x": 0, "y": 0}
    assert plan.batch.why_not == ""
    assert plan.batch.trials >= 3


def test_the_reason_names_the_op_that_mixes_rows(tmp_path):
    plan = partition(
        build.save(deceivers.sorted_over_the_batch(), tmp_path), stages=1, out=tmp_path / "m.plan", rounds=0
    )

    assert plan.batch.why_not == "op 'z' (TopK): it computes with the number of rows"


def test_a_token_model_has_its_batch_along_the_first_axis_and_not_along_the_sequence(tmp_path):
    proto = model(
        ("Gather", ["table", "ids"], ["h"]),
        ("Transpose", ["h"], ["t"], {"perm": [0, 2, 1]}),
        ("MatMul", ["h", "t"], ["scores"]),
        ("Softmax", ["scores"], ["p"], {"axis": -1}),
        ("MatMul", ["p", "h"], ["y"]),
        inputs=[build.value("ids", ["n", "sequence"], TensorProto.INT64)],
        outputs=[build.value("y", ["n", "sequence", 4])],
        weights=[build.constant("table", np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32))],
    )
    assert axes(proto, tmp_path) == {"ids": 0, "y": 0}


def test_a_model_that_groups_rows_only_at_some_lengths_has_no_batch_axis(tmp_path):
    """At 8 columns the shape [-1, 8] keeps rows apart; at others it does not."""
    proto = model(
        ("Reshape", ["x", "shape"], ["a"]),
        ("Softmax", ["a"], ["b"], {"axis": -1}),
        ("Shape", ["x"], ["s"]),
        ("Reshape", ["b", "s"], ["y"]),
        inputs=[build.value("x", ["batch", "columns"])],
        outputs=[build.value("y", ["batch", "columns"])],
        weights=[build.constant("shape", np.array([-1, 8], np.int64))],
    )
    assert axes(proto, tmp_path, dims={"columns": 8}) == {"x": None, "y": None}


def test_a_mask_of_one_row_that_may_have_more_is_not_the_same_for_all(tmp_path):
    proto = model(
        ("Mul", ["x", "mask"], ["m"]),
        ("Tanh", ["m"], ["y"]),
        inputs=[build.value("x", ["batch", 8]), build.value("mask", [8, "others"])],
        outputs=[build.value("y", [None, 8])],
    )
    assert axes(proto, tmp_path, dims={"batch": 8, "others": 8}) == {"x": None, "mask": None, "y": None}


def test_a_dimension_that_is_fixed_whatever_is_declared_does_not_hide_another(tmp_path):
    """p must be 6. The rows of z are only those of y while the batch of x is 1."""
    proto = model(
        ("MatMul", ["x", "w"], ["a"]),
        ("Add", ["a", "z"], ["y"]),
        inputs=[build.value("x", [3, "batch", "p"]), build.value("z", [1, "m", 5])],
        outputs=[build.value("y", [3, None, 5])],
        weights=[build.constant("w", np.ones((6, 5), np.float32))],
    )
    assert set(axes(proto, tmp_path, dims={"p": 6}).values()) == {None}


def test_a_scale_for_every_row_of_a_normalisation_is_not_the_same_for_all(tmp_path):
    proto = model(
        ("LayerNormalization", ["x", "g"], ["a"], {"axis": -1}),
        ("Tanh", ["a"], ["y"]),
        inputs=[build.value("x", [5, "batch", 6]), build.value("g", [1, "m", 6])],
        outputs=[build.value("y", [5, "batch", 6])],
    )
    assert axes(proto, tmp_path)["x"] != 1


def test_inputs_with_batches_of_their_own_names_run_whole_when_they_differ(tmp_path):
    proto = model(
        ("Relu", ["x"], ["a"]),
        ("Relu", ["z"], ["b"]),
        inputs=[build.value("x", ["n", 4]), build.value("z", ["m", 4])],
        outputs=[build.value("a", ["n", 4]), build.value("b", ["m", 4])],
    )
    partition(build.save(proto, tmp_path), stages=1, out=tmp_path / "m.plan", rounds=0)
    with Pipeline.launch(tmp_path / "m.plan", micro_batch=1) as pipeline:
        found = pipeline.run({"x": np.ones((3, 4), np.float32), "z": np.ones((5, 4), np.float32)})
    assert (found["a"].shape, found["b"].shape) == ((3, 4), (5, 4))
