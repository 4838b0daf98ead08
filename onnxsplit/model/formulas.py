"""Dimension names that are formulas, as exporters write them: ``past_sequence_length + 1``, ``2*n``, ``(a + b)//2``.

    sum      = product { ("+" | "-") product }
    product  = factor { ("*" | "//") factor }
    factor   = number | name | "(" sum ")"

A name that does not follow this grammar is a plain name. Text, nesting and values are bounded, and Python's own
``eval`` is not used.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_MOST_LENGTH = 300
_MOST_DEPTH = 20
_MOST_VALUE = 2**53 - 1
_TOKEN = re.compile(r"\s*(?:(?P<number>\d{1,16}(?![\w.]))|(?P<name>[^\W\d][\w.]*)|(?P<sign>//|[-+*()]))")
_SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}

_Tree = int | str | tuple[str, "_Tree", "_Tree"]  # a number, a name, or a sign with its two operands


@dataclass(frozen=True)
class Formula:
    """A dimension whose size follows from the sizes of others.

    Attributes:
        text: the formula as the model writes it.
        names: the names in it, each once.
        tree: the parsed formula.
    """

    text: str
    names: tuple[str, ...]
    tree: _Tree

    def value(self, sizes: Mapping[str, int]) -> int | None:
        """The size, from the sizes of its names; None when one is missing, or the result is negative or too large."""
        size = _value(self.tree, sizes)
        return size if size is not None and size >= 0 else None


def parse_formula(text: str) -> Formula | None:
    """Parse a dimension's name as a formula; None for a plain name."""
    tokens = _tokens(text)
    if tokens is None:
        return None
    parser = _Parser(tokens)
    try:
        tree = parser.sum()
    except _NoFormula:
        return None
    names = tuple(dict.fromkeys(token for kind, token in tokens if kind == "name"))
    if parser.left or not isinstance(tree, tuple) or not names:
        return None
    return Formula(text, names, tree)


def formulas_among(dims: Iterable[str]) -> dict[str, Formula]:
    """The formulas among a model's dimension names.

    A name with a minus sign, such as ``hidden-size``, is a formula only if all its parts are dimensions of the model.
    """
    parsed = {dim: parse_formula(dim) for dim in dims}
    plain = {dim for dim, formula in parsed.items() if formula is None}
    return {
        dim: formula
        for dim, formula in parsed.items()
        if formula is not None and ("-" not in dim or plain.issuperset(formula.names))
    }


class _NoFormula(Exception):
    """The text does not follow the grammar."""


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens, self._next, self._depth = tokens, 0, 0

    @property
    def left(self) -> bool:
        """Whether tokens are left."""
        return self._next < len(self._tokens)

    def sum(self) -> _Tree:
        return self._chain(self._product, ("+", "-"))

    def _product(self) -> _Tree:
        return self._chain(self._factor, ("*", "//"))

    def _chain(self, part: Callable[[], _Tree], signs: tuple[str, ...]) -> _Tree:
        tree = part()
        while self.left and self._tokens[self._next][1] in signs:
            sign = self._take()[1]
            tree = (sign, tree, part())
        return tree

    def _factor(self) -> _Tree:
        kind, token = self._take()
        if kind == "number":
            return int(token)
        if kind == "name":
            return token
        self._depth += 1
        if token != "(" or self._depth > _MOST_DEPTH:  # noqa: S105  a bracket, not a password
            raise _NoFormula
        tree = self.sum()
        if self._take()[1] != ")":
            raise _NoFormula
        self._depth -= 1
        return tree

    def _take(self) -> tuple[str, str]:
        if not self.left:
            raise _NoFormula
        self._next += 1
        return self._tokens[self._next - 1]


def _tokens(text: str) -> list[tuple[str, str]] | None:
    """Kind and text of every token; None when the text holds anything else."""
    text = text.strip()
    if len(text) > _MOST_LENGTH:
        return None
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            return None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return tokens


def _value(tree: _Tree, sizes: Mapping[str, int]) -> int | None:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return sizes.get(tree)
    sign, left, right = tree[0], _value(tree[1], sizes), _value(tree[2], sizes)
    if left is None or right is None or (sign == "//" and right == 0):
        return None
    result = _SIGNS[sign](left, right)
    return result if abs(result) <= _MOST_VALUE else None
