"""What the detection claims of each family of decoders, what it refuses, and how a file of decisions changes it."""

from __future__ import annotations

import decoder_traps as traps
import decoders
import onnx
import pytest
from decoder_bits import CACHE, GROWN, claimed, decoder_around, found, op, refusal
from decoder_parts import SMALL, Size
from decoder_runs import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from onnxsplit.decoder.claim import DecoderClaim, NoDecoder
from onnxsplit.decoder.find import find_decoder
from onnxsplit.decoder.override import Override, StateOverride
from onnxsplit.errors import InputError, ModelError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import open_any
from onnxsplit.plan_decoder import Control

KINDS = {
    "gqa": "in-place",
    "gqa, unread positions": "in-place",
    "gqa, rotary outside": "in-place",
    "gqa, 4 bits": "in-place",
    "gqa, free width": "in-place",
    "gqa, local window": "in-place",
    "plain": "append",
    "plain, gathered tables": "append",
    "plain, no positions": "append",
    "plain, causal by position": "append",
    "gpt2": "append",
    "torch export": "append",
    "attention 23": "append",
    "attention 23, causal": "append",
    "tensor scatter": "in-place",
    "tensor scatter, free": "in-place",
    "lstm": "recurrent",
    "lstm by layer": "recurrent",
    "gru": "recurrent",
    "window": "window",
    "relative bias": "append",
    "alibi": "append",
}
ROLES = {
    "input_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "write_indices": "past-length",
    "valid_lengths": "total-length",
}


@pytest.mark.parametrize("name", KINDS)
def test_each_family_is_claimed(name):
    family = FAMILIES[name]
    model = family.make()
    claim = claimed(model)
    inputs = {value.name for value in model.graph.input}
    assert {state.past for state in claim.states} | {c.input for c in claim.controls} == inputs
    assert {state.kind for state in claim.states} == {KINDS[name]}
    for state in claim.states:
        expected = family.states.get(state.past) or state.past.replace("past_key_values", "present")
        assert state.present == expected
    assert {c.input: c.role for c in claim.controls} == {name: ROLES[name] for name in ROLES if name in inputs}
    assert (claim.scores, claim.vocabulary, claim.tokens_below) == ("logits", Size.vocabulary, None)


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name] in ("in-place", "append", "window")])
def test_the_shape_of_a_cache_is_that_of_one_row_without_positions(name):
    family = FAMILIES[name]
    for state in claimed(family.make()).states:
        assert (state.batch_axis, state.axis) == (0, 2)
        assert state.shape[0] == 1
        assert state.shape[2:] == (0, family.head)


def test_attention_and_recurrent_states_live_in_one_model():
    claim = claimed(decoders.mixed())
    kinds = {state.past: (state.kind, state.axis, state.shape) for state in claim.states}
    assert kinds["past_conv.0"] == ("recurrent", None, (1, Size.width, 2))
    assert kinds["past_recurrent.2"] == ("recurrent", None, (1, Size.width))
    assert kinds["past_key_values.1.key"] == ("append", 2, (1, Size.groups, 0, Size.head))


def test_stacked_recurrent_states_keep_their_layers():
    (h, c) = claimed(decoders.lstm()).states
    assert (h.past, h.present, h.batch_axis, h.shape) == ("h0", "hn", 1, (2, 1, Size.width))
    assert (c.past, c.present) == ("c0", "cn")


def test_limits_come_from_tables_and_buffers():
    assert claimed(decoders.tensor_scatter(capacity=64)).max_length == 64
    for model in (decoders.gqa(), decoders.gpt2(), decoders.attention23(), decoders.plain(gathered=True)):
        assert claimed(model).max_length == Size.context
    assert claimed(decoders.plain()).max_length is None


def test_two_decoders_in_one_if_give_the_input_that_chooses():
    assert found(decoders.merged()) == DecoderClaim((), (), "", 0, branch="use_cache_branch")


def test_names_and_structure_that_disagree_are_refused_with_both_pairs():
    reason = refusal(traps.crossed())
    assert "names pair 'past_key_values.0.key' with 'present.0.key'" in reason
    assert "the ops of the graph pair 'past_key_values.1.key' with 'present.0.key'" in reason
    assert "--decoder FILE.toml" in reason
    assert "\n" not in reason


def test_a_file_of_decisions_settles_what_names_and_structure_disagree_about():
    pairs = FAMILIES["crossed"].states
    swapped = [(past, present) for past, present in pairs.items() if past.split(".")[1] in "01"]
    override = Override(states=tuple(StateOverride(past, present) for past, present in swapped))
    claim = claimed(traps.crossed(), override=override)
    assert {state.past: state.present for state in claim.states} == pairs
    assert {state.kind for state in claim.states} == {"append"}


def test_a_cache_of_all_layers_in_one_tensor_is_refused():
    assert "'past' [3, 2, batch_size, 2, past_sequence_length, 16] holds the caches of several layers" in refusal(
        traps.stacked()
    )
    claim = claimed(traps.stacked(), override=Override(states=(StateOverride("past", "present"),)))
    assert [(s.kind, s.batch_axis, s.axis, s.shape) for s in claim.states] == [
        ("append", 2, 4, (3, 2, 1, 2, 0, SMALL.head))
    ]


def test_an_input_that_nothing_explains_is_refused_by_name():
    assert "nothing says what the input 'style' must be" in refusal(traps.puzzling())


def test_a_free_width_comes_from_the_files_beside_the_model(tmp_path):
    nodes = [
        op("ReduceMax", ["input_ids"], ["width"], keepdims=0),
        op("Reshape", ["width", "one"], ["end"]),
        op("Slice", ["k", "zero", "end", "three"], ["some"]),
        op("Concat", ["past.0.key", "some"], ["present.0.key"], axis=2),
    ]
    pasts = {"past.0.key": ["batch", 1, "past", "kv_cache_dim"]}
    presents = {"present.0.key": ["batch", 1, "total", "kv_cache_dim"]}
    model = decoder_around(nodes, pasts, presents, constants={"zero": [0], "three": [3]})
    reason = refusal(model)
    assert "the size of axis 3 of 'past.0.key' [batch, 1, past, kv_cache_dim] is not known" in reason
    given = Override(states=(StateOverride("past.0.key", "present.0.key", shape=(1, 1, 0, 8)),))
    assert claimed(model, override=given).states[0].shape == (1, 1, 0, 8)
    decoders.write_genai_config(tmp_path)
    assert claimed(model, tmp_path).states[0].shape == (1, 1, 0, Size.head)


def test_genai_config_gives_names_limits_and_end_tokens(tmp_path):
    decoders.write_genai_config(tmp_path, Size(context=99), end_token=[2, 7])
    claim = claimed(decoders.gqa(), tmp_path)
    assert (claim.max_length, claim.end_tokens) == (99, (2, 7))
    assert claim.text == (tmp_path / "genai_config.json",)


def test_end_tokens_beyond_the_vocabulary_are_left_out_and_said(tmp_path):
    decoders.write_config(tmp_path, end_token=[2, 100])
    claim = claimed(decoders.plain(), tmp_path)
    assert claim.end_tokens == (2,)
    assert claim.notes == ("end token 100 is not used: the model has 100 scores",)


def test_the_users_end_tokens_are_checked():
    assert claimed(decoders.plain(), override=Override(end_tokens=(7,), max_length=12)).end_tokens == (7,)
    assert "end_tokens has 100" in refusal(decoders.plain(), override=Override(end_tokens=(100,)))


def test_the_users_limit_does_not_reach_beyond_a_buffer():
    claim = claimed(decoders.tensor_scatter(capacity=64), override=Override(max_length=1000))
    assert claim.max_length == 64
    assert claimed(decoders.plain(), override=Override(max_length=1000)).max_length == 1000


@pytest.mark.parametrize(
    "override",
    [
        Override(scores="nothing"),
        Override(tokens="nothing"),
        Override(states=(StateOverride("nothing", "present.0.key"),)),
        Override(states=(StateOverride("past_key_values.0.key", "nothing"),)),
        Override(controls=(Control(input="nothing", role="mask"),)),
    ],
)
def test_decisions_about_names_that_the_model_does_not_have_are_errors(override):
    with pytest.raises(InputError, match=r"'nothing' is not an (input|output) of the model"):
        found(decoders.plain(), override=override)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"axis": 7}, "axis = 7 does not fit"),
        ({"axis": 0, "batch_axis": 0}, "axis = 0 does not fit"),
        ({"batch_axis": 4}, "batch_axis = 4 does not fit"),
        ({"shape": (1, 2)}, "does not fit 'past.0.key'"),
    ],
)
def test_decisions_that_do_not_fit_a_state_are_named(state, reason):
    model = decoder_around(
        [op("Concat", ["past.0.key", "k"], ["present.0.key"], axis=2)], {"past.0.key": CACHE}, {"present.0.key": GROWN}
    )
    override = Override(states=(StateOverride("past.0.key", "present.0.key", **state),))
    assert reason in refusal(model, override=override)


def test_a_state_that_no_op_shows_needs_names_and_an_equal_shape():
    shape = ["batch", 4]
    nodes = [op("ReduceSum", ["x", "one"], ["sum"], keepdims=0), op("Cast", ["sum"], ["s"], to=1)]
    nodes += [op("Slice", ["s", "zero", "four", "one"], ["part"]), op("Add", ["past_ssm.0", "part"], ["present_ssm.0"])]
    numbers = {"zero": [0], "four": [4]}
    model = decoder_around(nodes, {"past_ssm.0": shape}, {"present_ssm.0": shape}, constants=numbers)
    (state,) = claimed(model).states
    assert (state.kind, state.batch_axis, state.shape) == ("recurrent", 0, (1, 4))


def test_keys_without_an_op_that_updates_them_are_not_taken_for_a_recurrent_state():
    """A buffer that is written by arithmetic has a length that nothing says."""
    shape = ["batch", 1, 16, 8]
    nodes = [op("Add", ["past.0.key", "past.0.key"], ["present.0.key"])]
    assert "no op that updates a cache" in refusal(
        decoder_around(nodes, {"past.0.key": shape}, {"present.0.key": shape})
    )


DAMAGED = ("gqa", "plain", "tensor scatter", "lstm", "window", "merged")
WHOLE = {name: FAMILIES[name].make() for name in DAMAGED}


@given(name=st.sampled_from(DAMAGED), data=st.data())
def test_damaged_graphs_end_in_an_answer(name, data):
    """Ops lose inputs, get other attributes or become other ops: the detection answers, or the model is refused."""
    model = onnx.ModelProto()
    model.CopyFrom(WHOLE[name])
    kinds = sorted({node.op_type for node in model.graph.node} | {"Slice", "Scan", "If", "Gather", "Split", "Squeeze"})
    for _ in range(data.draw(st.integers(1, 4))):
        node = model.graph.node[data.draw(st.integers(0, len(model.graph.node) - 1))]
        match data.draw(st.sampled_from(["input", "inputs", "kind", "axis"])):
            case "input" if node.input:
                node.input[data.draw(st.integers(0, len(node.input) - 1))] = ""
            case "inputs":
                del node.input[data.draw(st.integers(0, 2)) :]
            case "kind":
                node.op_type = data.draw(st.sampled_from(kinds))
            case "axis":
                for attribute in node.attribute:
                    if attribute.type == onnx.AttributeProto.INT:
                        attribute.i = data.draw(st.sampled_from([-(2**63), -5, 3, 2**31, 2**63 - 1]))
    try:
        graph = build_graph(open_any(model))
    except ModelError:
        return
    answer = find_decoder(graph, {})
    assert isinstance(answer, DecoderClaim | NoDecoder)
