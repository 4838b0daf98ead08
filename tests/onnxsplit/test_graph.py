from __future__ import annotations

from itertools import pairwise

import build
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsplit.errors import ModelError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.protobuf import captured_names
from onnxsplit.model.source import MOST_RANK, open_model


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


def test_external_data_that_is_missing_or_short_is_refused(tmp_path):
    path = external(tmp_path, "w.bin")
    with pytest.raises(ModelError, match="is missing"):
        open_model(path)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    with pytest.raises(ModelError, match="truncated"):
        open_model(path)


def test_names_that_are_no_text_are_refused(tmp_path):
    """Found by fuzzing: protobuf returns such names as bytes."""
    path = build.save(build.chain(1), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"matmul0", b"matmul\xff"))
    with pytest.raises(ModelError, match="not UTF-8"):
        open_model(path)


def calling(depth: int, times: int, last: str = "Relu"):
    """A model that calls f0, which calls f1 several times, and so on; the innermost function holds one op."""
    imports = [helper.make_opsetid("", build.OPSET), helper.make_opsetid("mine", 1)]
    functions = []
    for level in range(depth):
        names = ["a", *(f"t{number}" for number in range(times - 1)), "r"] if level < depth - 1 else ["a", "r"]
        callee, domain = (f"f{level + 1}", "mine") if level < depth - 1 else (last, "mine" if last[0] == "f" else "")
        nodes = [helper.make_node(callee, [one], [other], domain=domain) for one, other in pairwise(names)]
        functions.append(helper.make_function("mine", f"f{level}", ["a"], ["r"], nodes, imports))
    nodes = [helper.make_node("f0", ["x"], ["h"], domain="mine"), helper.make_node("Neg", ["h"], ["y"])]
    opsets = {"": build.OPSET, "mine": 1}
    ends = [build.value("x", [4])], [build.value("y", [4])]
    return build.model(nodes, *ends, functions=functions, opsets=opsets)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (calling(19, 2), "unfold to 262144 ops, the function 'f0' alone to 262144; at most 50000 are allowed"),
        (calling(100, 50), r"unfold to over 10\^168 ops"),
        (calling(1, 1, "f0"), "its function 'f0' calls itself"),
        (calling(3, 1, "f0"), "its function 'f0' calls itself"),
        (calling(300, 1), "is called at a depth of over 100 functions"),
    ],
    ids=["2^18", "50^99", "itself", "in a circle", "deep"],
)
def test_functions_that_expand_without_bound_are_refused_before_expansion(tmp_path, model, words):
    with pytest.raises(ModelError, match=words):
        open_model(build.save(model, tmp_path))


def test_functions_that_call_each_other_within_the_bound_are_taken(tmp_path):
    assert len(graph_of(calling(12, 2), tmp_path).ops) == 2


def test_calls_in_bodies_count_too(tmp_path):
    proto = calling(10, 2)
    call = helper.make_node("f0", ["x"], ["o"], domain="mine")
    body = helper.make_graph([call], "body", [], [build.value("o", None)])
    for number in range(100):
        proto.graph.node.append(helper.make_node("If", ["c"], [f"i{number}"], then_branch=body, else_branch=body))
    with pytest.raises(ModelError, match="unfold to 102912 ops, the function 'f0' alone to 512"):
        open_model(build.save(proto, tmp_path))


def test_bodies_nested_two_thousand_deep_are_refused(tmp_path):
    """The model is made as bytes, because protobuf does not write such deep nesting."""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size >= 0x80:
            length += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    body = b""
    for _ in range(2_000):
        node = field(4, b"If") + field(5, field(1, b"then_branch") + field(6, body) + b"\xa0\x01\x05")
        body = field(1, node)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a" + field(7, body))
    with pytest.raises(ModelError, match="nests bodies deeper than"):
        open_model(tmp_path / "model.onnx")


def _relu(rank: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1] * rank)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y]))


def test_more_dimensions_than_an_array_can_have_are_refused(tmp_path):
    """NumPy once raised an unforeseen error here."""
    onnx.save(_relu(MOST_RANK), tmp_path / "m.onnx")
    assert np.zeros((1,) * MOST_RANK).ndim == MOST_RANK
    open_model(tmp_path / "m.onnx")
    onnx.save(_relu(MOST_RANK + 1), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=f"the tensor 'x' has {MOST_RANK + 1} dimensions"):
        open_model(tmp_path / "m.onnx")
    model = _relu(1)
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1] * 2000, float_data=[1.0])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="the tensor 'w' has 2000 dimensions"):
        open_model(tmp_path / "m.onnx")


def test_external_data_whose_name_holds_a_nul_byte_is_refused(tmp_path):
    model = _relu(1)
    data = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    data.data_location = TensorProto.EXTERNAL
    data.external_data.add(key="location", value="a\0b")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="its name holds a NUL byte"):
        open_model(tmp_path / "m.onnx")
