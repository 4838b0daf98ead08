from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoder_runs import FAMILIES

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.decoder.find import find_decoder
from onnxsplit.decoder.rewrite import branch_with_past, inlined, last_positions_only
from onnxsplit.decoder.token_shapes import with_token_shapes
from onnxsplit.model.graph import build_graph
from onnxsplit.model.graph_io import defaults, restored
from onnxsplit.model.in_memory import open_any
from onnxsplit.model.shapes import symbolic_specs
from onnxsplit.plan_decoder import Control
from onnxsplit.session import open_session


def run(proto, inputs):
    session = open_session(proto.SerializeToString(), threads=1)
    return session.run({name: inputs[name] for name, _ in session.inputs})


def parsed(text, *, name="", opset=17):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')


BRANCHES = """
g (bool[1] use, float[N] x, float[N] past) => (float[N] y, float[N] same, float[N] kept) <float[1] k = {2}> {
  outer = Mul(x, k)
  y, same, kept = If (use) <
    then_branch = t () => (float[N] a, float[N] past_out, float[N] w) <float[1] inner = {3}> {
      outer_2 = Add(outer, past)
      a = Mul(outer_2, inner)
      past_out = Identity(past)
      w = Identity(inner)
    },
    else_branch = e () => (float[N] b, float[N] c, float[N] d) {
      b = Neg(x)
      c = Identity(x)
      d = Identity(x)
    }
  >
}"""


def test_the_branch_with_past_is_the_one_that_reads_more():
    proto = parsed(BRANCHES)
    assert branch_with_past(proto, "use") is True
    assert branch_with_past(proto, "x") is None


@pytest.mark.parametrize("value", [True, False])
def test_an_inlined_branch_computes_what_the_if_computes(value):
    inputs = {"use": np.array([value]), "x": np.arange(3, dtype="f"), "past": np.ones(3, "f")}
    expected = run(parsed(BRANCHES), inputs)
    changed = inlined(open_any(parsed(BRANCHES)), "use", value).proto
    assert "If" not in {node.op_type for node in changed.graph.node}
    onnx.checker.check_model(changed)
    for name, array in run(changed, inputs).items():
        assert np.array_equal(array, expected[name])


SHADOWS = """
g (bool use, float[N] x, float[N] past) => (float[N] y) {
  t = Neg(x)
  y = If (use) <
    then_branch = b () => (float[N] r) {
      u = Add(t, past)
      c = Greater(u, t)
      many = ReduceMax<keepdims = 0>(u)
      low = Less(many, many)
      r = If (low) <
        then_branch = p () => (float[N] v) { v = Add(u, t) },
        else_branch = q () => (float[N] v2) { u2 = Mul(u, u) v2 = Sub(u2, t) }
      >
    },
    else_branch = o () => (float[N] z) { z = Identity(t) }
  >
}"""


def test_what_a_nested_branch_captures_is_renamed():
    text = SHADOWS.replace("t = Neg(x)", "t = Neg(x) u = Abs(x) t3 = Add(u, t)").replace(
        "else_branch = o () => (float[N] z) { z = Identity(t) }",
        "else_branch = o () => (float[N] z) { z = Identity(t3) }",
    )
    text = (
        text.replace("      u = Add(t, past)", "      w = Add(t, past)")
        .replace("(u, t)\n      many", "(w, t)\n      many")
        .replace("keepdims = 0>(u)", "keepdims = 0>(w)")
    )
    inputs = {"use": np.array(True), "x": np.arange(3, dtype="f"), "past": np.ones(3, "f")}
    expected = run(parsed(text), inputs)["y"]
    changed = inlined(open_any(parsed(text)), "use", True).proto
    assert np.array_equal(run(changed, inputs)["y"], expected)


def test_an_output_of_a_branch_that_is_an_outer_tensor_is_passed_on():
    text = """g (bool use, float[N] x, float[N] past) => (float[N] y, float[N] z) {
      t = Neg(x)
      y, z = If (use) <
        then_branch = a () => (float[N] r, float[N] s) { r = Add(t, past) s = Identity(past) },
        else_branch = b () => (float[N] r2, float[N] s2) { r2 = Identity(t) s2 = Identity(t) }
      >
    }"""
    proto = parsed(text)
    body = next(a.g for a in proto.graph.node[1].attribute if a.name == "then_branch")
    body.output[1].name = "r"  # one tensor twice
    changed = inlined(open_any(proto), "use", True).proto
    got = run(changed, {"use": np.array(True), "x": np.ones(2, "f"), "past": np.full(2, 3, "f")})
    assert got["y"].tolist() == got["z"].tolist() == [2, 2]


def test_names_of_a_branch_that_the_model_has_too_are_kept_apart():
    merged = open_any(FAMILIES["merged"].make())
    changed = inlined(merged, "use_cache_branch", True)
    onnx.checker.check_model(changed.proto)
    assert "use_cache_branch" in {value.name for value in changed.proto.graph.input}


TAILS = {
    "one product": "y = MatMul(h, w)",
    "bias": "p = MatMul(h, w) y = Add(p, b)",
    "softcap": "p = MatMul(h, w) q = Div(p, cap) r = Tanh(q) y = Mul(r, cap)",
    "cast": "p = MatMul(h, w) q = Cast<to = 11>(p) y = Cast<to = 1>(q)",
}


def scored(tail):
    head = "g (float[B,S,4] x) => (float[B,S,5] y) <float[4,5] w, float[5] b = {1,2,3,4,5}, float[1] cap = {3}>"
    proto = parsed(f"{head} {{ h = Neg(x) {tail} }}")
    weights = np.random.default_rng(0).standard_normal((4, 5)).astype("f")
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    if "w" not in held:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
        for place, value in reversed(list(enumerate(proto.graph.input))):
            if value.name == "w":
                del proto.graph.input[place]
    return proto


@pytest.mark.parametrize("tail", TAILS)
def test_only_the_scores_of_the_last_positions_are_computed(tail):
    x = np.random.default_rng(1).standard_normal((2, 6, 4)).astype("f")
    every = run(scored(TAILS[tail]), {"x": x})["y"]
    source, name = last_positions_only(open_any(scored(TAILS[tail])), "y")
    assert name == "first-scored"
    assert defaults(source)[name].tolist() == [0]
    for first in (0, 3, 5):
        some = run(source.proto, {"x": x, name: np.array([first])})["y"]
        assert np.array_equal(some, every[:, first:])


@pytest.mark.parametrize(
    "tail",
    [
        "p = MatMul(h, w) y = Softmax(p)",
        "p = MatMul(h, w) q = MatMul(h, w) y = Add(p, q)",
        "t = Transpose<perm = [0,2,1]>(h) u = Transpose<perm = [0,2,1]>(t) y = Concat<axis = 2>(u, u)",
    ],
)
def test_scores_that_are_made_in_another_way_are_left_alone(tail):
    proto = scored(tail)
    before = proto.SerializeToString()
    source, name = last_positions_only(open_any(proto), "y")
    assert name == ""
    assert source.proto.SerializeToString() == before


def test_the_new_input_never_takes_a_name_that_is_taken():
    proto = scored(TAILS["one product"])
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = "first-scored"
    source, name = last_positions_only(open_any(proto), "y")
    assert name == "first-scored_"
    onnx.checker.check_model(source.proto)


def test_a_model_with_a_new_input_can_be_restored():
    source, _ = last_positions_only(open_any(scored(TAILS["bias"])), "y")
    model = restored(source)
    assert [value.name for value in model.graph.input] == ["x"]
    x = np.ones((1, 3, 4), "f")
    assert run(model, {"x": x})["y"].shape == (1, 3, 5)


def test_a_mask_that_asks_a_hidden_tensor_for_its_shape_asks_the_tokens():
    proto = FAMILIES["plain"].make()
    source = open_any(proto)
    graph = build_graph(source)
    asked = [op.inputs[0] for op in graph.ops if op.op_type == "Shape" and op.inputs[0] not in graph.inputs]
    assert asked
    changed = with_token_shapes(source, find_decoder(graph, symbolic_specs(graph)))
    after = build_graph(changed)
    assert {op.inputs[0] for op in after.ops if op.op_type == "Shape"} <= set(after.inputs)
    onnx.checker.check_model(changed.proto)


def test_a_shape_with_an_unknown_size_is_left_alone():
    text = "g (int64[b,s] ids, float[n] x) => (int64[1] y) { k = NonZero(x) y = Shape<start = 1>(k) }"
    source = open_any(parsed(text))
    assert with_token_shapes(source, CLAIM) is source


def test_a_shape_is_not_taken_from_the_tokens_because_another_input_declares_the_same_names():
    """Optimum's merged decoders declare the mask [batch, sequence], and it is longer than the tokens."""
    text = "g (int64[b,s] ids, int64[b,s] m) => (int64[2] y) { k = Neg(m) y = Shape(k) }"
    source = open_any(parsed(text))
    assert with_token_shapes(source, CLAIM) is source


def test_a_reshape_that_keeps_the_shape_of_the_tokens_hides_nothing():
    """GPT-2 and OPT reshape the tokens to [-1, new]."""
    text = """g (int64[b,s] ids, int64[b,t] m) => (int64[2] y) <int64[1] less = {-1}> {
      n = Shape<start = 1>(ids)
      target = Concat<axis = 0>(less, n)
      flat = Reshape(ids, target)
      k = Neg(flat)
      y = Shape(k)
    }"""
    changed = with_token_shapes(open_any(parsed(text)), CLAIM)
    graph = build_graph(changed)
    assert {op.inputs for op in graph.ops if op.op_type == "Shape"} == {("ids",)}
    ids = np.zeros((2, 3), np.int64)
    assert run(changed.proto, {"ids": ids, "m": ids})["y"].tolist() == [2, 3]


CLAIM = DecoderClaim(
    states=(),
    controls=(Control(input="ids", role="tokens"), Control(input="m", role="mask")),
    scores="y",
    vocabulary=9,
)
