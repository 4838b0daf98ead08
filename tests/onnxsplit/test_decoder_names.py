"""Pairs of past and present by their names, and roles by names."""

from __future__ import annotations

import pytest

from onnxsplit.decoder.names import kind_of_state, of_encoder, pairs_by_name, role_by_name, words

PAIRS = [
    ("past_key_values.0.key", "present.0.key"),
    ("past_key_values.11.value", "present.11.value"),
    ("past_key_values.0.key", "present_key_values.0.key"),
    ("past_key_values.3.decoder.key", "present.3.decoder.key"),
    ("past_key_values.2.conv_state", "present.2.conv_state"),
    ("past_key_self_3", "present_key_self_3"),
    ("past_3_key", "present_3_key"),
    ("past_key_3", "present_key_3"),
    ("past_0", "present_0"),
    ("past", "present"),
    ("pastKey0", "presentKey0"),
    ("past_conv.4", "present_conv.4"),
    ("past_ssm.4", "present_ssm.4"),
    ("past_recurrent.4", "present_recurrent.4"),
    ("cache_k_2", "cache_k_2_out"),
    ("k_cache_2", "new_k_cache_2"),
    ("key_cache.1", "updated_key_cache.1"),
    ("state", "stateN"),
    ("state", "state_out"),
    ("prev_state", "next_state"),
    ("in_cache0", "out_cache0"),
    ("h0", "hn"),
    ("h_0", "h_n"),
    ("c0", "cn"),
    ("h", "hn"),
    ("hidden", "hidden_out"),
    ("initial_h", "Y_h"),
    ("rnn_states_prev", "rnn_states_out"),
    ("mems_2", "new_mems_2"),
]


@pytest.mark.parametrize(("past", "present"), PAIRS)
def test_names_of_the_ecosystem_are_paired(past, present):
    named = pairs_by_name([past, "input_ids"], ["logits", present])
    assert named.pairs == {past: present}
    assert not named.lonely_pasts
    assert not named.lonely_presents


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("input_ids", "output_ids"),
        ("input", "output"),
        ("image_in", "image_out"),
        ("x", "y"),
        ("past_key_values.0.key", "present.1.key"),
        ("past_key_values.0.key", "present.0.value"),
        ("past_key_values.1.key", "present.11.key"),
        ("hidden_states", "last_hidden_state"),
        ("h0", "h1"),
    ],
)
def test_other_names_are_not_paired(one, other):
    assert pairs_by_name([one], [other]).pairs == {}


def test_many_layers_are_paired_each_with_its_own():
    pasts = [f"past_key_values.{layer}.{part}" for layer in range(30) for part in ("key", "value")]
    presents = [name.replace("past_key_values", "present") for name in pasts]
    assert pairs_by_name(pasts, presents[::-1]).pairs == dict(zip(pasts, presents, strict=True))


def test_names_with_two_partners_say_nothing():
    assert pairs_by_name(["state"], ["state_out", "new_state"]).pairs == {}
    assert pairs_by_name(["state_in", "prev_state"], ["state_out"]).pairs == {}


def test_states_without_a_partner_are_listed():
    named = pairs_by_name(["past_key_values.0.key", "style"], ["present.1.key", "logits"])
    assert (named.lonely_pasts, named.lonely_presents) == (("past_key_values.0.key",), ("present.1.key",))


def test_patterns_win_over_words():
    patterns = [("past_key_values.%d.key", "other.%d.key")]
    named = pairs_by_name(["past_key_values.7.key"], ["present.7.key", "other.7.key"], patterns)
    assert named.pairs == {"past_key_values.7.key": "other.7.key"}


@pytest.mark.parametrize(
    "pattern", [("past.%d", "absent.%d"), ("(past", "present"), ("past.%d.%d", "present"), ("%d", "%d"), ("", "")]
)
def test_patterns_that_fit_nothing_change_nothing(pattern):
    assert pairs_by_name(["past.0.key"], ["present.0.key"], [pattern]).pairs == {"past.0.key": "present.0.key"}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("input_ids", ("tokens", None)),
        ("attention_mask", ("mask", None)),
        ("position_ids", ("positions", None)),
        ("cache_position", ("positions", None)),
        ("past_sequence_length", ("past-length", None)),
        ("total_sequence_length", ("total-length", None)),
        ("seqlens_k", ("last-index", None)),
        ("use_cache_branch", ("fixed", 1)),
        ("num_logits_to_keep", ("fixed", 1)),
        ("style", None),
        ("past_key_values.0.key", None),
    ],
)
def test_roles_by_names(name, role):
    assert role_by_name(name) == role


def test_words_of_names():
    assert words("past_key_values.0.key") == ("past", "key", "values", "0", "key")
    assert words("pastKV12") == ("past", "k", "v", "12")
    assert words("/日本") == ()
    assert kind_of_state("past_key_values.0.conv_state") == {"0", "conv", "state"}
    assert of_encoder("encoder_hidden_states")
    assert of_encoder("past_key_cross_0")
    assert not of_encoder("past_key_values.0.decoder.key")
