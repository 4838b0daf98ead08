"""Inferred shapes behind ops that ONNX's inference does not support agree with a run."""

from __future__ import annotations

import build
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.model.graph import build_graph
from onnxsplit.model.shapes import infer_shapes
from onnxsplit.model.source import open_model
from onnxsplit.planning.planner import partition
from onnxsplit.session import runtime_type

HALF, INT8, UINT8 = TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8


def random(*shape: int, kind: type = np.float32) -> np.ndarray:
    source = np.random.default_rng(0)
    if kind in (np.int8, np.uint8, np.int32, np.int64):
        return source.integers(0, 4, shape).astype(kind)
    return source.standard_normal(shape).astype(kind)


def floats(*shape: int) -> np.ndarray:
    return random(*shape)


SCALE, ZERO = np.float32(0.1), np.uint8(3)
X = random(2, 5, 32)
BYTES = random(2, 4, 6, 6, kind=np.uint8)
ROTARY = (np.arange(5)[None].repeat(2, 0), floats(8, 4), floats(8, 4))
CACHE = (floats(2, 2, 3, 8), floats(2, 2, 3, 8))
NO = None  # an omitted input

# Op, its inputs (an array that is a tuple's only member is a constant), attributes, outputs.
CASES = [
    ("FastGelu", [X], {}, 1),
    ("Gelu", [X], {}, 1),
    ("QuickGelu", [X], {}, 1),
    ("BiasGelu", [X, (floats(32),)], {}, 1),
    ("FastGelu", [X.astype(np.float16), (floats(32).astype(np.float16),)], {}, 1),
    ("SkipLayerNormalization", [X, X, (floats(32),), (floats(32),)], {}, "1001"),
    ("SkipSimplifiedLayerNormalization", [X, X, (floats(32),)], {}, "1001"),
    ("RotaryEmbedding", [random(2, 4, 5, 8), *((a,) for a in ROTARY)], {}, 1),
    ("MatMulNBits", [X, (random(24, 2, 8, kind=np.uint8),), (floats(48),)],
     {"K": 32, "N": 24, "bits": 4, "block_size": 16}, 1),
    ("FusedMatMul", [X, (floats(24, 32),)], {"transB": 1}, 1),
    ("FusedMatMul", [random(2, 4, 5, 8), random(2, 4, 7, 8)], {"transB": 1, "alpha": 0.5}, 1),
    ("FusedMatMul", [random(2, 8, 5), random(2, 8, 7)], {"transA": 1}, 1),
    ("FusedGemm", [random(3, 8), (floats(6, 8),)], {"transB": 1, "activation": "Relu"}, 1),
    ("FusedConv", [random(2, 3, 8, 8), (floats(4, 3, 3, 3),)], {"activation": "Relu", "strides": [2, 2]}, 1),
    ("DynamicQuantizeMatMul", [X, (random(32, 24, kind=np.uint8),), (SCALE,)], {}, 1),
    ("MatMulIntegerToFloat", [random(2, 5, 8, kind=np.uint8), (random(8, 6, kind=np.uint8),), (SCALE,), (SCALE,)],
     {}, 1),
    ("QLinearAdd", [BYTES, (SCALE,), (ZERO,), BYTES, (SCALE,), (ZERO,), (SCALE,), (ZERO,)], {}, 1),
    ("QLinearSigmoid", [BYTES, (SCALE,), (ZERO,), (SCALE,), (ZERO,)], {}, 1),
    ("QLinearGlobalAveragePool", [BYTES, (SCALE,), (ZERO,), (SCALE,), (ZERO,)], {}, 1),
    ("QLinearAveragePool", [BYTES, (SCALE,), (ZERO,), (SCALE,), (ZERO,)],
     {"kernel_shape": [2, 2], "strides": [2, 2]}, 1),
    ("QLinearConcat", [(SCALE,), (ZERO,), BYTES, (SCALE,), (ZERO,), BYTES, (SCALE,), (ZERO,)], {"axis": 1}, 1),
    ("QuantizeLinear", [X, (SCALE,), (ZERO,)], {}, 1),
    ("DequantizeLinear", [BYTES, (SCALE,), (ZERO,)], {}, 1),
    ("EmbedLayerNormalization", [random(2, 5, kind=np.int32), NO, (floats(10, 8),), (floats(7, 8),), NO,
                                 (floats(8),), (floats(8),)], {}, 3),
    ("Attention", [X, (floats(32, 96),), (floats(96),)], {"num_heads": 4}, 1),
    ("Attention", [X, (floats(32, 96),), (floats(96),), NO, random(2, 2, 4, 3, 8)],
     {"num_heads": 4, "unidirectional": 1}, 2),
    ("MultiHeadAttention", [X, random(2, 7, 32), random(2, 7, 48)], {"num_heads": 4}, 1),
    ("MultiHeadAttention", [X, X, X, NO, NO, NO, random(2, 4, 3, 8), random(2, 4, 3, 8)], {"num_heads": 4}, 3),
    ("GroupQueryAttention", [random(1, 1, 32), random(1, 1, 16), random(1, 1, 16), *(a[:1] for a in CACHE),
                             (np.int32([3]),), (np.int32(4),)], {"num_heads": 4, "kv_num_heads": 2}, 3),
    ("GroupQueryAttention", [random(1, 1, 64), NO, NO, *(a[:1] for a in CACHE), (np.int32([3]),), (np.int32(4),)],
     {"num_heads": 4, "kv_num_heads": 2}, 3),
    ("GatherBlockQuantized", [(random(10, 16, kind=np.uint8),), random(2, 5, kind=np.int64), (floats(10, 2),)],
     {"block_size": 16, "quantize_axis": 1, "bits": 4}, 1),
]  # fmt: skip
STANDARD = [
    (17, "SimplifiedLayerNormalization", [X, (floats(32),)], {}, 1),
    (23, "RMSNormalization", [X, (floats(32),)], {}, 1),
    (23, "RotaryEmbedding", [random(2, 4, 5, 8), (floats(8, 4),), (floats(8, 4),), (ROTARY[0],)], {}, 1),
    (23, "Attention", [X, random(2, 5, 16), random(2, 5, 16), NO, *CACHE], {"q_num_heads": 4, "kv_num_heads": 2}, 3),
]


def one_op(domain: str, opset: int, op_type: str, inputs, attributes, outputs) -> tuple[onnx.ModelProto, dict]:
    """A model of one op with symbolic dimensions, and its inputs."""
    names, given, constants = [], {}, []
    for position, value in enumerate(inputs):
        names.append("" if value is None else f"i{position}")
        if isinstance(value, tuple):
            constants.append(build.constant(f"i{position}", value[0]))
        elif value is not None:
            given[f"i{position}"] = value
    wanted = outputs if isinstance(outputs, str) else "1" * outputs
    written = [f"o{position}" if flag == "1" else "" for position, flag in enumerate(wanted)]
    node = helper.make_node(op_type, names, written, domain=domain, **attributes)
    ends = [
        build.value(name, [f"{name}.{axis}" for axis in range(a.ndim)], helper.np_dtype_to_tensor_dtype(a.dtype))
        for name, a in given.items()
    ]
    kinds = [onnx.ValueInfoProto(name=name) for name in written if name]
    opsets = {"": opset, "com.microsoft": 1}
    return build.model([node], ends, kinds, constants, ir_version=10, opsets=opsets), given


@pytest.mark.parametrize(
    ("domain", "opset", "case"),
    [
        *(pytest.param("com.microsoft", 17, case, id=f"{case[0]}-{number}") for number, case in enumerate(CASES)),
        *(pytest.param("", opset, case, id=case[0]) for opset, *case in STANDARD),
    ],
)
def test_shapes_and_types_are_those_of_a_run(tmp_path, domain, opset, case):
    model, given = one_op(domain, opset, *case)
    path = build.save(model, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = build_graph(open_model(path))
    shapes = infer_shapes(graph, {name: array.shape for name, array in given.items()})
    for value, found in zip(session.get_outputs(), session.run(None, given), strict=True):
        assert shapes.sizes[value.name] == found.shape
        assert shapes.specs[value.name].dtype == runtime_type(value.type)
        assert shapes.bytes(value.name) == found.nbytes


def test_a_function_of_the_model_s_own_is_not_taken_for_onnx_runtime_s_op(tmp_path):
    body = [helper.make_node("Transpose", ["a"], ["r"], perm=[1, 0])]
    imports = [helper.make_opsetid("", build.OPSET)]
    own = helper.make_function("com.microsoft", "Gelu", ["a"], ["r"], body, imports)
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    model = build.model(
        [node], [build.value("x", [2, 3])], [onnx.ValueInfoProto(name="y")], functions=[own],
        opsets={"": build.OPSET, "com.microsoft": 1},
    )  # fmt: skip
    graph = build_graph(open_model(build.save(model, tmp_path)))
    assert infer_shapes(graph, {"x": (2, 3)}).sizes["y"] == (3, 2)


def decoder(layers: int = 3, width: int = 32) -> onnx.ModelProto:
    """A decoder of ops that only ONNX Runtime knows, with caches and no declared shapes inside."""
    mine = {"domain": "com.microsoft"}
    lengths = (np.int32([3]), np.int32(4))
    constants = [build.constant("table", floats(1000, width)), build.constant("one", np.ones(width, np.float32))]
    constants += [build.constant(name, value) for name, value in zip(("before", "total"), lengths, strict=True)]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h0"]),
        helper.make_node("SimplifiedLayerNormalization", ["h0", "one"], ["n0"]),
    ]
    inputs, outputs = [build.value("ids", ["b", "s"], TensorProto.INT64)], []
    for layer in range(layers):
        constants += [build.constant(f"w{layer}", random(2 * width, 2, 8, kind=np.uint8))]
        constants += [build.constant(f"s{layer}", floats(2 * width * 2) / 50)]
        bits = {"K": width, "N": 2 * width, "bits": 4, "block_size": 16}
        nodes += [
            helper.make_node("MatMulNBits", [f"n{layer}", f"w{layer}", f"s{layer}"], [f"qkv{layer}"], **bits, **mine),
            helper.make_node(
                "GroupQueryAttention",
                [f"qkv{layer}", "", "", f"past_key{layer}", f"past_value{layer}", "before", "total"],
                [f"a{layer}", f"key{layer}", f"value{layer}"],
                num_heads=4, kv_num_heads=2, **mine,
            ),
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [f"a{layer}", f"h{layer}", "one"],
                [f"n{layer + 1}", "", "", f"h{layer + 1}"], **mine,
            ),
        ]  # fmt: skip
        for name in ("key", "value"):
            inputs.append(build.value(f"past_{name}{layer}", ["b", 2, "past", 8]))
            outputs.append(build.value(f"{name}{layer}", ["b", 2, "total", 8]))
    outputs.append(build.value(f"n{layers}", ["b", "s", width]))
    return build.model(nodes, inputs, outputs, constants, ir_version=8, opsets={"": 17, "com.microsoft": 1})


@pytest.mark.parametrize("stages", [2, 3])
def test_no_border_of_a_decoder_costs_nothing_in_an_analytic_plan(tmp_path, stages):
    caches = {f"past_{n}{layer}": floats(1, 2, 3, 8) for n in ("key", "value") for layer in range(3)}
    given = {"ids": np.array([[1]]), **caches}
    model, folder = build.save(decoder(), tmp_path), tmp_path / "m.plan"
    plan = partition(model, stages=stages, out=folder, costs="analytic", inputs=given)
    assert plan.cuts
    values = dict(given)
    for stage in plan.stages:
        session = onnxruntime.InferenceSession(str(folder / stage.file), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        values |= zip(names, session.run(names, {n: values[n] for n in stage.inputs}), strict=True)
    assert {cut.tensor: cut.bytes for cut in plan.cuts} == {cut.tensor: values[cut.tensor].nbytes for cut in plan.cuts}


def test_a_gather_is_priced_by_the_rows_it_reads(tmp_path):
    """Before, a table of 128 MB, of which four rows are read, made the op the most expensive of its model."""
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[1_000_000, 32])
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.data")
    with (tmp_path / "table.data").open("wb") as file:
        file.truncate(128_000_000)
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("MatMul", ["rows", "w"], ["y"])]
    model = build.model(
        nodes,
        [build.value("ids", [4], TensorProto.INT64)],
        [build.value("y", [4, 32])],
        [table, build.constant("w", floats(32, 32))],
    )
    graph = build_graph(open_model(build.save(model, tmp_path)))
    gather, product = analytic_costs(graph, infer_shapes(graph, {"ids": (4,)})).time_ns
    assert gather <= product
