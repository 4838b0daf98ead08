"""The roles of the inputs that are not states, the output with the scores, and the limits of a sequence."""

from __future__ import annotations

import build
import numpy as np
import onnx
import pytest
from decoder_bits import CACHE, FLOAT, GROWN, INT32, INT64, VOCABULARY, WIDTH, claimed, decoder_around, op, refusal
from onnx import TensorProto, helper

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.decoder.override import Override
from onnxsplit.plan_decoder import Control

APPEND = [op("Concat", ["past.0.key", "k"], ["present.0.key"], axis=2)]
ENDS = {"past.0.key": CACHE}, {"present.0.key": GROWN}


def with_input(name: str, shape, kind=INT64, nodes=None, **options) -> onnx.ModelProto:
    """A decoder with one further input; by default an op reads it that says nothing about its role."""
    read = [op("Identity", [name], ["read"]), op("Shape", ["read"], ["extra"])] if nodes is None else nodes
    model = decoder_around([*APPEND, *read], *ENDS, more=[build.value(name, shape, kind)], **options)
    if nodes is None:
        model.graph.output.append(build.value("extra", None, INT64))
    return model


def roles(claim: DecoderClaim) -> dict[str, str]:
    return {control.input: control.role for control in claim.controls}


@pytest.mark.parametrize(
    ("name", "shape", "kind", "role"),
    [
        ("attention_mask", ["batch", "total"], INT64, "mask"),
        ("attention_mask", ["batch", "total"], FLOAT, "mask"),
        ("mask", ["batch", "total"], TensorProto.BOOL, "mask"),
        ("position_ids", ["batch", "new"], INT64, "positions"),
        ("cache_position", ["new"], INT64, "positions"),
        ("pos", [1], INT64, "past-length"),
        ("input_pos", [], INT64, "past-length"),
        ("past_sequence_length", [1], INT32, "past-length"),
        ("total_sequence_length", [], INT32, "total-length"),
        ("seqlens_k", ["batch"], INT32, "last-index"),
        ("use_cache_branch", [1], TensorProto.BOOL, "fixed"),
        ("logits_to_keep", [], INT64, "fixed"),
    ],
)
def test_roles_by_names(name, shape, kind, role):
    claim = claimed(with_input(name, shape, kind))
    assert roles(claim)[name] == role
    assert [c.value for c in claim.controls if c.role == "fixed"] == ([1] if role == "fixed" else [])


@pytest.mark.parametrize(
    ("reader", "position", "shape", "role"),
    [
        (("RotaryEmbedding", "com.microsoft", 4), 1, ["batch", "new"], "positions"),
        (("RotaryEmbedding", "com.microsoft", 4), 1, [1], "past-length"),
        (("RotaryEmbedding", "", 4), 3, ["batch", "new"], "positions"),
        (("GroupQueryAttention", "com.microsoft", 10), 5, ["batch"], "last-index"),
        (("GroupQueryAttention", "com.microsoft", 10), 6, [1], "total-length"),
        (("GroupQueryAttention", "com.microsoft", 10), 9, ["batch", "new"], "positions"),
        (("MultiHeadAttention", "com.microsoft", 9), 8, [1], "past-length"),
        (("MultiHeadAttention", "com.microsoft", 9), 4, ["batch", "total"], "mask"),
        (("TensorScatter", "", 3), 2, ["batch"], "past-length"),
        (("Attention", "", 7), 6, ["batch"], "total-length"),
    ],
)
def test_roles_by_the_ops_that_read_an_input(reader, position, shape, role):
    kind, domain, count = reader
    reads = ["k"] * count
    reads[position] = "number"
    nodes = [
        op("Cast", ["a_number"], ["number"], to=INT64),
        op(kind, reads, ["y"], domain=domain),
    ]
    model = with_input("a_number", shape, INT32, [*nodes, op("Shape", ["y"], ["extra"])], microsoft=True, opset=24)
    model.graph.output.append(build.value("extra", None, INT64))
    assert roles(claimed(model))["a_number"] == role


def test_the_op_that_reads_an_input_decides_before_its_name():
    nodes = [op("TensorScatter", ["buffer", "k", "total_length"], ["after"])]
    shape = ["batch", 1, 16, WIDTH]
    more = [build.value("total_length", ["batch"], INT64)]
    claim = claimed(decoder_around(nodes, {"buffer": shape}, {"after": shape}, more=more, opset=24))
    assert roles(claim)["total_length"] == "past-length"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("style", ["batch", 4], "nothing says what the input 'style' must be in a step"),
        ("position_ids", [3, "batch", "new"], "several positions for each token"),
        ("attention_mask", ["batch", 1, "new", "total"], "the mask 'attention_mask' [batch, 1, new, total] has 4 axes"),
        ("seqlens_k", ["batch", 1, 1], "a length of each row is needed"),
        ("encoder_hidden_states", ["batch", "source", 8], "come from an encoder"),
        ("past_key_cross_0", ["batch", "source", 8], "come from an encoder"),
    ],
)
def test_inputs_that_cannot_be_made_are_named(name, shape, reason):
    assert reason in refusal(with_input(name, shape))


def test_several_unknown_inputs_are_named_together():
    model = with_input("style", ["batch", 4])
    model.graph.input.append(build.value("token_type_ids", ["batch", "new"], INT64))
    model.graph.node.append(op("Identity", ["token_type_ids"], ["seen"]))
    model.graph.output.append(build.value("seen", None, INT64))
    assert "the inputs 'style', 'token_type_ids' must be" in refusal(model)
    given = (
        Control(input="style", role="fixed", value=3),
        Control(input="token_type_ids", role="fixed", value=0),
    )
    claim = claimed(model, override=Override(controls=given))
    assert set(given) <= set(claim.controls)


def test_an_input_that_no_op_reads_may_have_any_value():
    claim = claimed(with_input("style", ["batch", 4], nodes=[]))
    assert Control(input="style", role="fixed", value=0) in claim.controls


def test_tokens_are_found_by_the_embedding_table():
    claim = claimed(decoder_around(APPEND, *ENDS, tokens="x_1"))
    assert roles(claim) == {"x_1": "tokens"}


def test_several_inputs_that_pick_rows_of_tables_are_not_guessed():
    nodes = [op("Gather", ["embed", "kinds"], ["more"]), op("Identity", ["more"], ["extra"])]
    model = with_input("kinds", ["batch", "new"], nodes=nodes, tokens="numbers")
    model.graph.output.append(build.value("extra", None))
    assert "several inputs may be the tokens: 'numbers', 'kinds'" in refusal(model)
    claim = claimed(model, override=Override(tokens="kinds", controls=(Control(input="numbers", role="positions"),)))
    assert roles(claim) == {"numbers": "positions", "kinds": "tokens"}


def test_embedded_tokens_are_refused():
    nodes = [
        op("Unsqueeze", ["inputs_embeds", "axis"], ["k"]),
        op("Concat", ["past.0.key", "k"], ["present.0.key"], axis=2),
    ]
    inputs = [build.value("inputs_embeds", ["batch", "new", WIDTH]), build.value("past.0.key", CACHE)]
    axis = build.constant("axis", np.array([1]))
    model = build.model(nodes, inputs, [build.value("present.0.key", GROWN)], [axis])
    assert "it reads embedded tokens ('inputs_embeds')" in refusal(model)


def test_tokens_without_an_axis_of_rows_are_refused():
    model = decoder_around(APPEND, *ENDS)
    model.graph.input[0].CopyFrom(build.value("input_ids", ["new"], INT64))
    assert "need two axes" in refusal(model)


def test_the_first_step_alone_is_refused():
    model = decoder_around([op("Identity", ["k"], ["present.0.key"])], {}, {"present.0.key": GROWN})
    assert "it writes caches ('present.0.key') and reads none" in refusal(model)


def test_a_cache_that_is_only_read_is_named():
    model = decoder_around(APPEND, *ENDS)
    model.graph.input.append(build.value("past.1.key", CACHE))
    model.graph.node.append(op("Identity", ["past.1.key"], ["unrelated"]))
    model.graph.output.append(build.value("unrelated", CACHE))
    assert "'past.1.key'" in refusal(model)


def test_a_cache_that_is_passed_on_is_one_of_cross_attention():
    nodes = [*APPEND, op("Identity", ["past.1.key"], ["present.1.key"])]
    model = decoder_around(nodes, {**ENDS[0], "past.1.key": CACHE}, {**ENDS[1], "present.1.key": CACHE})
    assert "passed on unchanged" in refusal(model)


def renamed_scores(*names: str) -> onnx.ModelProto:
    """A decoder whose scores have other names; each name is an output with the same values."""
    model = decoder_around(APPEND, *ENDS)
    model.graph.node[-1].output[0] = "hidden_name"
    del model.graph.output[0]
    for name in names:
        model.graph.node.append(op("Identity", ["hidden_name"], [name]))
        model.graph.output.append(build.value(name, ["batch", "new", None]))
    return model


def test_scores_are_found_by_their_width():
    claim = claimed(renamed_scores("out"))
    assert (claim.scores, claim.vocabulary) == ("out", VOCABULARY)


def test_of_several_scores_the_one_named_logits_is_taken():
    assert claimed(renamed_scores("logits", "draft_logits", "more")).scores == "logits"


def test_several_scores_are_named():
    model = renamed_scores("early", "late")
    assert "several outputs may be the scores: 'early', 'late'" in refusal(model)
    assert claimed(model, override=Override(scores="late")).scores == "late"


def test_a_decoder_without_scores_is_refused():
    model = decoder_around(APPEND, *ENDS)
    model.graph.node[-1].output[0] = "y"
    model.graph.node.append(op("Identity", ["x"], ["hidden"]))
    model.graph.output[0].CopyFrom(build.value("hidden", ["batch", "new", WIDTH]))
    assert "none of the outputs 'hidden' looks like scores" in refusal(model)


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "MatMulNBits"])
def test_the_vocabulary_is_read_from_the_weights(form):
    """No shape is known for the scores: an op of an unknown kind makes what the weights multiply."""
    model = decoder_around(APPEND, *ENDS, microsoft=True)
    last = model.graph.node[-1]
    if form == "Gemm":
        last.CopyFrom(op("Gemm", ["x", "embed"], ["logits"], transB=1))
    elif form == "MatMulNBits":
        last.CopyFrom(
            op("MatMulNBits", ["x", "head", "head"], ["logits"], domain="com.microsoft", N=VOCABULARY, K=WIDTH)
        )
    model.graph.output[0].CopyFrom(build.value("logits", None))
    assert claimed(model).vocabulary == VOCABULARY


def test_an_embedding_table_of_another_size_bounds_the_tokens():
    model = decoder_around(APPEND, *ENDS)
    assert claimed(model).tokens_below is None
    table = next(t for t in model.graph.initializer if t.name == "embed")
    table.CopyFrom(build.constant("embed", np.zeros((VOCABULARY + 5, WIDTH), np.float32)))
    assert claimed(model).tokens_below == VOCABULARY + 5


def with_table(rows: int, index: list[onnx.NodeProto], name: str = "place") -> onnx.ModelProto:
    nodes = [*APPEND, *index, op("Gather", ["table", name], ["vectors"]), op("Shape", ["vectors"], ["extra"])]
    more = [build.value("attention_mask", ["batch", "total"], INT64)]
    model = decoder_around(nodes, *ENDS, more=more, constants={"two": 2, "axis": 1})
    model.graph.initializer.append(build.constant("table", np.zeros((rows, WIDTH), np.float32)))
    model.graph.output.append(build.value("extra", None, INT64))
    return model


COUNTED = [
    op("CumSum", ["attention_mask", "axis"], ["counts"]),
    op("Sub", ["counts", "one"], ["places"]),
    op("Shape", ["past.0.key"], ["length"], start=2, end=3),
    op("Slice", ["places", "length", "limit", "one"], ["place"]),
]


def test_a_table_of_positions_that_are_counted_in_the_graph_limits_a_sequence():
    counted = [*COUNTED[:3], op("Shape", ["attention_mask"], ["limit"], start=1, end=2), COUNTED[3]]
    assert claimed(with_table(40, counted)).max_length == 40


def test_rows_that_no_position_picks_do_not_count():
    """OPT's table begins with two such rows."""
    counted = [op("CumSum", ["attention_mask", "axis"], ["counts"]), op("Add", ["two", "counts"], ["place"])]
    assert claimed(with_table(40, counted)).max_length == 38


def test_a_table_of_distances_does_not_limit_a_sequence():
    """T5's relative bias: many distances share a row."""
    folded = [op("CumSum", ["attention_mask", "axis"], ["counts"]), op("Min", ["counts", "two"], ["place"])]
    assert claimed(with_table(40, folded)).max_length is None


def test_a_table_of_tokens_does_not_limit_a_sequence():
    assert claimed(with_table(40, [op("Sub", ["input_ids", "one"], ["place"])])).max_length is None


def test_rows_and_heads_in_one_axis_are_refused():
    shape = ["batch x heads", "past", WIDTH]
    nodes = [op("Concat", ["past.0.key", "x"], ["present.0.key"], axis=1)]
    model = decoder_around(nodes, {"past.0.key": shape}, {"present.0.key": ["batch x heads", "total", WIDTH]})
    assert "rows and heads share an axis" in refusal(model)


def test_the_axis_of_the_rows_is_the_one_named_as_the_tokens_rows():
    nodes = [
        op("Transpose", ["a"], ["turned"], perm=[1, 2, 0, 3]),
        op("Concat", ["turned", "k"], ["both"], axis=2),
        op("Transpose", ["both"], ["b"], perm=[2, 0, 1, 3]),
    ]
    model = decoder_around(nodes, {"a": ["past", "batch", "heads", WIDTH]}, {"b": ["total", "batch", 1, WIDTH]})
    (state,) = claimed(model).states
    assert (state.batch_axis, state.axis, state.shape) == (1, 0, (0, 1, 1, WIDTH))


def test_a_model_that_is_no_decoder_gives_no_reason():
    assert refusal(build.chain()) == ""
    assert refusal(build.with_if()) == ""
    frame = helper.make_node("LSTM", ["frames", "w", "w", "", "", "state"], ["y", "stateN"], hidden_size=WIDTH)
    weights = build.constant("w", np.zeros((1, 4 * WIDTH, WIDTH), np.float32))
    shape = [1, "batch", WIDTH]
    voice = build.model(
        [frame], [build.value("frames", ["new", "batch", WIDTH]), build.value("state", shape)],
        [build.value("y", None), build.value("stateN", shape)], [weights],
    )  # fmt: skip
    assert refusal(voice) == ""


def test_a_single_concat_of_an_input_does_not_look_like_a_cache():
    """A recommender that appends the vectors of its categories to what it is given."""
    nodes = [op("Gather", ["embed", "kinds"], ["more"]), op("Concat", ["given", "x", "more"], ["joined"], axis=1)]
    model = decoder_around(
        nodes, {"given": ["batch", "past", WIDTH]}, {"joined": ["batch", "total", WIDTH]}, tokens="numbers",
        more=[build.value("kinds", ["batch", "new"], INT64)],
    )  # fmt: skip
    assert refusal(model) == ""
