"""Long listings in few rows."""

from __future__ import annotations

from onnxsplit.cli.series import first_of_many, folded


def test_many_rows_are_shown_as_one_where_the_first_stood():
    rows = [("x", "float32 [1]"), *((f"past.{i}.key", "float32 [8]") for i in range(4)), ("y", "float32 [1]")]
    assert folded(rows, names=1) == [(rows[0], 1), (("past.*.key", "float32 [8]"), 4), (rows[-1], 1)]


def test_few_rows_and_rows_that_differ_elsewhere_are_shown_each():
    rows = [(f"past.{i}", "int64 [1]") for i in range(3)] + [(f"past.{i}", f"int64 [{i}]") for i in range(3, 9)]
    assert folded(rows, names=1) == [(row, 1) for row in rows]


def test_every_name_of_a_row_is_starred():
    rows = [(f"past{i}", f"present{i}", "12 B") for i in range(9)]
    assert folded(rows, names=2) == [(("past*", "present*", "12 B"), 9)]


def test_of_many_rows_the_first_ones_are_shown():
    assert first_of_many(list(range(8))) == (list(range(8)), [])
    assert first_of_many(list(range(9))) == ([0, 1, 2, 3], [4, 5, 6, 7, 8])
