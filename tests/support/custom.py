"""Models with custom ops, for tests. Their ops are of onnxruntime-extensions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from build import OPSET, constant, model, value
from onnx import TensorProto, helper

from onnxsplit.custom_ops import EXTENSIONS, Library, find_libraries

DOMAIN = "ai.onnx.contrib"
_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cut", "model", "runs", "##s")
_WIDTH = 16


def extensions() -> Library:
    """Return the library of onnxruntime-extensions."""
    (library,) = find_libraries(EXTENSIONS)
    return library


def other_build(folder: Path, name: str = "libops.so") -> Path:
    """Write a library with the ops of onnxruntime-extensions and another hash."""
    file = folder / name
    shutil.copyfile(extensions().path, file)
    with file.open("ab") as stream:
        stream.write(b"another build")
    return file


def op(kind: str, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, domain=DOMAIN, **attributes)


def made(nodes, inputs, outputs, initializers=()) -> onnx.ModelProto:
    return model(nodes, inputs, outputs, initializers, opsets={"": OPSET, DOMAIN: 1})


def lengths() -> onnx.ModelProto:
    """s -> StringUpper, StringLength -> y: strings cross, or numbers do."""
    nodes = [
        op("StringUpper", ["s"], ["u"]),
        op("StringLength", ["u"], ["n"]),
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "f"], ["y"]),
    ]
    return made(nodes, [value("s", ["n"], TensorProto.STRING)], [value("y", ["n"])])


def tokenizer() -> onnx.ModelProto:
    """text -> tokens -> embedding -> an ordinary network -> NegPos: custom ops at both ends, none between."""
    source = np.random.default_rng(0)
    weights = [constant("table", source.standard_normal((len(_WORDS), _WIDTH)).astype(np.float32))]
    nodes = [
        op("BertTokenizer", ["text"], ["ids", "types", "mask"], vocab_file="\n".join(_WORDS), strip_accents=1),
        helper.make_node("Gather", ["table", "ids"], ["h0"]),
    ]
    for step in range(4):
        weights.append(constant(f"w{step}", source.standard_normal((_WIDTH, _WIDTH)).astype(np.float32) / 4))
        nodes += [
            helper.make_node("MatMul", [f"h{step}", f"w{step}"], [f"m{step}"]),
            helper.make_node("Tanh", [f"m{step}"], [f"h{step + 1}"]),
        ]
    nodes += [op("NegPos", ["h4"], ["negative", "positive"])]
    ends = [value(name, ["tokens", _WIDTH]) for name in ("negative", "positive")]
    return made(nodes, [value("text", [1], TensorProto.STRING)], ends, weights)


def in_a_body() -> onnx.ModelProto:
    """x -> MatMul -> If whose branches hold custom ops -> Relu -> y."""
    branches = [
        helper.make_graph([op("NegPos", ["m"], ["n", "p"])], "then", [], [value("n", [4, 4])]),
        helper.make_graph([op("NegPos", ["m"], ["q", "r"])], "else", [], [value("r", [4, 4])]),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["large"]),
        helper.make_node("If", ["large"], ["c"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("MatMul", ["c", "w"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    weights = [constant("w", np.eye(4, dtype=np.float32)[::-1] * 2), constant("zero", np.float32(0))]
    return made(nodes, [value("x", [4, 4])], [value("y", [4, 4])], weights)
