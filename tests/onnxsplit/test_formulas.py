from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxsplit.model.formulas import formulas_among, parse_formula


@pytest.mark.parametrize(
    ("text", "sizes", "value"),
    [
        ("past_sequence_length + 1", {"past_sequence_length": 5}, 6),
        ("past_sequence_length + sequence_length", {"past_sequence_length": 0, "sequence_length": 5}, 5),
        ("2*n", {"n": 3}, 6),
        ("(a+b)//2", {"a": 4, "b": 3}, 3),
        ("1 + a*b - 2", {"a": 2, "b": 3}, 5),
        ("a - b - c", {"a": 9, "b": 3, "c": 2}, 4),
        ("((h.0 + 1)//2)*w", {"h.0": 7, "w": 3}, 12),
        ("a - 5", {"a": 2}, None),
        ("a//b", {"a": 2, "b": 0}, None),
        ("a*a*a*a", {"a": 2**20}, None),
        ("a + b", {"a": 2}, None),
    ],
)
def test_a_formula_gives_the_size_its_names_have(text, sizes, value):
    formula = parse_formula(text)
    assert formula is not None
    assert formula.value(sizes) == value


@pytest.mark.parametrize(
    "text",
    [
        "batch", "?", "unk__12", "Reshape_dim_0", "foo bar", "1", "2*3", "(n)", "n +", "+ n", "a b + 1", "a / b",
        "floor(n/2)", "a ** b", "a % b", "__import__('os') + 1", "a.b() + 1", "1e9 + n", "n + 1.5", "",
        "n" * 400 + "+1", "(" * 30 + "n + 1" + ")" * 30,
    ],
)  # fmt: skip
def test_other_texts_are_plain_names(text):
    assert parse_formula(text) is None


def test_a_name_with_a_minus_is_a_formula_only_of_dimensions_that_there_are():
    assert list(formulas_among(["total", "past", "total-past"])) == ["total-past"]
    assert not formulas_among(["hidden-size", "batch"])
    assert list(formulas_among(["past + 1"])) == ["past + 1"]


@given(st.text(alphabet="ab1 +-*/()._é²", max_size=40))
def test_no_text_breaks_the_parser(text):
    formula = parse_formula(text)
    if formula is not None:
        formula.value({"a": 2, "b": 0})


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_values_are_those_of_arithmetic(a, b, c):
    formula = parse_formula("(a + b*2)//c + a*(b + 1)")
    assert formula is not None
    assert formula.value({"a": a, "b": b, "c": c}) == (a + b * 2) // c + a * (b + 1)
