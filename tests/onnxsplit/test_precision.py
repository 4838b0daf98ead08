"""Half precision: types come from the model, not from kernels, and comparisons allow for its rounding."""

from __future__ import annotations

import json
import subprocess
import sys

import build
import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxsplit.cost import levels
from onnxsplit.distance import LEAST_TOLERANCE, distance, tolerance
from onnxsplit.effort import EFFORTS
from onnxsplit.model.precision import computed_types
from onnxsplit.npz import load_npz
from onnxsplit.planning.examine import examine
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from onnxsplit.stages.comparison import Comparison
from onnxsplit.stages.merge import merge
from onnxsplit.stages.model_file import file_entry
from onnxsplit.stages.verify import run_stages, verify

HALF = TensorProto.FLOAT16


def half_chain(length: int = 6, width: int = 32, *, float32_io: bool = False) -> onnx.ModelProto:
    """(LayerNormalization, MatMul, Tanh) * length in float16, between casts when its inputs are float32."""
    source = np.random.default_rng(0)
    kind = TensorProto.FLOAT if float32_io else HALF
    nodes, weights = [], [build.constant("one", np.ones(width, np.float16))]
    last, end = "x", "y"
    if float32_io:
        nodes.append(helper.make_node("Cast", ["x"], ["narrow"], to=HALF))
        last, end = "narrow", "wide"
    for step in range(length):
        weights.append(build.constant(f"w{step}", (source.standard_normal((width, width)) / 6).astype(np.float16)))
        out = end if step == length - 1 else f"h{step}"
        nodes += [
            helper.make_node("LayerNormalization", [last, "one"], [f"n{step}"]),
            helper.make_node("MatMul", [f"n{step}", f"w{step}"], [f"m{step}"]),
            helper.make_node("Tanh", [f"m{step}"], [out]),
        ]
        last = out
    if float32_io:
        nodes.append(helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.FLOAT))
    return build.model(nodes, [build.value("x", ["n", width], kind)], [build.value("y", ["n", width], kind)], weights)


def with_ops_that_inference_does_not_know(width: int = 32) -> onnx.ModelProto:
    """Float16 with ops that only ONNX Runtime knows, and no declared types behind them."""
    source = np.random.default_rng(0)
    weights = [
        build.constant(f"w{step}", (source.standard_normal((width, width)) / 6).astype(np.float16)) for step in range(3)
    ]
    nodes = [
        helper.make_node("Trilu", ["x"], ["a"], domain="com.microsoft"),
        helper.make_node("MatMul", ["a", "w0"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w1"], ["d"]),
        helper.make_node("Trilu", ["d"], ["e"], domain="com.microsoft", upper=0),
        helper.make_node("MatMul", ["e", "w2"], ["f"]),
        helper.make_node("Sigmoid", ["f"], ["y"]),
    ]
    ends = ([build.value("x", ["n", width], HALF)], [build.value("y", ["n", width], HALF)])
    return build.model(nodes, *ends, weights, ir_version=8, opsets={"": 17, "com.microsoft": 1})


def plainly(path, given):
    """Return the outputs of a plain session on a model file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: given[v.name] for v in session.get_inputs()}), strict=True))


@pytest.mark.parametrize(
    ("proto", "stages"),
    [(half_chain(), 3), (half_chain(float32_io=True), 2), (with_ops_that_inference_does_not_know(), 3)],
)
def test_a_float16_model_is_cut_at_default_settings(tmp_path, proto, stages):
    """Profiles show float32 where kernels run between casts; the stages once declared that."""
    model, folder = build.save(proto, tmp_path), tmp_path / "m.plan"
    plan = partition(model, stages=stages, out=folder)
    assert plan.costs.source == "measured"
    assert len(plan.stages) == stages
    given = load_npz(folder / plan.example_inputs.name)
    values = dict(given)
    for stage in plan.stages:
        values |= plainly(folder / stage.file, values)
    whole = plainly(model, given)
    assert distance(values["y"], whole["y"]) <= tolerance(["float16"])
    merge(folder, tmp_path / "merged.onnx")
    assert distance(plainly(tmp_path / "merged.onnx", given)["y"], whole["y"]) == 0
    assert all(c.good and c.narrowest == "float16" for c in verify(folder, model))


def test_types_that_inference_does_not_find_are_those_of_the_model_and_not_of_kernels(tmp_path):
    subject = examine(build.save(with_ops_that_inference_does_not_know(), tmp_path), costs="measured")
    written = {name: subject.shapes.specs[name].dtype for name in subject.graph.producer}
    assert written == dict.fromkeys("abcdefy", "float16")
    assert subject.shapes.sizes["c"] == (1, 32)


def test_the_tolerance_follows_the_narrowest_float_type():
    assert tolerance(["float32", "int64", "string"]) == tolerance([]) == LEAST_TOLERANCE
    order = [tolerance([kind]) for kind in ("float32", "float16", "bfloat16", "float8e4m3fn", "float8e5m2")]
    assert order == sorted(set(order))
    assert tolerance(["float16", "bfloat16", "float32"]) == tolerance(["bfloat16"])


def test_weights_stored_in_fewer_bits_widen_no_tolerance(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), ml_dtypes.bfloat16), "stored")
    nodes = [
        helper.make_node("Cast", ["stored"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    proto = build.model(nodes, [build.value("x", [1, 4])], [build.value("y", [1, 4])], [weight])
    subject = examine(build.save(proto, tmp_path), costs="analytic")
    assert computed_types(subject.graph, subject.shapes) == {"float32"}


def test_a_body_that_computes_in_float16_widens_the_tolerance(tmp_path):
    half = [
        helper.make_node("Cast", ["x"], ["a"], to=HALF),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
    ]
    branches = {
        "then_branch": helper.make_graph(half, "then", [], [build.value("b", None)]),
        "else_branch": helper.make_graph([helper.make_node("Neg", ["x"], ["c"])], "else", [], [build.value("c", None)]),
    }
    proto = build.model(
        [helper.make_node("If", ["when"], ["y"], **branches)],
        [build.value("x", [4]), build.value("when", [], TensorProto.BOOL)],
        [build.value("y", [4])],
    )
    subject = examine(build.save(proto, tmp_path), costs="analytic")
    assert "float16" in computed_types(subject.graph, subject.shapes)


def test_verify_says_which_tolerance_it_holds_and_why(tmp_path, python_environment):
    model, folder = build.save(half_chain(), tmp_path), tmp_path / "m.plan"
    partition(model, stages=2, out=folder, costs="analytic")

    def said(*more: str) -> str:
        command = [sys.executable, "-m", "onnxsplit", "verify", str(folder), str(model), *more]
        return subprocess.run(command, capture_output=True, text=True, env=python_environment, check=True).stdout

    assert "3.9e-03, since float16 is the narrowest float type" in said()
    found = json.loads(said("--json"))
    assert (found["tolerance"], found["narrowest_type"]) == (tolerance(["float16"]), "float16")


@pytest.mark.parametrize("ir_version", [3, 8])
def test_optimisation_alone_folds_the_initializers_that_an_old_model_lists_as_inputs(tmp_path, ir_version):
    """Before, verify failed for a float16 face detector, because its stages fold ops that the source model does not."""
    source = np.random.default_rng(0)
    weight = build.constant("w", source.standard_normal((8, 3, 3, 3)).astype(np.float16))
    values = {name: source.random(8).astype(np.float16) + np.float16(0.1) for name in ("scale", "bias", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *values], ["y"]),
    ]
    ends = ([build.value("x", [1, 3, 16, 16], HALF)], [build.value("y", [1, 8, 14, 14], HALF)])
    constants = [weight, *(build.constant(name, array) for name, array in values.items())]
    moved = []
    for name, listed, version in (("old", True, ir_version), ("new", False, 8)):
        proto = build.model(nodes, *ends, constants, ir_version=version, opsets={"": 15})
        proto.graph.input.extend([build.value(t.name, list(t.dims), HALF) for t in constants] if listed else [])
        model = build.save(proto, tmp_path, f"{name}.onnx")
        partition(model, stages=1, out=tmp_path / "m.plan", costs="analytic")
        (found,) = verify(tmp_path / "m.plan", model)
        assert found.good
        moved.append(found.moved)
    assert moved[0] == moved[1] > 0


def test_verify_does_not_take_a_wrong_optimiser_as_the_measure():
    """ONNX Runtime 1.32 gives zeros for int4 weights of float16 products at the level "extended"."""
    zeros = Comparison(output="y", exact=True, difference=0.0, optimized=1.0, moved=1.0, narrowest="float16")
    assert not zeros.good


def test_a_wrong_stage_of_a_float16_model_is_found_by_verify(tmp_path):
    model, folder = build.save(half_chain(), tmp_path), tmp_path / "m.plan"
    plan = partition(model, stages=2, out=folder, costs="analytic")
    file = folder / plan.stages[1].file
    stage = onnx.load(file)
    weight = next(t for t in stage.graph.initializer if t.name.startswith("w"))
    weight.CopyFrom(build.constant(weight.name, onnx.numpy_helper.to_array(weight) * np.float16(1.1)))
    file.write_bytes(stage.SerializeToString())
    wrong = msgspec.structs.replace(plan.stages[1], files=(file_entry(file),))
    (folder / "plan.json").write_bytes(msgspec.structs.replace(plan, stages=(plan.stages[0], wrong)).to_json())
    assert not any(c.good for c in verify(folder, model))


def test_a_level_whose_answers_have_nothing_to_do_with_the_model_is_never_chosen(tmp_path, monkeypatch):
    """ONNX Runtime 1.32 gives zeros for int4 weights of float16 products at the level "extended"."""
    random = np.random.default_rng(0)
    weights = helper.make_tensor("q", TensorProto.INT4, [64, 64], random.integers(-8, 8, 64 * 64).tolist())
    scales = build.constant("s", (random.random((4, 64)) / 16).astype(np.float16))
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [build.value(name, ["n", 64], TensorProto.FLOAT16) for name in ("x", "y")]
    path = build.save(build.model(nodes, ends[:1], ends[1:], [weights, scales], opsets={"": 21}), tmp_path)
    np.savez(tmp_path / "in.npz", x=random.standard_normal((2, 64)).astype(np.float16))

    monkeypatch.setattr(levels, "CANDIDATE_LEVELS", ("extended", "basic"))
    level = levels.best_level(path, tmp_path / "in.npz", threads=1, provider="cpu", budget=EFFORTS["quick"]).level
    given = load_npz(tmp_path / "in.npz")
    plain, chosen = (open_session(path, threads=1, level=one).run(given)["y"] for one in ("disabled", level))
    assert distance(chosen, plain) < 0.1


def test_a_stage_that_would_be_fused_into_something_less_exact_than_the_model_is_not(tmp_path):
    """A tied int8 table: ONNX Runtime fuses its product in a stage of its own, and not in the whole model."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        helper.make_node("Gather", ["w", "ids"], ["t0"]),
    ]
    weights = [
        build.constant("q", random.integers(-127, 127, (600, 128)).astype(np.int8)),
        build.constant("scale", np.array(0.01, np.float32)),
        build.constant("zero", np.array(0, np.int8)),
    ]
    for step in range(4):
        weights.append(build.constant(f"l{step}", (random.standard_normal((128, 128)) / 11).astype(np.float32)))
        nodes.append(helper.make_node("MatMul", [f"t{step}", f"l{step}"], [f"m{step}"]))
        nodes.append(helper.make_node("Tanh", [f"m{step}"], [f"t{step + 1}"]))
    nodes.append(helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["t4", "turned"], ["y"]))
    inputs = [build.value("ids", ["b", "s"], TensorProto.INT64)]
    model = build.save(build.model(nodes, inputs, [build.value("y", ["b", "s", 600])], weights), tmp_path)
    given = {"ids": random.integers(0, 600, (1, 16))}

    plan = partition(model, stages=2, out=tmp_path / "m.plan", inputs=given)
    found = run_stages(tmp_path / "m.plan", plan, given, threads=1)["y"]
    whole = open_session(model, threads=1, level="all").run(given)["y"]
    assert distance(found, whole) <= LEAST_TOLERANCE
    assert all(one.good for one in verify(tmp_path / "m.plan", model))
