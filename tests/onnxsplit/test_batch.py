"""A batch axis is what was proven to be one."""

from __future__ import annotations

import build
import numpy as np
import pytest
from onnx import helper

from onnxsplit.planner import partition

FREE = ["batch", 8]


def axes(proto, tmp_path, **options):
    plan = partition(build.save(proto, tmp_path), stages=2, out=tmp_path / "m.plan", rounds=0, **options)
    return {name: plan.tensors[name].batch_axis for name in (*plan.inputs, *plan.outputs)}


def model(*nodes, outputs, inputs=None, weights=()):
    inputs = inputs or [build.value("x", FREE)]
    return build.model(
        [helper.make_node(*node[:3], **(node[3:] or ({},))[0]) for node in nodes], inputs, outputs, weights
    )


def test_a_chain_has_one(tmp_path):
    assert axes(build.chain(4, 16), tmp_path) == {"x": 0, "y": 0}


def test_an_output_may_have_it_elsewhere(tmp_path):
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
def test_a_model_whose_rows_know_each_other_has_none(tmp_path, mixing):
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


def test_an_input_for_all_rows_has_none_and_the_others_do(tmp_path):
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
