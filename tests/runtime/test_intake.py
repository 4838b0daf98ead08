"""A request's arguments are normalised, or refused with a message, before anything else happens."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from onnxsplit.errors import InputError
from onnxsplit.tensors import check_inputs
from runtime.requests.normalize import MOST_TIMEOUT_S, normal_inputs, normal_names, normal_timeout_ns

SPECS = {"x": ("float32", ("n", 2)), "s": ("string", ("n",))}
REQUIRED = ("x", "s")


@pytest.mark.parametrize(
    "timeout",
    [
        0,
        -1,
        -0.0,
        float("inf"),
        float("nan"),
        1e12,
        2**63,
        10**400,
        "5",
        b"5",
        True,
        [1],
        Fraction(1, 2),
        np.array([1]),
    ],
)
def test_an_invalid_timeout_is_refused(timeout):
    with pytest.raises(InputError, match="allowed: a number of seconds above 0"):
        normal_timeout_ns(timeout)


@pytest.mark.parametrize(("timeout", "ns"), [(None, None), (1, 10**9), (0.5, 5 * 10**8), (1e-12, 1)])
def test_a_timeout_is_nanoseconds(timeout, ns):
    assert normal_timeout_ns(timeout) == ns
    assert normal_timeout_ns(np.float32(2)) == normal_timeout_ns(np.int8(2)) == 2 * 10**9
    assert normal_timeout_ns(MOST_TIMEOUT_S) == MOST_TIMEOUT_S * 10**9


@pytest.mark.parametrize("outputs", ["y", b"y", [["y"]], [None], [b"y"], 5, {"y": 1}, iter(["y"])])
def test_names_that_are_none_are_refused(outputs):
    with pytest.raises(InputError, match="a list of names"):
        normal_names(outputs)


def test_names_are_each_once_in_order():
    assert normal_names(["b", "a", "b"]) == ("b", "a")
    assert normal_names(None) is None


@pytest.mark.parametrize("order", [">", "<"])
def test_values_are_the_same_in_either_byte_order(order):
    given = np.array([[1, -2], [3, 4e30]], f"{order}f4")
    array = normal_inputs({"x": given}, SPECS, REQUIRED)["x"]
    assert array.dtype.isnative
    assert array.tolist() == given.tolist()


@pytest.mark.parametrize(
    "given",
    [["a", "ä\0"], np.array(["a", "ä\0"], object), np.array([b"a", "ä\0".encode()], object), [np.str_("a"), "ä\0"]],
)
def test_strings_are_str(given):
    array = normal_inputs({"s": given}, SPECS, REQUIRED)["s"]
    assert array.dtype == object
    assert all(type(text) is str for text in array)
    assert array.tolist() == ["a", "ä\0"] or array.tolist() == ["a", "ä"]  # NumPy's own text types drop a last NUL


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([None, "a"], "element 0 of input 's' is a NoneType"),
        ([1, 2], "element 0 of input 's' is an int"),
        (["a", 1], "element 1 of input 's' is an int"),
        (np.ones(2), "expected string"),
        (np.array([1.5, "a"], object), "element 0 of input 's' is a float"),
        (np.array([["a"], ["b", "c"]], object), "is a list"),
        (["a", "\ud800"], "element 1 of input 's' is not UTF-8"),
        ([b"\xff"], "element 0 of input 's' is not UTF-8"),
    ],
)
def test_what_is_no_string_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        check_inputs(normal_inputs({"s": given}, SPECS, REQUIRED), SPECS, frozenset("x"))


class Awkward:
    def __array__(self, *_args, **_words):
        raise ZeroDivisionError("no array today")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([("x", 1)], "must map names to arrays"),
        ({1: np.ones(2)}, "must be text"),
        ({"x": [[1, 2], [3]]}, "cannot be made an array"),
        ({"x": Awkward()}, "no array today"),
        ({"x": np.ma.array([[1.0, 2.0]], mask=[[True, False]])}, "masked"),
        ({"x": np.array([[object(), None]])}, "expected float32"),
        ({"x": "text"}, "expected float32"),
        ({"x" * 10**7: np.ones(2)}, None),
    ],
)
def test_what_is_no_input_is_refused_with_a_message_of_bounded_length(inputs, words):
    with pytest.raises(InputError, match=words) as caught:
        check_inputs(normal_inputs(inputs, SPECS, REQUIRED), SPECS)
    assert len(str(caught.value)) < 2000
