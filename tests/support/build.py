"""Small ONNX models for tests, and random ones for properties."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18


def constant(name: str, array) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def value(name: str, shape, kind: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes, inputs, outputs, initializers=(), *, ir_version: int = 10, functions=(), opsets=None
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    imports = [helper.make_opsetid(domain, version) for domain, version in (opsets or {"": OPSET}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def chain(length: int = 6, width: int = 32) -> onnx.ModelProto:
    """x -> (MatMul, Relu) * length -> y, with a free batch."""
    source = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for step in range(length):
        weights.append(constant(f"w{step}", source.standard_normal((width, width)).astype(np.float32) / width**0.5))
        out = "y" if step == length - 1 else f"h{step}"
        nodes += [
            helper.make_node("MatMul", [last, f"w{step}"], [f"m{step}"], name=f"matmul{step}"),
            helper.make_node("Relu", [f"m{step}"], [out], name=f"relu{step}"),
        ]
        last = out
    return model(nodes, [value("x", ["batch", width])], [value("y", ["batch", width])], weights)


def diamond(width: int = 16) -> onnx.ModelProto:
    """x -> a; a -> left, a -> right; left + right -> y. Two branches that may run side by side."""
    weight = constant("w", np.random.default_rng(1).standard_normal((width, width)).astype(np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["left"]),
        helper.make_node("Tanh", ["a"], ["right"]),
        helper.make_node("Add", ["left", "right"], ["y"]),
    ]
    return model(nodes, [value("x", ["batch", width])], [value("y", ["batch", width])], [weight])


def with_if() -> onnx.ModelProto:
    """An If whose branches read outer tensors, two deep, and define names that shadow outer ones."""
    inner = helper.make_graph(
        [helper.make_node("Mul", ["scaled", "two"], ["inner_out"])], "inner", [], [value("inner_out", None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["scaled"], ["other_out"])], "other", [], [value("other_out", None)]
    )
    then = helper.make_graph(
        [
            helper.make_node("Greater", ["total", "two"], ["big"]),
            helper.make_node("If", ["big"], ["then_out"], then_branch=inner, else_branch=other),
        ],
        "then",
        [],
        [value("then_out", None)],
    )
    shadow = helper.make_graph(
        [
            helper.make_node("Relu", ["base"], ["tail"]),
            helper.make_node("Add", ["tail", "tail"], ["else_out"]),
        ],
        "else",
        [],
        [value("else_out", None)],
    )
    nodes = [
        helper.make_node("Add", ["x", "two"], ["base"]),
        helper.make_node("Mul", ["base", "two"], ["scaled"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], then_branch=then, else_branch=shadow),
        helper.make_node("Identity", ["chosen"], ["tail"]),
        helper.make_node("Add", ["tail", "base"], ["y"]),
    ]
    constants = [constant("two", np.float32(2)), constant("zero", np.float32(0))]
    return model(nodes, [value("x", [4])], [value("y", [4])], constants)


def failing() -> onnx.ModelProto:
    """A Reshape to rows of three, which fails at run time unless the size is divisible."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Reshape", ["a", "rows"], ["b"]),
        helper.make_node("Sigmoid", ["b"], ["y"]),
    ]
    rows = constant("rows", np.array([-1, 3], dtype=np.int64))
    return model(nodes, [value("x", ["n"])], [value("y", ["m", 3])], [rows])


def mixed_functions() -> list[onnx.FunctionProto]:
    """Mixed(a, b) = Inner(a) + b, Inner(a) = tanh(a): one function calls the other."""
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("mine", 1)]
    inner = helper.make_function("mine", "Inner", ["a"], ["r"], [helper.make_node("Tanh", ["a"], ["r"])], imports)
    body = [helper.make_node("Inner", ["a"], ["i"], domain="mine"), helper.make_node("Add", ["i", "b"], ["r"])]
    return [inner, helper.make_function("mine", "Mixed", ["a", "b"], ["r"], body, imports)]


def random_dag(seed: int) -> onnx.ModelProto:
    """A random DAG over [4, 4]: shared weights, captures, functions, constants, dead ops, outputs of all kinds."""
    source = random.Random(seed)
    numbers = np.random.default_rng(seed)
    weights = [constant(f"w{i}", numbers.standard_normal((4, 4)).astype(np.float32)) for i in range(3)]
    known, nodes = ["x0", "x1"], []
    for step in range(source.randint(2, 14)):
        out = f"t{step}"
        kind = source.choice(["one", "two", "weight", "constant", "function", "if"])
        if kind == "one":
            nodes.append(helper.make_node(source.choice(["Tanh", "Neg", "Sigmoid"]), [source.choice(known)], [out]))
        elif kind == "two":
            nodes.append(helper.make_node(source.choice(["Add", "Mul"]), source.choices(known, k=2), [out]))
        elif kind == "weight":
            nodes.append(helper.make_node("MatMul", [source.choice(known), f"w{source.randrange(3)}"], [out]))
        elif kind == "function":
            nodes.append(helper.make_node("Mixed", source.choices(known, k=2), [out], domain="mine"))
        elif kind == "constant":
            tensor = constant("", numbers.standard_normal((4, 4)).astype(np.float32))
            nodes.append(helper.make_node("Constant", [], [f"c{step}"], value=tensor))
            nodes.append(helper.make_node("Add", [source.choice(known), f"c{step}"], [out]))
        else:
            nodes.append(helper.make_node("ReduceMax", [source.choice(known)], [f"r{step}"], keepdims=0))
            nodes.append(helper.make_node("Cast", [f"r{step}"], [f"b{step}"], to=TensorProto.BOOL))
            branches = [
                helper.make_graph(
                    [helper.make_node(kind, [source.choice(known), source.choice(known)], [f"i{step}"])],
                    kind,
                    [],
                    [value(f"i{step}", None)],
                )
                for kind in ("Add", "Mul")
            ]
            nodes.append(helper.make_node("If", [f"b{step}"], [out], then_branch=branches[0], else_branch=branches[1]))
        known.append(out)
    outputs = {known[-1], source.choice(known), source.choice(known)}
    if source.random() < 0.3:
        outputs.add("w0")
    source.shuffle(nodes)
    return model(
        nodes,
        [value("x0", [4, 4]), value("x1", [4, 4])],
        [value(name, [4, 4]) for name in sorted(outputs)],
        weights,
        functions=mixed_functions(),
        opsets={"": OPSET, "mine": 1},
    )


ECHOED = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "int8": TensorProto.INT8, "int16": TensorProto.INT16, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16, "string": TensorProto.STRING,
}  # fmt: skip


def echo() -> onnx.ModelProto:
    """in_T -> mid_T -> out_T for every type of the Open Inference Protocol."""
    nodes, inputs, outputs = [], [], []
    for name, kind in ECHOED.items():
        inputs.append(value(f"in_{name}", ["rows", "columns"], kind))
        outputs.append(value(f"out_{name}", ["rows", "columns"], kind))
        nodes.append(helper.make_node("Identity", [f"in_{name}"], [f"mid_{name}"], name=f"first_{name}"))
        nodes.append(helper.make_node("Identity", [f"mid_{name}"], [f"out_{name}"], name=f"second_{name}"))
    return model(nodes, inputs, outputs)


def heads(width: int = 16) -> onnx.ModelProto:
    """x -> a; a -> left, a -> right: two outputs that share a beginning."""
    weight = constant("w", np.random.default_rng(1).standard_normal((width, width)).astype(np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["left"]),
        helper.make_node("Tanh", ["a"], ["right"]),
    ]
    outputs = [value("left", ["batch", width]), value("right", ["batch", width])]
    return model(nodes, [value("x", ["batch", width])], outputs, [weight])
