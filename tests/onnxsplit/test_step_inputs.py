from __future__ import annotations

import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_decoder import Control, State
from onnxsplit.step_inputs import control_array, state_shape

STARTS, NEW = (3, 1), 2
TOKENS = ((5, 6), (7, 8))


def make(role, *shape, starts=STARTS, width=4, layout="right", dtype="int64", value=None):
    control = Control(input="x", role=role, value=value)
    tokens = TOKENS[: len(starts)]
    array = control_array(control, TensorSpec(dtype=dtype, shape=shape), starts, NEW, tokens, width, layout)
    assert array.dtype == np.dtype(dtype)
    return array.tolist()


def test_tokens_are_those_of_the_rows():
    assert make("tokens", "b", "s", dtype="int32") == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("layout", "width", "mask"),
    [
        ("right", 4, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        ("right", 96, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        ("left", 4, [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
        ("holes", 4, [[1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1]]),
    ],
)
def test_the_mask_shows_what_a_row_reads(layout, width, mask):
    assert make("mask", "b", "t", layout=layout, width=width) == mask


@pytest.mark.parametrize(("width", "total"), [(3, 5), (96, 5), (2, 4)])
def test_the_mask_of_equal_rows_is_as_wide_as_what_they_hold(width, total):
    assert make("mask", "b", "t", starts=(3, 3), layout="equal", width=width) == [[1] * total] * 2


def test_a_mask_of_a_fixed_width_is_filled_up():
    assert make("mask", "b", 8, starts=(3,)) == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_positions_are_counted_from_0():
    assert make("positions", "b", "s") == [[3, 4], [1, 2]]
    assert make("positions", "s", starts=(3, 3)) == [3, 4]


@pytest.mark.parametrize(
    ("role", "values", "largest"), [("past-length", [3, 1], 3), ("total-length", [5, 3], 5), ("last-index", [4, 2], 4)]
)
def test_lengths_follow_the_shape_of_the_input(role, values, largest):
    assert make(role, "b") == values
    assert make(role, "b", 1) == [[value] for value in values]
    assert make(role, starts=(3, 3)) == largest
    assert make(role, 1, starts=(3, 3)) == [largest]


@pytest.mark.parametrize("role", ["past-length", "positions"])
def test_one_value_for_rows_of_unequal_length_is_refused(role):
    with pytest.raises(InputError, match="one value for all rows, and the rows need 1 to 3"):
        make(role, *(() if role == "past-length" else ("s",)))


@pytest.mark.parametrize("role", ["total-length", "last-index"])
def test_one_total_for_all_rows_is_that_of_the_longest(role):
    assert make(role) == {"total-length": 5, "last-index": 4}[role]


def test_only_the_last_position_is_scored():
    assert make("first-scored", 1) == [1]
    assert make("first-scored") == 1


def test_a_fixed_input_always_has_its_value():
    assert make("fixed", 1, value=1, dtype="bool") == [True]
    assert make("fixed", value=1) == 1


def test_the_shape_of_a_state_follows_the_rows_and_the_positions():
    state = State(
        past="p", present="q", kind="append", batch_axis=1, axis=3, shape=(2, 1, 4, 0, 8), stage=0, token_bytes=1,
        fixed_bytes=0,
    )  # fmt: skip
    assert state_shape(state, 5, 7) == (2, 5, 4, 7, 8)
