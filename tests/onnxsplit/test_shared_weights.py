"""Weights that share bytes are written once in each file and counted once in each stage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import build
import numpy as np
import onnx
import pytest
from checked import check_plan
from onnx import TensorProto, helper

from onnxsplit.plan_files import check_file
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import dry_run, partition
from onnxsplit.session import open_session
from onnxsplit.stages.merge import merge
from onnxsplit.stages.parts import peak_memory_bytes, whole_parts
from onnxsplit.stages.verify import run_stages, verify
from onnxsplit.views.annotate import annotate

ROWS, WIDTH = 256, 64
TABLE = ROWS * WIDTH * 4


def place(tensor: TensorProto, location: str, offset: int, length: int) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def table(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((ROWS, WIDTH)) / 8).astype(np.float32)


def language_model(embed: TensorProto, head: TensorProto) -> onnx.ModelProto:
    """ids -> rows of a table -> tanh -> scores of every row."""
    nodes = [
        helper.make_node("Gather", ["embed", "ids"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "head"], ["logits"], transB=1),
    ]
    inputs = [build.value("ids", ["n"], TensorProto.INT64)]
    return build.model(nodes, inputs, [build.value("logits", ["n", ROWS])], [embed, head])


def tied(folder: Path, *, inline: bool = False) -> Path:
    embed, head = build.constant("embed", table()), build.constant("head", table())
    if not inline:
        (folder / "w.bin").write_bytes(bytes(4096) + table().tobytes())
        for tensor in (embed, head):
            place(tensor, "w.bin", 4096, TABLE)
    return build.save(language_model(embed, head), folder)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("stage*"))


IDS = {"ids": np.array([3, 200, 7, 7], np.int64)}


@pytest.mark.parametrize("inline", [False, True])
def test_tied_weights_are_written_and_counted_once(tmp_path, inline):
    model = tied(tmp_path, inline=inline)
    plan = partition(model, stages=1, out=tmp_path / "one", costs="analytic")
    assert TABLE <= size_of(tmp_path / "one") < 1.2 * TABLE
    assert plan.stages[0].weight_bytes == plan.costs.whole_weight_bytes == TABLE
    assert [check_file(tmp_path / "one", entry) for entry in plan.stages[0].files] == [[], []]
    assert all(comparison.exact for comparison in verify(tmp_path / "one", model))
    check_plan(tmp_path / "one", model)


@pytest.mark.parametrize("inline", [False, True])
def test_stages_hold_a_copy_each_and_a_merged_model_one(tmp_path, inline):
    model = tied(tmp_path, inline=inline)
    plan = partition(model, out=tmp_path / "two", costs="analytic", cut_at=["t"])
    assert [stage.weight_bytes for stage in plan.stages] == [TABLE, TABLE]
    assert plan.costs.whole_weight_bytes == TABLE
    merge(tmp_path / "two", tmp_path / "merged.onnx")
    assert sum(file.stat().st_size for file in tmp_path.glob("merged.onnx*")) < 1.2 * TABLE
    whole, merged = (
        open_session(file, threads=1, level="disabled").run(IDS)["logits"] for file in (model, tmp_path / "merged.onnx")
    )
    assert np.array_equal(whole, merged)


def test_equal_bytes_of_other_types_and_shapes_are_one(tmp_path):
    """A table of floats, the same bytes as integers in another shape, and equal tensors too small to look at."""
    numbers = build.constant("numbers", table().view(np.int32).reshape(WIDTH, ROWS))
    small = [build.constant(name, np.ones(64, np.float32)) for name in ("s0", "s1")]
    nodes = [
        helper.make_node("Add", ["x", "floats"], ["a"]),
        helper.make_node("Add", ["i", "numbers"], ["b"]),
        helper.make_node("Mul", ["a", "s0"], ["c"]),
        helper.make_node("Mul", ["c", "s1"], ["d"]),
    ]
    proto = build.model(
        nodes,
        [build.value("x", [ROWS, WIDTH]), build.value("i", [WIDTH, ROWS], TensorProto.INT32)],
        [build.value("d", [ROWS, WIDTH]), build.value("b", [WIDTH, ROWS], TensorProto.INT32)],
        [build.constant("floats", table()), numbers, *small],
    )
    model = build.save(proto, tmp_path)
    plan = partition(model, stages=1, out=tmp_path / "m.plan", costs="analytic")
    assert plan.stages[0].weight_bytes == TABLE + 2 * 256
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))
    held = onnx.load(tmp_path / "m.plan" / "stage0.onnx", load_external_data=False).graph.initializer
    assert [tensor.data_location for tensor in held] == [1, 1, 0, 0]


RANGES = {"contained": (1024, 2048), "overlapping": (TABLE // 2, TABLE), "at the same start": (0, 512)}


@pytest.mark.parametrize("second", RANGES.values(), ids=RANGES)
def test_ranges_that_overlap_are_written_once_and_keep_their_values(tmp_path, second):
    offset, length = second
    content = table().tobytes() + table(1).tobytes()
    (tmp_path / "w.bin").write_bytes(content)
    part = np.frombuffer(content, np.float32, length // 4, offset)
    tensors = [
        place(build.constant("all", table()), "w.bin", 0, TABLE),
        place(build.constant("part", part), "w.bin", offset, length),
    ]
    nodes = [
        helper.make_node("Add", ["x", "all"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["z", "part"], ["c"]),
    ]
    inputs = [build.value("x", [ROWS, WIDTH]), build.value("z", [part.size])]
    outputs = [build.value("b", [ROWS, WIDTH]), build.value("c", [part.size])]
    model = build.save(build.model(nodes, inputs, outputs, tensors), tmp_path)
    union = max(TABLE, offset + length)
    plan = partition(model, stages=1, out=tmp_path / "m.plan", costs="analytic")
    assert plan.stages[0].weight_bytes == union
    assert (tmp_path / "m.plan" / "stage0.data").stat().st_size == union
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))
    apart = partition(model, stages=2, out=tmp_path / "two", costs="analytic", also_cut=["a"])
    assert all(comparison.exact for comparison in verify(tmp_path / "two", model))
    assert sorted(stage.weight_bytes for stage in apart.stages)[-1] <= union


def test_a_stage_that_reads_a_part_of_a_range_holds_that_part_alone(tmp_path):
    (tmp_path / "w.bin").write_bytes(table().tobytes())
    tensors = [
        place(build.constant("all", table()), "w.bin", 0, TABLE),
        place(build.constant("row", table()[3]), "w.bin", 3 * WIDTH * 4, WIDTH * 4),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "all"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("Add", ["b", "row"], ["y"]),
    ]
    proto = build.model(nodes, [build.value("x", [2, ROWS])], [build.value("y", [2, WIDTH])], tensors)
    model = build.save(proto, tmp_path)
    plan = partition(model, out=tmp_path / "m.plan", costs="analytic", cut_at=["b"])
    assert [stage.weight_bytes for stage in plan.stages] == [TABLE, WIDTH * 4]
    assert plan.costs.whole_weight_bytes == TABLE
    assert all(comparison.exact for comparison in verify(tmp_path / "m.plan", model))


def test_memory_counts_shared_bytes_once_on_a_cpu_and_a_copy_each_elsewhere(tmp_path):
    """The CPU maps the file once and packs the head; a GPU copies every initializer into memory of its own."""
    subject = examine(tied(tmp_path), costs="analytic")
    whole = whole_parts(subject.graph)
    cpu, gpu = (peak_memory_bytes(subject.graph, subject.shapes, whole, packed=packed) for packed in (True, False))
    assert cpu == gpu
    problem = subject.problem(subject.costs.time_ns)
    assert sum(weight.size_bytes for weight in problem.weights) == 2 * TABLE  # the table, and the packed head
    assert dry_run(subject, CutOptions(stages=2, objective="memory")).plan.stages[1].weight_bytes == TABLE


def test_an_annotated_model_writes_tied_weights_once(tmp_path):
    model = tied(tmp_path)
    result = dry_run(examine(model, costs="analytic"), CutOptions(stages=2))
    annotate(result, tmp_path / "annotated.onnx")
    assert (tmp_path / "annotated.onnx.data").stat().st_size == TABLE
    expected, found = (
        open_session(file, threads=1, level="disabled").run(IDS)["logits"]
        for file in (model, tmp_path / "annotated.onnx")
    )
    assert np.array_equal(expected, found)


def test_the_same_model_is_written_to_the_same_bytes(tmp_path):
    model = tied(tmp_path, inline=True)
    hashes = []
    for name in ("a", "b"):
        partition(model, stages=1, out=tmp_path / name, costs="analytic")
        files = sorted((tmp_path / name).glob("stage*"))
        hashes.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert hashes[0] == hashes[1]


def test_stages_of_tied_weights_run_with_measured_costs(tmp_path):
    model = tied(tmp_path)
    plan = partition(model, stages=2, out=tmp_path / "m.plan", rounds=1)
    whole = open_session(model, threads=1, level="disabled").run(IDS)["logits"]
    assert np.array_equal(run_stages(tmp_path / "m.plan", plan, IDS, threads=1, level="disabled")["logits"], whole)


def test_weights_without_elements_take_no_place_in_a_file(tmp_path):
    """onnx.save with a threshold of 0 stores them outside, too, and ONNX Runtime looks for a file long enough."""
    weight = build.constant("w", np.random.default_rng(0).standard_normal((90, 90)).astype(np.float32))
    empty = build.constant("empty", np.zeros((0, 90), np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Concat", ["a", "empty"], ["b"], axis=0),
        helper.make_node("Tanh", ["b"], ["y"]),
    ]
    proto = build.model(nodes, [build.value("x", [2, 90])], [build.value("y", [2, 90])], [weight, empty])
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)

    partition(tmp_path / "m.onnx", stages=2, out=tmp_path / "m.plan", rounds=0)
    assert all(found.good for found in verify(tmp_path / "m.plan", tmp_path / "m.onnx"))
    merge(tmp_path / "m.plan", tmp_path / "merged.onnx")
    open_session(tmp_path / "merged.onnx", threads=1)


def test_weights_that_a_function_keeps_in_a_file_come_with_it(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    (tmp_path / "w.bin").write_bytes(weight.tobytes())
    held = place(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8, 8]), "w.bin", 0, weight.nbytes)
    inner = [helper.make_node("Constant", [], ["w"], value=held), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("own", "Linear", ["a"], ["b"], inner, [helper.make_opsetid("", build.OPSET)])
    nodes = [
        helper.make_node("Linear", ["x"], ["h"], domain="own"),
        helper.make_node("Tanh", ["h"], ["y"]),
    ]
    ends = [build.value(name, ["n", 8]) for name in ("x", "y")]
    opsets = {"": build.OPSET, "own": 1}
    path = build.save(build.model(nodes, ends[:1], ends[1:], functions=[function], opsets=opsets), tmp_path)

    plan = partition(path, stages=2, out=tmp_path / "m.plan", costs="analytic")
    (tmp_path / "w.bin").rename(tmp_path / "elsewhere.bin")
    x = np.ones((2, 8), np.float32)
    found = run_stages(tmp_path / "m.plan", plan, {"x": x}, threads=1)["y"]
    assert np.allclose(found, np.tanh(x @ weight), atol=1e-5)
