"""Pairs of past and present by the ops that update states."""

from __future__ import annotations

import build
import numpy as np
import pytest
from decoder_bits import CACHE, GROWN, INT32, INT64, WIDTH, claimed, decoder_around, op, refusal
from onnx import helper

END = 2**63 - 1


def only_state(model):
    """The kind, the axes and the shape of a model's only state."""
    (state,) = claimed(model).states
    return state.kind, state.batch_axis, state.axis, state.shape


def test_a_concat_of_past_and_new_appends():
    model = decoder_around([op("Concat", ["a", "k"], ["b"], axis=2)], {"a": CACHE}, {"b": GROWN})
    assert only_state(model) == ("append", 0, 2, (1, 1, 0, WIDTH))


def test_a_concat_of_new_and_past_is_not_a_state():
    model = decoder_around([op("Concat", ["k", "a"], ["b"], axis=2)], {"a": CACHE}, {"b": GROWN})
    assert refusal(model) == ""


def test_names_do_not_make_a_state_of_a_concat_in_the_wrong_order():
    nodes = [op("Concat", ["k", "past.0.key"], ["present.0.key"], axis=2)]
    assert "no op that" in refusal(decoder_around(nodes, {"past.0.key": CACHE}, {"present.0.key": GROWN}))


def test_axes_are_followed_through_transposes():
    nodes = [
        op("Transpose", ["a"], ["turned"], perm=[0, 2, 1, 3]),  # positions first, then heads
        op("Concat", ["turned", "k"], ["both"], axis=2),
        op("Transpose", ["both"], ["b"], perm=[0, 2, 1, 3]),
    ]
    model = decoder_around(nodes, {"a": ["batch", "past", 1, WIDTH]}, {"b": ["batch", "total", 1, WIDTH]})
    assert only_state(model) == ("append", 0, 1, (1, 0, 1, WIDTH))


def test_an_output_in_another_layout_cannot_be_fed_back():
    nodes = [op("Concat", ["a", "k"], ["both"], axis=2), op("Transpose", ["both"], ["b"], perm=[0, 2, 1, 3])]
    model = decoder_around(nodes, {"a": CACHE}, {"b": ["batch", "total", 1, WIDTH]})
    assert refusal(model) == ""


def test_casts_and_identities_change_nothing():
    nodes = [
        op("Identity", ["a"], ["same"]),
        op("Cast", ["same"], ["wide"], to=11),
        op("Cast", ["k"], ["wide_k"], to=11),
        op("Concat", ["wide", "wide_k"], ["both"], axis=-2),
        op("Cast", ["both"], ["b"], to=1),
    ]
    assert only_state(decoder_around(nodes, {"a": CACHE}, {"b": GROWN})) == ("append", 0, 2, (1, 1, 0, WIDTH))


def test_the_axis_of_the_positions_is_found_by_names_of_sizes_behind_a_reshape():
    nodes = [
        op("Reshape", ["a", "three"], ["flat"]),
        op("Concat", ["flat", "x"], ["both"], axis=1),
        op("Reshape", ["both", "four"], ["b"]),
    ]
    numbers = {"three": [0, -1, WIDTH], "four": [0, 1, -1, WIDTH]}
    assert only_state(decoder_around(nodes, {"a": CACHE}, {"b": GROWN}, constants=numbers)) == (
        "append", 0, 2, (1, 1, 0, WIDTH)
    )  # fmt: skip


@pytest.mark.parametrize("split", [True, False])
def test_keys_and_values_in_one_tensor(split):
    """Old exports of GPT-2: [2, rows, heads, positions, width], read by Split or Gather and stacked again."""
    if split:
        take = [op("Split", ["a"], ["a0", "a1"], axis=0, num_outputs=2)]
        take += [op("Squeeze", [f"a{i}", "zero"], [f"part{i}"]) for i in range(2)]
    else:
        take = [op("Gather", ["a", f"index{i}"], [f"part{i}"], axis=0) for i in range(2)]
    nodes = [
        *take,
        *(op("Concat", [f"part{i}", "k"], [f"both{i}"], axis=2) for i in range(2)),
        *(op("Unsqueeze", [f"both{i}", "zero"], [f"one{i}"]) for i in range(2)),
        op("Concat", ["one0", "one1"], ["b"], axis=0),
    ]
    numbers = {"zero": [0], "index0": 0, "index1": 1}
    model = decoder_around(nodes, {"a": [2, *CACHE]}, {"b": [2, *GROWN]}, constants=numbers)
    assert only_state(model) == ("append", 1, 3, (2, 1, 1, 0, WIDTH))


def test_parts_that_are_stacked_in_another_order_are_not_a_state():
    nodes = [
        *(op("Gather", ["a", f"index{i}"], [f"part{i}"], axis=0) for i in range(2)),
        *(op("Concat", [f"part{i}", "k"], [f"both{i}"], axis=2) for i in range(2)),
        *(op("Unsqueeze", [f"both{i}", "zero"], [f"one{i}"]) for i in range(2)),
        op("Concat", ["one1", "one0"], ["b"], axis=0),
    ]
    numbers = {"zero": [0], "index0": 0, "index1": 1}
    assert refusal(decoder_around(nodes, {"a": [2, *CACHE]}, {"b": [2, *GROWN]}, constants=numbers)) == ""


LAST = {"last": [-4], "end": [END], "two": [2]}


def test_a_slice_of_the_latest_positions_makes_a_window():
    nodes = [op("Concat", ["a", "k"], ["both"], axis=2), op("Slice", ["both", "last", "end", "two"], ["b"])]
    (state,) = claimed(decoder_around(nodes, {"a": CACHE}, {"b": ["batch", 1, "kept", WIDTH]}, constants=LAST)).states
    assert (state.kind, state.axis, state.capacity) == ("window", 2, 4)


def test_a_window_that_is_always_full_is_replaced_as_a_whole():
    """A convolution's state: the last positions of a fixed number, zeros before the first step."""
    nodes = [
        op("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        op("Concat", ["a", "turned"], ["both"], axis=2),
        op("Slice", ["both", "last", "end", "two"], ["b"]),
    ]
    shape = ["batch", WIDTH, 4]
    model = decoder_around(nodes, {"a": shape}, {"b": shape}, constants=LAST)
    assert only_state(model) == ("recurrent", 0, None, (1, WIDTH, 4))


def test_a_window_of_unknown_size_is_refused():
    nodes = [
        op("Shape", ["x"], ["new"], start=1, end=2),
        op("Concat", ["past.0.key", "k"], ["both"], axis=2),
        op("Slice", ["both", "new", "end", "two"], ["present.0.key"]),
    ]
    ends = {"past.0.key": CACHE}, {"present.0.key": ["batch", 1, "kept", WIDTH]}
    assert "how many it keeps is not a constant" in refusal(decoder_around(nodes, *ends, constants=LAST))


def test_the_oldest_positions_can_be_cut_before_the_new_ones_are_added():
    nodes = [op("Slice", ["a", "last", "end", "two"], ["late"]), op("Concat", ["late", "k"], ["b"], axis=2)]
    model = decoder_around(nodes, {"a": CACHE}, {"b": GROWN}, constants=LAST)
    assert claimed(model).states[0].kind == "window"


def pairs_of(*names):
    return dict.fromkeys(names, CACHE), {name.replace("past", "new"): GROWN for name in names}


def test_group_query_attention_is_in_place():
    reads = ["x", "x", "x", "past_k", "past_v", "lengths", "total"]
    nodes = [
        op("GroupQueryAttention", reads, ["y", "new_k", "new_v"], domain="com.microsoft", num_heads=1, kv_num_heads=1)
    ]
    more = [build.value("lengths", ["batch"], INT32), build.value("total", [], INT32)]
    claim = claimed(decoder_around(nodes, *pairs_of("past_k", "past_v"), more=more, microsoft=True))
    assert [(s.past, s.present, s.kind, s.axis) for s in claim.states] == [
        ("past_k", "new_k", "in-place", 2),
        ("past_v", "new_v", "in-place", 2),
    ]
    assert {c.input: c.role for c in claim.controls} == {
        "input_ids": "tokens",
        "lengths": "last-index",
        "total": "total-length",
    }


def test_packed_attention_with_empty_inputs_is_read_by_position():
    """Phi-3's fused projection: keys and values come with the queries, so two inputs are omitted."""
    reads = ["wide", "", "", "past_k", "past_v", "lengths", "total"]
    nodes = [
        op("Concat", ["x", "x", "x"], ["wide"], axis=-1),
        op("GroupQueryAttention", reads, ["y", "new_k", "new_v"], domain="com.microsoft", num_heads=1, kv_num_heads=1),
    ]
    more = [build.value("lengths", ["batch"], INT32), build.value("total", [], INT32)]
    claim = claimed(decoder_around(nodes, *pairs_of("past_k", "past_v"), more=more, microsoft=True))
    assert [state.kind for state in claim.states] == ["in-place", "in-place"]


@pytest.mark.parametrize(("context", "capacity", "longest"), [(None, 16, 16), (8, 16, 8), (64, 64, 64)])
def test_a_window_cache_gets_room_for_all_positions(tmp_path, context, capacity, longest):
    """Such a buffer must hold the window; one that holds every position never cuts any away."""
    reads = ["x", "x", "x", "past_k", "past_v", "lengths", "total"]
    numbers = {"num_heads": 1, "kv_num_heads": 1, "local_window_size": 16, "sliding_window_cache": 1}
    nodes = [op("GroupQueryAttention", reads, ["y", "new_k", "new_v"], domain="com.microsoft", **numbers)]
    more = [build.value("lengths", ["batch"], INT32), build.value("total", [], INT32)]
    if context is not None:
        (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": {context}}}')
    claim = claimed(decoder_around(nodes, *pairs_of("past_k", "past_v"), more=more, microsoft=True), tmp_path)
    assert [(s.kind, s.capacity) for s in claim.states] == [("in-place", capacity)] * 2
    assert claim.max_length == longest


@pytest.mark.parametrize(
    ("kind", "domain", "key", "attributes", "expected"),
    [
        ("MultiHeadAttention", "com.microsoft", 6, {"num_heads": 1}, "append"),
        ("DecoderMaskedMultiHeadAttention", "com.microsoft", 5, {"num_heads": 1}, "append"),
        (
            "DecoderMaskedMultiHeadAttention", "com.microsoft", 5, {"num_heads": 1, "past_present_share_buffer": 1},
            "in-place",
        ),
        ("Attention", "", 4, {}, "append"),
    ],
)  # fmt: skip
def test_attention_ops_with_caches(kind, domain, key, attributes, expected):
    query = "k" if domain == "" else "x"
    reads = [query, query, query, *[""] * (key - 3), "past_k", "past_v"]
    nodes = [op(kind, reads, ["y", "new_k", "new_v"], domain=domain, **attributes)]
    claim = claimed(decoder_around(nodes, *pairs_of("past_k", "past_v"), microsoft=bool(domain)))
    assert [(s.kind, s.batch_axis, s.axis) for s in claim.states] == [(expected, 0, 2)] * 2


def test_the_attention_of_the_optimiser_has_keys_and_values_in_one_tensor():
    """What ONNX Runtime's transformers tool makes of GPT-2."""
    reads = ["x", "weights", "bias", "attention_mask", "past_0"]
    nodes = [
        op("Cast", ["whole"], ["weights"], to=1),
        op("Cast", ["zeros"], ["bias"], to=1),
        op("Attention", reads, ["y", "present_0"], domain="com.microsoft", num_heads=1, unidirectional=1),
    ]
    model = decoder_around(
        nodes, {"past_0": [2, *CACHE]}, {"present_0": [2, *GROWN]}, microsoft=True,
        more=[build.value("attention_mask", ["batch", "total"], INT32)],
        constants={"whole": np.ones((WIDTH, 3 * WIDTH)), "zeros": np.zeros(3 * WIDTH)},
    )  # fmt: skip
    claim = claimed(model)
    assert [(s.kind, s.batch_axis, s.axis, s.shape) for s in claim.states] == [("append", 1, 3, (2, 1, 1, 0, WIDTH))]
    assert claim.controls[1].role == "mask"


@pytest.mark.parametrize(("size", "capacity"), [(64, 64), ("room", None)])
def test_a_scatter_is_in_place_with_the_size_of_its_buffer(size, capacity):
    shape = ["batch", 1, size, WIDTH]
    nodes = [op("TensorScatter", ["a", "k", "places"], ["b"])]
    model = decoder_around(nodes, {"a": shape}, {"b": shape}, more=[build.value("places", ["batch"], INT64)], opset=24)
    claim = claimed(model)
    assert [(s.kind, s.axis, s.capacity) for s in claim.states] == [("in-place", 2, capacity)]
    assert claim.max_length == capacity
    assert claim.controls[1].role == "past-length"


def test_scattered_elements_are_in_place():
    shape = ["batch", 1, 16, WIDTH]
    nodes = [
        op("Shape", ["k"], ["sizes"]),
        op("Expand", ["cache_position", "sizes"], ["places"]),
        op("ScatterElements", ["a", "places", "k"], ["b"], axis=2),
    ]
    more = [build.value("cache_position", ["new"], INT64)]
    claim = claimed(decoder_around(nodes, {"a": shape}, {"b": shape}, more=more))
    assert [(s.kind, s.axis, s.capacity) for s in claim.states] == [("in-place", 2, 16)]
    assert claim.controls[1].role == "positions"


def test_elements_that_are_added_are_not_written():
    shape = ["batch", 1, 16, WIDTH]
    nodes = [
        op("Shape", ["k"], ["sizes"]),
        op("Expand", ["cache_position", "sizes"], ["places"]),
        op("ScatterElements", ["a", "places", "k"], ["b"], axis=2, reduction="add"),
    ]
    more = [build.value("cache_position", ["new"], INT64)]
    assert refusal(decoder_around(nodes, {"a": shape}, {"b": shape}, more=more)) == ""


@pytest.mark.parametrize(
    ("kind", "states", "layout", "shape", "batch_axis"),
    [
        ("LSTM", 2, 0, [1, "batch", WIDTH], 1),
        ("GRU", 1, 0, [1, "batch", WIDTH], 1),
        ("RNN", 1, 0, [1, "batch", WIDTH], 1),
        ("LSTM", 2, 1, ["batch", 1, WIDTH], 0),
    ],
)
def test_recurrent_ops(kind, states, layout, shape, batch_axis):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = {"w": np.zeros((1, gates * WIDTH, WIDTH))}
    nodes = [
        op("Cast", ["w"], ["weights"], to=1),
        op(kind, ["x", "weights", "weights", "", "", *["p0", "p1"][:states]], ["y", *["n0", "n1"][:states]],
           hidden_size=WIDTH, layout=layout),
    ]  # fmt: skip
    pasts, presents = ({f"{end}{i}": shape for i in range(states)} for end in "pn")
    claim = claimed(decoder_around(nodes, pasts, presents, constants=weights, opset=21))
    assert [(s.kind, s.batch_axis, s.axis) for s in claim.states] == [("recurrent", batch_axis, None)] * states


def test_a_scan_carries_states():
    body = helper.make_graph(
        [op("Add", ["held", "item"], ["kept"]), op("Identity", ["kept"], ["out"])],
        "body",
        [build.value("held", None), build.value("item", None)],
        [build.value("kept", None), build.value("out", None)],
    )
    nodes = [
        op("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        op("Scan", ["a", "turned"], ["b", "all"], body=body, num_scan_inputs=1),
    ]
    shape = ["batch", WIDTH]
    assert only_state(decoder_around(nodes, {"a": shape}, {"b": shape})) == ("recurrent", 0, None, (1, WIDTH))


@pytest.mark.parametrize(
    ("kind", "shape"), [("CausalConvWithState", ["batch", WIDTH, 3]), ("LinearAttention", ["batch", 1, WIDTH, WIDTH])]
)
def test_ops_with_a_state_of_their_own(kind, shape):
    nodes = [op(kind, ["x", "x", "x", "a"], ["y", "b"], domain="com.microsoft")]
    model = decoder_around(nodes, {"a": shape}, {"b": shape}, microsoft=True)
    assert only_state(model) == ("recurrent", 0, None, (1, *shape[1:]))


def test_states_are_found_inside_functions():
    body = [op("Concat", ["old", "new"], ["grown"], axis=2)]
    extend = helper.make_function("mine", "Extend", ["old", "new"], ["grown"], body, [helper.make_opsetid("", 23)])
    model = decoder_around(
        [op("Extend", ["a", "k"], ["b"], domain="mine")], {"a": CACHE}, {"b": GROWN}, functions=[extend]
    )
    assert only_state(model) == ("append", 0, 2, (1, 1, 0, WIDTH))


def test_a_cache_with_a_fixed_number_of_positions_cannot_grow():
    nodes = [op("Concat", ["past.0.key", "k"], ["present.0.key"], axis=2)]
    shape = ["batch", 1, 16, WIDTH]
    model = decoder_around(nodes, {"past.0.key": shape}, {"present.0.key": ["batch", 1, 17, WIDTH]})
    assert "fixed number of positions" in refusal(model)
