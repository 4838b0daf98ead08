"""Weights that stay in the model's file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsplit.cost.profile import run_profile
from onnxsplit.model.external_data import external_range, is_external
from onnxsplit.model.in_file import leave_weights_in_file
from onnxsplit.model.in_memory import ModelFile
from onnxsplit.npz import save_npz
from onnxsplit.session import open_session

SIZE = 160  # a square of this size in float32 has more than 64 KiB


def weights() -> list[onnx.TensorProto]:
    """Large and small ones, one whose values are not raw bytes, and one that is read by nothing."""
    values = np.random.default_rng(5).normal(size=(4, SIZE, SIZE)).astype(np.float32)
    typed = helper.make_tensor("w2", TensorProto.FLOAT, (SIZE, SIZE), values[2].ravel().tolist())
    return [
        numpy_helper.from_array(values[0], "w0"),
        numpy_helper.from_array(values[3], "unread"),
        numpy_helper.from_array(values[1, 0], "w1"),
        typed,
        numpy_helper.from_array(values[1], "w3"),
    ]


def saved(folder, name="m.onnx"):
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Add", ["a", "w1"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"]),
        helper.make_node("MatMul", ["c", "w3"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, (2, SIZE)) for end in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights())
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10, doc_string="é" * 300),
        folder / name,
    )
    return folder / name


X = {"x": np.ones((2, SIZE), np.float32)}


def test_large_weights_are_read_from_the_file_and_the_answers_stay(tmp_path):
    path = saved(tmp_path)
    model, whole = onnx.load(path), onnx.load(path)
    leave_weights_in_file(path, model.graph.initializer)
    assert [is_external(tensor) for tensor in model.graph.initializer] == [True, True, False, False, True]
    for tensor, before in zip(model.graph.initializer, whole.graph.initializer, strict=True):
        if is_external(tensor):
            file, offset, length = external_range(path, tensor)
            assert file.read_bytes()[offset : offset + length] == before.raw_data
    assert model.ByteSize() < whole.ByteSize() / 2
    lean = open_session(model.SerializeToString(), threads=1, external_data_folder=tmp_path)
    assert np.array_equal(lean.run(X)["y"], open_session(path, threads=1).run(X)["y"])


@pytest.mark.parametrize("change", ["two graphs", "a group", "an initializer less"])
def test_a_file_that_cannot_be_followed_changes_nothing(tmp_path, change):
    path = saved(tmp_path)
    model, content = onnx.load(path), path.read_bytes()
    path.write_bytes(
        {
            "two graphs": content + bytes([7 << 3 | 2, 0]),
            "a group": bytes([1 << 3 | 3]) + content,
            "an initializer less": content,
        }[change]
    )
    if change == "an initializer less":
        del model.graph.initializer[1]
    before = model.SerializeToString(deterministic=True)
    leave_weights_in_file(path, model.graph.initializer)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("end", [1, 100, 1000, 70_000, -1])
def test_a_file_that_was_cut_off_meanwhile_changes_nothing(tmp_path, end):
    path = saved(tmp_path)
    model = onnx.load(path)
    path.write_bytes(path.read_bytes()[:end])
    leave_weights_in_file(path, model.graph.initializer)
    assert not any(map(is_external, model.graph.initializer))


def test_a_profile_of_a_model_with_such_weights_knows_all_shapes(tmp_path):
    path = saved(tmp_path, "é.onnx")
    save_npz(tmp_path / "in.npz", X)
    seen = run_profile(ModelFile(path), tmp_path / "in.npz", threads=1, level="disabled", provider="cpu", seconds=0.0)
    assert seen.sizes == dict.fromkeys("abcy", (2, SIZE))
    assert len(seen.op_ns) == 4
