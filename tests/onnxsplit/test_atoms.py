from __future__ import annotations

import build
import numpy as np
from onnx import TensorProto, helper

from onnxsplit.model.atoms import build_atoms
from onnxsplit.model.graph import build_graph
from onnxsplit.model.shapes import infer_shapes
from onnxsplit.model.source import open_model
from onnxsplit.plan import CALLER


def atoms_of(proto, tmp_path, **sizes):
    graph = build_graph(open_model(build.save(proto, tmp_path)))
    atoms = build_atoms(graph, infer_shapes(graph, sizes))
    named = [tuple(graph.ops[i].op_type for i in ops) for ops in atoms.ops]
    return graph, atoms, named


def test_every_op_is_an_atom_where_tensors_travel(tmp_path):
    _, _, named = atoms_of(build.chain(3), tmp_path, x=(1, 32))
    assert named == [("MatMul",), ("Relu",)] * 3


def test_a_sequence_keeps_its_ops_together(tmp_path):
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("SequenceConstruct", ["x", "a"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=0),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    proto = build.model(nodes, [build.value("x", [2])], [build.value("y", [4])])
    assert atoms_of(proto, tmp_path, x=(2,))[2] == [
        ("Neg",),
        ("SequenceConstruct", "ConcatFromSequence"),
        ("Relu",),
    ]


def test_what_contraction_puts_on_a_cycle_is_merged(tmp_path):
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("SequenceAt", ["s", "zero"], ["first"]),
        helper.make_node("Neg", ["first"], ["a"]),
        helper.make_node("SequenceInsert", ["s", "a"], ["longer"]),
        helper.make_node("ConcatFromSequence", ["longer"], ["y"], axis=0),
    ]
    zero = build.constant("zero", np.int64(0))
    proto = build.model(nodes, [build.value("x", [2])], [build.value("y", [6])], [zero])
    _, atoms, named = atoms_of(proto, tmp_path, x=(2,))
    assert len(named) == 1
    assert len(atoms.ops[0]) == 5


def quantized():
    scale, zero = build.constant("s", np.float32(0.1)), build.constant("z", np.int8(0))
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Tanh", ["d"], ["left"]),
        helper.make_node("Sigmoid", ["d"], ["right"]),
        helper.make_node("Add", ["left", "right"], ["y"]),
    ]
    return build.model(nodes, [build.value("x", [4])], [build.value("y", [4])], [scale, zero])


def test_quantize_stays_with_its_writer_and_dequantize_goes_to_every_reader(tmp_path):
    graph, atoms, named = atoms_of(quantized(), tmp_path, x=(4,))
    assert named[0] == ("Relu", "QuantizeLinear")
    assert {graph.ops[i].op_type for i in atoms.copied} == {"DequantizeLinear"}
    crossing = next(edge for edge in atoms.edges if edge.tensor == "q")
    assert len(crossing.readers) == 2


def test_constants_belong_to_no_atom(tmp_path):
    tensor = helper.make_tensor("", TensorProto.FLOAT, [2], [1, 2])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    proto = build.model(nodes, [build.value("x", [2])], [build.value("y", [2])])
    _, atoms, named = atoms_of(proto, tmp_path, x=(2,))
    assert named == [("Add",)]
    assert len(atoms.copied) == 1


def test_edges_name_writer_readers_and_the_caller(tmp_path):
    _, atoms, _ = atoms_of(build.diamond(), tmp_path, x=(1, 16))
    edges = {edge.tensor: edge for edge in atoms.edges}
    assert edges["x"].writer == CALLER
    assert edges["a"].readers == (1, 2)
    assert edges["y"].to_caller
