from __future__ import annotations

import build
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import ModelError
from onnxsplit.graph import build_graph, captured_names
from onnxsplit.source import open_model


def graph_of(proto, tmp_path):
    return build_graph(open_model(build.save(proto, tmp_path)))


def test_captures_are_read_by_the_op_that_holds_the_body(tmp_path):
    graph = graph_of(build.with_if(), tmp_path)
    chosen = graph.ops[graph.producer["chosen"]]
    assert set(chosen.captures) == {"total", "two", "scaled", "base"}
    assert graph.digraph.has_edge(graph.producer["scaled"], chosen.index)


def test_a_name_defined_in_a_body_hides_the_outer_one(tmp_path):
    graph = graph_of(build.with_if(), tmp_path)
    assert "tail" not in graph.ops[graph.producer["chosen"]].captures


def test_a_loop_body_captures_what_it_does_not_define():
    body = helper.make_graph(
        [helper.make_node("Add", ["state", "outer"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            build.value("i", [], TensorProto.INT64),
            build.value("go", [], TensorProto.BOOL),
            build.value("state", None),
        ],
        [build.value("on", [], TensorProto.BOOL), build.value("next", None)],
    )
    assert captured_names(helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)) == ("outer",)


def test_ops_out_of_order_are_sorted(tmp_path):
    proto = build.chain()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    graph = graph_of(proto, tmp_path)
    assert [op.name for op in graph.ops][:3] == ["matmul0", "relu0", "matmul1"]


def test_dead_ops_are_left_out(tmp_path):
    proto = build.chain(2)
    proto.graph.node.add(op_type="Neg", input=["x"], output=["unused"])
    assert len(graph_of(proto, tmp_path).ops) == 4


def test_constant_ops_are_found_but_random_ones_are_not(tmp_path):
    nodes = [
        helper.make_node("ConstantOfShape", ["two"], ["zeros"]),
        helper.make_node("Exp", ["zeros"], ["ones"]),
        helper.make_node("RandomNormal", [], ["noise"], shape=[2]),
        helper.make_node("Add", ["ones", "noise"], ["sum"]),
        helper.make_node("Add", ["sum", "x"], ["y"]),
    ]
    two = build.constant("two", np.array([2], dtype=np.int64))
    graph = graph_of(build.model(nodes, [build.value("x", [2])], [build.value("y", [2])], [two]), tmp_path)
    assert {graph.ops[i].outputs[0] for i in graph.constant_ops} == {"zeros", "ones"}


def test_initializers_listed_as_inputs_are_constants(tmp_path):
    proto = build.chain(2)
    proto.graph.input.append(build.value("w0", [32, 32]))
    graph = graph_of(proto, tmp_path)
    assert graph.inputs == ("x",)
    assert graph.overridable == ("w0",)


def test_a_tensor_written_twice_is_refused(tmp_path):
    proto = build.chain(2)
    proto.graph.node.add(op_type="Neg", input=["x"], output=["y"])
    with pytest.raises(ModelError, match="'y' is written twice"):
        graph_of(proto, tmp_path)


def test_a_tensor_never_written_is_refused(tmp_path):
    proto = build.chain(2)
    proto.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match=r"'nowhere'.*never written"):
        graph_of(proto, tmp_path)


def test_a_cycle_is_refused(tmp_path):
    proto = build.chain(2)
    proto.graph.node[0].input[0] = "y"
    with pytest.raises(ModelError, match="cycle"):
        graph_of(proto, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"junk" * 9, "not an ONNX model"), (b"\x08\x01", "no ONNX graph")],
)
def test_what_is_no_model_is_refused(tmp_path, content, words):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        open_model(tmp_path / "m.onnx")


def test_a_missing_model_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        open_model(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        open_model(tmp_path)


def external(tmp_path, location: str, length: int = 16):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    return build.save(build.model(nodes, [build.value("x", [4])], [build.value("y", [4])], [tensor]), tmp_path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "sub/../../secret"])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    with pytest.raises(ModelError, match="not a path inside"):
        open_model(external(tmp_path, location))


def test_external_data_that_is_missing_short_or_a_link_is_refused(tmp_path):
    path = external(tmp_path, "w.bin")
    with pytest.raises(ModelError, match="is missing"):
        open_model(path)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    with pytest.raises(ModelError, match="truncated"):
        open_model(path)
    (tmp_path / "real").write_bytes(bytes(16))
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to("real")
    with pytest.raises(ModelError, match="is a link"):
        open_model(path)


def test_names_that_are_no_text_are_refused(tmp_path):
    """Found by fuzzing: protobuf gives bytes for such names."""
    path = build.save(build.chain(1), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"matmul0", b"matmul\xff"))
    with pytest.raises(ModelError, match="not UTF-8"):
        open_model(path)
