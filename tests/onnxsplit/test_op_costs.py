"""The costs that a plan carries: what is written comes back, and a damaged file is refused."""

from __future__ import annotations

import build
import decoders
import numpy as np
import pytest

from onnxsplit.errors import PlanError
from onnxsplit.model.shapes import Shapes
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.op_costs import KnownCosts, load_costs, save_costs
from onnxsplit.planning.planner import partition

KNOWN = KnownCosts(
    op_ns={"a": 5, "a\0b": 0, "ü" * 300: 2**40},
    shapes=Shapes(
        {
            "a": TensorSpec(dtype="float32", shape=("batch", 3, "?")),
            "scalar": TensorSpec(dtype="int64", shape=()),
            "of any rank": TensorSpec(dtype="bfloat16", shape=None),
            "text": TensorSpec(dtype="string", shape=("batch", "2*seq")),
        },
        {"a": (2, 3, 0), "scalar": ()},
    ),
    batch_axes={"a": 0, "text": 1},
    left={"cuda:0": frozenset(["a"]), "webgpu": frozenset()},
    local=frozenset(["a\0b"]),
    together=(("a", "ü" * 300), ("a\0b",)),
)


@pytest.mark.parametrize("known", [KNOWN, KnownCosts({}, Shapes({}, {}))])
def test_costs_come_back_as_they_went(known, tmp_path):
    entry = save_costs(tmp_path, known)
    assert load_costs(tmp_path / entry.name) == known


def broken(stored: dict, name: str, array) -> dict:
    return {**stored, name: np.asarray(array)}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("op_ns", [1, 2]),
        ("op_ns", [1, 2, -3]),
        ("op_ns", [1.0, 2.0, 3.0]),
        ("type", [1, 2, 3, 99]),
        ("op.lengths", [1, 2, 3]),
        ("op.lengths", [-1, 2, 1]),
        ("op.text", [255] * 605),
        ("shape.numbers", [-9] * 5),
        ("size.lengths", [3]),
        ("batch_axis", [0, 1, 2, 100]),
        ("local", [3]),
        ("left.numbers", [-1]),
        ("together.numbers", [0, 2, 9]),
    ],
)
def test_costs_that_contradict_themselves_are_refused(name, array, tmp_path):
    entry = save_costs(tmp_path, KNOWN)
    stored = load_npz(tmp_path / entry.name)
    save_npz(tmp_path / entry.name, broken(stored, name, array))
    with pytest.raises(PlanError, match=r"costs\.npz cannot be used.*Partition the model again"):
        load_costs(tmp_path / entry.name)


def test_costs_without_a_part_are_refused(tmp_path):
    save_npz(tmp_path / "costs.npz", {"op_ns": np.zeros(3, np.int64)})
    with pytest.raises(PlanError, match="cannot be used"):
        load_costs(tmp_path / "costs.npz")


def test_a_plan_carries_the_times_of_all_ops_and_the_axes_of_all_tensors(tmp_path):
    partition(
        build.save(build.chain(4), tmp_path), stages=2, out=tmp_path / "m.plan", effort="quick", dims={"batch": 2}
    )
    plan = load_plan(tmp_path / "m.plan")
    assert plan.costs.ops in list(plan.files())
    known = load_costs(tmp_path / "m.plan" / plan.costs.ops.name)
    assert list(known.op_ns) == ["m0", "h0", "m1", "h1", "m2", "h2", "m3", "y"]
    assert sum(known.op_ns.values()) == pytest.approx(sum(s.reference_time_ns for s in plan.stages), abs=8)
    assert known.batch_axes == dict.fromkeys(["x", *known.op_ns], 0)
    assert known.shapes.sizes["m2"] == (2, 32)
    assert known.shapes.specs["m2"].shape == ("batch", 32)
    assert [stage.device_numbers for stage in plan.stages] == [(0,), (1,)]
    assert [device.name for device in plan.target.devices] == ["0", "1"]
    assert plan.target.stages == 2


def test_a_plan_of_a_decoder_says_what_stays_together(tmp_path):
    partition(build.save(decoders.gqa(), tmp_path), stages=2, out=tmp_path / "m.plan", effort="quick")
    plan = load_plan(tmp_path / "m.plan")
    known = load_costs(tmp_path / "m.plan" / plan.costs.ops.name)
    assert plan.decoder is not None
    assert known.together
    assert {name for group in known.together for name in group} <= known.op_ns.keys()
