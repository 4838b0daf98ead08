"""Requests are split along their batch axis, and their outputs are joined in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.requests.microbatch import join, split


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 2))
def test_what_is_split_and_joined_is_what_it_was(total, rows, axis):
    shape = [2, 3, 4]
    shape[axis] = total
    array = np.arange(np.prod(shape)).reshape(shape)
    parts = split({"x": array, "whole": np.ones(3)}, {"x": axis, "whole": None}, rows)
    assert len(parts) == -(-total // rows)
    assert all(part["x"].shape[axis] <= rows for part in parts)
    assert all(part["whole"].shape == (3,) for part in parts)
    assert np.array_equal(join([{"x": part["x"]} for part in parts], {"x": axis})["x"], array)


def test_inputs_of_unlike_numbers_of_rows_stay_whole():
    """Two dimensions with different names may differ in size; it is not known how the model combines them."""
    assert len(split({"a": np.ones((2, 1)), "b": np.ones((3, 1))}, {"a": 0, "b": 0}, 1)) == 1


def test_an_empty_batch_is_one_part():
    assert len(split({"x": np.ones((0, 4))}, {"x": 0}, 2)) == 1
