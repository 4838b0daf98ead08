"""Tensors that cross between stages in fewer bits: exact where nothing is lost, within the budget elsewhere."""

from __future__ import annotations

import itertools

import build
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from decoder_runs import FAMILIES
from onnx import TensorProto, helper

import onnxsplit
from onnxsplit.cli import cli
from onnxsplit.cli.decoding import compare_decoding
from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.distance import distance
from onnxsplit.errors import PartitionError
from onnxsplit.npz import save_npz
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_borders import UNUSABLE
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.stages.borders import NarrowTensor, narrow_stage, round_trip, wire_bytes, wire_names
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import run_stages, verify
from runtime import Pipeline

RANDOM = np.random.default_rng(0)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def crossed(array, form: str, *, declared=None, rows: int = 1, opset: int = 18):
    """Send a tensor from one stage to another: what crosses, and what the reader gets."""
    spec = TensorSpec(dtype="float32", shape=tuple(declared if declared is not None else array.shape))
    narrow = NarrowTensor("t", form, wire_names("t", form, {"t"}), spec, rows)
    shape = [None if size == "?" else size for size in spec.shape]
    nodes = [helper.make_node("Identity", ["a"], ["t"])], [helper.make_node("Identity", ["t"], ["b"])]
    writer = build.model(
        nodes[0], [build.value("a", shape)], [build.value("t", shape)], opsets={"": opset}, ir_version=4
    )
    reader = build.model(
        nodes[1], [build.value("t", shape)], [build.value("b", shape)], opsets={"": opset}, ir_version=4
    )
    narrow_stage(writer, [narrow], [], {"a", "t"})
    narrow_stage(reader, [], [narrow], {"b", "t"})
    full, *wire = session(writer).run(None, {"a": array})
    assert np.array_equal(full, array, equal_nan=True)
    (back,) = session(reader).run(None, dict(zip(narrow.wire, wire, strict=True)))
    return wire, back


SHAPES = [
    ((4, 64), None, 1),
    ((4, 64), ("?", 64), 1),
    ((3, 5, 7), None, 1),
    ((3, 5, 7), ("?", "?", "?"), 1),
    ((2, 3, 128), ("?", "?", 128), 1),
    ((5, 2, 3, 4), ("?", 2, "?", 4), 2),
    ((0, 64), ("?", 64), 1),
    ((0, 5, 7), ("?", "?", 7), 1),
    ((2, 1), ("?", "?"), 1),
    ((1, 200), (1, "?"), 1),
]


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
@pytest.mark.parametrize(("shape", "declared", "rows"), SHAPES)
def test_a_tensor_of_any_shape_arrives_with_its_shape_and_near_its_values(shape, declared, rows, opset):
    array = RANDOM.standard_normal(shape).astype(np.float32)
    for form in ("float16", "int8"):
        wire, back = crossed(array, form, declared=declared, rows=rows, opset=opset)
        assert back.shape == shape
        assert back.dtype == np.float32
        assert sum(part.nbytes for part in wire) == sum(wire_bytes(form, shape, rows))
        assert np.allclose(back, round_trip(form, array, rows), rtol=1e-6, atol=0)
        assert distance(back, array) <= (2**-11 if form == "float16" else 0.5 / 127 + 1e-6)


@pytest.mark.parametrize("shape", [(2, 0, 64), (2, 3, 0), (1, 0, 5)])
def test_an_empty_tensor_crosses(shape):
    array = np.zeros(shape, np.float32)
    wire, back = crossed(array, "int8", declared=("?",) * 3)
    assert back.shape == shape
    assert wire[1].size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_never_wrong_silently(bad):
    array = RANDOM.standard_normal((2, 256)).astype(np.float32)
    array[1, 70] = bad
    _, back = crossed(array, "int8")
    assert np.isnan(back[1, 64:128]).all()
    back[1, 64:128] = 0
    array[1, 64:128] = 0
    assert distance(back, array) < 0.004
    _, back = crossed(np.full((1, 64), bad, np.float32), "float16")
    assert np.array_equal(back, np.full((1, 64), bad, np.float32), equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e30, 3e38])
def test_blocks_of_zeros_and_of_extreme_numbers_cross(scale):
    array = (RANDOM.uniform(-1, 1, (2, 128)) * scale).astype(np.float32)
    _, back = crossed(array, "int8")
    assert np.isfinite(back).all()
    assert np.abs(back - array).max() <= max(scale / 250, 1.2e-38)


def test_rows_of_a_batch_do_not_act_on_each_other():
    array = (
        RANDOM.standard_normal((4, 5, 7)).astype(np.float32) * np.array([1, 1000, 0.001, 1], np.float32)[:, None, None]
    )
    for form in ("float16", "int8"):
        _, whole = crossed(array, form, declared=("?", 5, 7))
        rows = [crossed(array[n : n + 1], form, declared=("?", 5, 7))[1] for n in range(4)]
        assert np.array_equal(whole, np.concatenate(rows))


def test_new_names_are_free():
    assert wire_names("t", "int8", {"t", "t.int8", "t.scale", "t.scale.2"}) == ("t.int8.2", "t.scale.3")


# Plans


def split(model, folder, *, costs=None, dims=None, inputs=None, **options):
    """Cut a model, or one that was examined before, without rounds unless they are asked for."""
    options = {"stages": 2, "rounds": 0, **options}
    if isinstance(model, onnx.ModelProto):
        model = examine(build.save(model, folder), costs=costs, dims=dims, inputs=inputs, threads=1)
    return write_plan(model, folder / "m.plan", CutOptions(**options)).plan


@pytest.fixture(scope="module")
def long_chain(tmp_path_factory):
    """A chain of products on three examples of 32 rows, examined once; its batch is fixed."""
    proto = build.chain(8, 256)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 32
    path = build.save(proto, tmp_path_factory.mktemp("chain"))
    return examine(path, inputs=[example() for _ in range(3)], threads=1)


def example(rows: int = 32, width: int = 256):
    return {"x": RANDOM.standard_normal((rows, width)).astype(np.float32)}


def far_apart(folder, bits_per_s: float, stages: int = 2):
    """A cluster of hosts with slow links."""
    link = Link(latency_ns=100_000, bytes_per_s=int(bits_per_s / 8))
    hosts = [f"h{number}" for number in range(stages)]
    links = {(a, b): link for a in hosts for b in hosts if a < b}
    (folder / "cluster.toml").write_text(Cluster(tuple(Device(f"d{h}", h) for h in hosts), links).to_toml())
    return folder / "cluster.toml"


@pytest.mark.parametrize(("form", "share"), [("float16", 1 / 2), ("int8", 17 / 64)])
def test_a_plan_says_what_crosses_and_how_far_its_outputs_are_off(tmp_path, form, share):
    given = example()
    plan = split(build.chain(8, 256), tmp_path, border=form, inputs=given, tolerance=0.02, rounds=1)
    (border,) = plan.borders.tensors
    assert (border.form, border.bytes_after) == (form, border.bytes_before * share)
    assert sum(cut.bytes for cut in plan.cuts) == border.bytes_after
    answers = run_stages(tmp_path / "m.plan", plan, given, threads=1, level="disabled")
    whole = session(build.chain(8, 256)).run(None, given)[0]
    assert distance(answers["y"], whole) == pytest.approx(plan.borders.error, rel=0.02)
    assert plan.borders.error == pytest.approx(border.error, rel=0.02)
    assert plan.batch.trials
    assert plan.tensors[border.wire[0]].batch_axis == 0
    assert load_plan(tmp_path / "m.plan") == plan
    assert not list((tmp_path / "m.plan").glob("full*"))


def test_a_plan_whose_borders_contradict_it_is_refused(tmp_path, long_chain):
    plan = split(long_chain, tmp_path, border="int8", tolerance=0.02)
    (border,) = plan.borders.tensors
    wrong = msgspec.structs.replace(border, tensor="nowhere", wire=("nothing",))
    borders = msgspec.structs.replace(plan.borders, tensors=(border, border, wrong))
    assert len(plan_problems(msgspec.structs.replace(plan, borders=borders))) == 3


def test_without_the_option_plans_stay_as_they_were(tmp_path):
    plans = []
    for name, options in (("a", {}), ("b", {"border": "float32"})):
        (tmp_path / name).mkdir()
        plans.append(split(build.chain(), tmp_path / name, costs="analytic", **options))
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].borders is None
    with pytest.raises(PartitionError, match="--tolerance is for narrow borders; add --border auto"):
        split(build.chain(), tmp_path, tolerance=0.5)


def test_a_border_above_the_tolerance_is_told_and_verify_refuses_it(tmp_path, long_chain):
    plan = split(long_chain, tmp_path, border="int8", tolerance=1e-4)
    assert plan.borders.error > 1e-4
    assert not plan.borders.within
    (comparison,) = verify(tmp_path / "m.plan", long_chain.graph.source.path)
    assert not comparison.good
    plan = split(long_chain, tmp_path, border="int8", tolerance=0.02)
    (comparison,) = verify(tmp_path / "m.plan", long_chain.graph.source.path)
    assert comparison.good
    assert comparison.difference > 1e-4


def test_auto_takes_the_narrowest_form_within_the_budget(tmp_path, long_chain):
    given = [long_chain.inputs, *long_chain.more_inputs]
    cluster = far_apart(tmp_path, 50e6)
    found = {}
    for tolerance in (0.05, 2e-3, 1e-6):
        plan = split(long_chain, tmp_path, border="auto", tolerance=tolerance, cluster=cluster)
        assert plan.borders.within
        assert plan.borders.inputs == 3
        found[tolerance] = [border.form for border in plan.borders.tensors]
        files = []
        for number, one in enumerate(given):
            save_npz(tmp_path / f"{number}.npz", one)
            files.append(tmp_path / f"{number}.npz")
        assert all(one.good for one in verify(tmp_path / "m.plan", long_chain.graph.source.path, inputs=files))
    assert found == {0.05: ["int8"], 2e-3: ["float16"], 1e-6: []}


def test_auto_narrows_nothing_on_a_fast_link(tmp_path, long_chain):
    plan = split(long_chain, tmp_path, border="auto", tolerance=0.5)
    assert plan.borders.tensors == ()
    assert [cut.tensor for cut in plan.cuts] == list(plan.stages[0].outputs)


def test_errors_of_several_borders_are_checked_together(tmp_path, long_chain):
    cluster = far_apart(tmp_path, 20e6, 4)
    alone = split(long_chain, tmp_path, stages=4, cluster=cluster, border="int8", tolerance=0.5)
    assert len(alone.borders.tensors) == 3
    largest = max(border.error for border in alone.borders.tensors)
    assert alone.borders.error > largest
    # each is within half of the budget by itself, and all together are not
    tolerance = 2 * largest * 1.05
    plan = split(long_chain, tmp_path, stages=4, cluster=cluster, border="auto", tolerance=tolerance)
    assert plan.borders.within
    assert plan.borders.tensors


def test_fewer_bytes_move_the_cut(tmp_path):
    """The balanced cut is at a wide tensor; unless that is narrowed, a slow link makes a smaller one better."""
    random = np.random.default_rng(1)
    widths = [256, 256, 1024, 1024, 64]
    nodes, weights, last = [], [], "x"
    for number, (wide, next_wide) in enumerate(itertools.pairwise(widths)):
        weight = random.standard_normal((wide, next_wide)).astype(np.float32) / wide**0.5
        weights.append(build.constant(f"w{number}", weight))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"h{number}"], name=f"m{number}"))
        last = f"h{number}"
    proto = build.model(nodes, [build.value("x", ["n", 256])], [build.value(last, ["n", 64])], weights)
    options = {"costs": "analytic", "dims": {"n": 256}, "cluster": far_apart(tmp_path, 1e9)}
    full, narrow = (split(proto, tmp_path, border=border, **options) for border in ("float32", "int8"))
    assert [cut.tensor for cut in full.cuts] == ["h0"]
    assert [border.tensor for border in narrow.borders.tensors] == ["h1"]
    assert narrow.prediction.bottleneck_ns < full.prediction.bottleneck_ns


def test_the_merged_model_has_full_borders_again(tmp_path, long_chain):
    given = long_chain.inputs
    split(long_chain, tmp_path, border="int8")
    merge(tmp_path / "m.plan", tmp_path / "merged.onnx")
    merged = onnx.load(tmp_path / "merged.onnx")
    assert {node.op_type for node in merged.graph.node} == {"MatMul", "Relu"}
    assert np.array_equal(session(merged).run(None, given)[0], session(build.chain(8, 256)).run(None, given)[0])


# Odd graphs


def branches(width: int = 256, opset: int = 18, ir_version: int = 10) -> onnx.ModelProto:
    """x -> t; t is an output, and left, right and an If read it; names like those of narrow borders exist."""
    weight = build.constant("w", RANDOM.standard_normal((width, width)).astype(np.float32) / width**0.5)
    bodies = [
        helper.make_graph([helper.make_node(op, ["t"], [f"in_{op}"])], op, [], [build.value(f"in_{op}", ["n", width])])
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["t.int8"]),
        helper.make_node("Tanh", ["t"], ["t.float16"]),
        helper.make_node("If", ["flag"], ["t.scale"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    outputs = [build.value(name, ["n", width]) for name in ("t", "t.int8", "t.float16", "t.scale")]
    inputs = [build.value("x", ["n", width]), build.value("flag", [], TensorProto.BOOL)]
    return build.model(nodes, inputs, outputs, [weight], opsets={"": opset}, ir_version=ir_version)


@pytest.mark.parametrize("form", ["float16", "int8"])
@pytest.mark.parametrize(("opset", "ir_version"), [(11, 4), (18, 10)])
def test_a_tensor_with_several_readers_is_narrowed_once_and_its_caller_gets_it_in_full(
    tmp_path, form, opset, ir_version
):
    proto = branches(opset=opset, ir_version=ir_version)
    given = {**example(16), "flag": np.array(True)}
    path = build.save(proto, tmp_path)
    plan = onnxsplit.partition(
        path, out=tmp_path / "m.plan", strategy="task", border=form, inputs=given, rounds=0, tolerance=0.05
    )
    (border,) = plan.borders.tensors
    assert border.tensor == "t"
    readers = [stage for stage in plan.stages if set(border.wire) & set(stage.inputs)]
    assert len(readers) >= 2
    assert all("t" not in stage.inputs for stage in plan.stages)
    answers = run_stages(tmp_path / "m.plan", plan, given, threads=1, level="disabled")
    whole = dict(zip(plan.outputs, session(proto).run(list(plan.outputs), given), strict=True))
    assert np.array_equal(answers["t"], whole["t"])
    assert all(distance(answers[name], whole[name]) < 0.05 for name in plan.outputs)
    merge(tmp_path / "m.plan", tmp_path / "merged.onnx")
    again = session(onnx.load(tmp_path / "merged.onnx")).run(list(plan.outputs), given)
    assert all(np.array_equal(one, whole[name]) for one, name in zip(again, plan.outputs, strict=True))


def test_an_old_opset_says_what_it_cannot_express(tmp_path):
    proto = build.chain(8, 256)
    proto.opset_import[0].version = 9
    with pytest.raises(PartitionError, match="int8 needs opset 11"):
        split(proto, tmp_path, border="int8")
    plan = split(proto, tmp_path, border="float16", inputs=example())
    assert [border.form for border in plan.borders.tensors] == ["float16"]
    cluster = far_apart(tmp_path, 50e6)
    plan = split(proto, tmp_path, border="auto", inputs=example(), cluster=cluster, tolerance=0.5)
    assert [border.form for border in plan.borders.tensors] == ["float16"]


def test_overflow_is_an_error_that_auto_avoids(tmp_path):
    """Values above 65504 between the stages, and small ones at the end."""
    proto = build.chain(8, 256)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w0", "w7"):
            array = onnx.numpy_helper.to_array(tensor) * np.float32(1e7 if tensor.name == "w0" else 1e-7)
            tensor.CopyFrom(build.constant(tensor.name, array))
    plan = split(proto, tmp_path, border="float16", inputs=example(), cut_at=["h3"], stages=None)
    assert plan.borders.error == UNUSABLE
    cluster = far_apart(tmp_path, 50e6)
    plan = split(proto, tmp_path, border="auto", inputs=example(), cluster=cluster, tolerance=0.05)
    assert [border.form for border in plan.borders.tensors] == ["int8"]


def test_auto_needs_a_model_that_runs(tmp_path):
    with pytest.raises(PartitionError, match="--border float16"):
        split(build.chain(), tmp_path, border="auto", costs="analytic")


def test_small_and_whole_tensors_cross_as_they_are(tmp_path):
    plan = split(build.chain(6, 32), tmp_path, border="int8")
    assert plan.borders.tensors == ()
    assert plan.borders.within
    nodes = [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32), helper.make_node("Neg", ["i"], ["y"])]
    ends = [build.value("x", [64, 64])], [build.value("y", [64, 64], TensorProto.INT32)]
    plan = split(build.model(nodes, *ends), tmp_path, border="float16")
    assert plan.borders.tensors == ()


def test_a_pipeline_gives_a_narrowed_tensor_under_its_own_name(tmp_path):
    given = example(4)
    plan = split(build.chain(8, 256), tmp_path, border="int8", inputs=given)
    (border,) = plan.borders.tensors
    stages = run_stages(tmp_path / "m.plan", plan, given, threads=1)
    with Pipeline.launch(tmp_path / "m.plan") as pipeline:
        answers = pipeline.run(given, outputs=[border.tensor, "y"])
        empty = pipeline.run({"x": np.zeros((0, 256), np.float32)})
    assert answers[border.tensor].dtype == np.float32
    assert np.array_equal(answers[border.tensor], stages[border.tensor])
    assert np.array_equal(answers["y"], stages["y"])
    assert empty["y"].shape == (0, 256)


def test_hidden_tensors_of_a_decoder_are_narrowed_and_states_are_not(tmp_path):
    onnx.save(FAMILIES["gqa"].make(), tmp_path / "m.onnx")
    subject = examine(tmp_path / "m.onnx", decode_rows=32, context=16, threads=1)
    plan = split(subject, tmp_path, border="float16", tolerance=0.01)
    states = plan.decoder.pasts() | plan.decoder.presents()
    assert plan.borders.tensors
    assert states.isdisjoint(border.tensor for border in plan.borders.tensors)
    found = compare_decoding(tmp_path / "m.plan", tmp_path / "m.onnx", threads=1, allowed=0.01, custom_ops=())
    assert found.good
    assert found.difference > 1e-5


def test_commands_say_the_error_and_the_tolerance(tmp_path, monkeypatch, long_chain):
    monkeypatch.chdir(tmp_path)
    save_npz(tmp_path / "a.npz", long_chain.inputs)
    save_npz(tmp_path / "b.npz", long_chain.more_inputs[0])
    model = str(long_chain.graph.source.path)

    def call(*words, code=0):
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    examples = ("--inputs", "a.npz", "--inputs", "b.npz")
    text = call("partition", model, "-o", "m.plan", "--border", "int8", "--rounds", 0, *examples)
    assert "Narrow borders: 1 in int8; 32768 bytes become 8704. Error of the outputs on 2 examples:" in text
    assert "ABOVE the tolerance of 1.0e-03. verify refuses that" in text
    assert "DIFFERENT" in call("verify", "m.plan", model, *examples, code=1)
    text = call("partition", model, "-o", "m.plan", "--border", "int8", "--tolerance", "2%", "--rounds", 0, *examples)
    assert "within the tolerance of 2.0e-02" in text
    assert "Narrow borders may cause differences up to 2.0e-02; found:" in call("verify", "m.plan", model, *examples)
    assert "merged" in call("merge", "m.plan", "-o", "merged.onnx")
