"""Tensors of narrow float types between real nodes: through shared memory, and as frames where that is off."""

from __future__ import annotations

import build
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from runtime import Pipeline

KINDS = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8e5m2": TensorProto.FLOAT8E5M2,
}


def every_kind(*, with_strings: bool) -> onnx.ModelProto:
    """x, in float32, crosses in every narrow type and is returned in it and as float32; strings cross, too."""
    nodes, inputs, outputs = [], [build.value("x", ["n", "m"])], []
    if with_strings:
        nodes += [
            helper.make_node("Identity", ["s"], ["s.crossing"]),
            helper.make_node("Identity", ["s.crossing"], ["t"]),
        ]
        inputs.append(build.value("s", ["n"], TensorProto.STRING))
        outputs.append(build.value("t", ["n"], TensorProto.STRING))
    for name, kind in KINDS.items():
        nodes += [
            helper.make_node("Cast", ["x"], [f"{name}.crossing"], to=kind),
            helper.make_node("Cast", [f"{name}.crossing"], [f"{name}.wide"], to=TensorProto.FLOAT),
            helper.make_node("Cast", [f"{name}.wide"], [name], to=kind),
        ]
        outputs += [build.value(name, ["n", "m"], kind), build.value(f"{name}.wide", ["n", "m"])]
    return build.model(nodes, inputs, outputs, opsets={"": 19})


@pytest.mark.parametrize(("shared_memory", "with_strings"), [(True, False), (True, True), (False, True)])
def test_every_narrow_type_and_strings_cross_between_nodes(tmp_path, shared_memory, with_strings):
    model, folder = build.save(every_kind(with_strings=with_strings), tmp_path), tmp_path / "m.plan"
    crossing = [f"{name}.crossing" for name in ("s", *KINDS) if with_strings or name != "s"]
    plan = partition(model, cut_at=crossing, out=folder, costs="analytic")
    assert {cut.tensor for cut in plan.cuts} == set(crossing)
    given = {"x": np.linspace(-3, 3, 3 * 65536, dtype=np.float32).reshape(3, 65536)}
    if with_strings:
        given["s"] = np.array(["a", "", "b \u20ac"], dtype=object)
    expected = open_session(model, threads=1, level="disabled").run(given)
    with Pipeline.launch(folder, shared_memory=shared_memory) as pipeline:
        answers = [pipeline.run(given) for _ in range(3)]  # later ones are written in place, once shapes are known
        shared = sum(stats.shared_bytes for stats in pipeline.stats())
    assert (shared > 0) == shared_memory
    for found in answers:
        assert found["bfloat16"].dtype == ml_dtypes.bfloat16
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array)
