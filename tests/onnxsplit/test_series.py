"""Rows whose names differ only in their numbers."""

from __future__ import annotations

from onnxsplit.cli.series import folded


def test_many_rows_are_shown_as_one_where_the_first_stood():
    rows = [("x", "float32 [1]"), *((f"past.{i}.key", "float32 [8]") for i in range(4)), ("y", "float32 [1]")]
    assert folded(rows, names=1) == [(rows[0], 1), (("past.*.key", "float32 [8]"), 4), (rows[-1], 1)]


def test_few_rows_and_rows_that_differ_elsewhere_are_shown_each():
    rows = [(f"past.{i}", "int64 [1]") for i in range(3)] + [(f"past.{i}", f"int64 [{i}]") for i in range(3, 9)]
    assert folded(rows, names=1) == [(row, 1) for row in rows]


def test_every_name_of_a_row_is_starred():
    rows = [(f"past{i}", f"present{i}", "12 B") for i in range(9)]
    assert folded(rows, names=2) == [(("past*", "present*", "12 B"), 9)]
