"""Bounds on grammars, checked before llguidance reads them. Pure.

The library has limits on the work that it does, but its parsers call themselves for every level of a grammar. A chain
of a few thousand definitions would overflow the stack and end the process, so the levels are counted here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from onnxsplit.numbers import is_real
from runtime.wire.messages.sequences import MOST_GRAMMAR

_MOST_NESTED = 200  # brackets in brackets, of any kind
_MOST_LEVELS = 1000  # of a schema and of all schemas that it refers to, together
_MOST_RULES = 150  # of a grammar in Lark
_MOST_PARTS = 128
_MOST_MULTIPLE = 50_000  # of all numbers in "multipleOf" together: the library has a state for each remainder
_MOST_OPTIONAL = 4000  # "?" and "{" in expressions: with 15,000 in a row, the library works for 6 s before it stops
_WHOLE = {"grammars", "max_tokens"}
_PART = {"name", "json_schema", "lark_grammar"}
_BRACKETS = re.compile(r"[(\[{)\]}]")
_SCHEMA = re.compile(r"%json\s*")
_OPERATORS = re.compile(r"[~?*+&|]{20}|(?:\{[0-9, ]*\}\s*){20}")


def grammar_problem(grammar: str) -> str:
    """Why a grammar is beyond the bounds; empty if it is within them.

    Args:
        grammar: either ``{"grammars": [...]}`` in JSON, whose parts have a ``json_schema`` or a ``lark_grammar``; or
            the text of one grammar in Lark.
    """
    if not grammar.strip():
        return "it is empty"
    if len(grammar) > MOST_GRAMMAR:
        return f"it has {len(grammar)} characters; at most {MOST_GRAMMAR} are allowed"
    if (deepest := _nesting(grammar)) > _MOST_NESTED:
        return f"it is nested {deepest} levels deep; at most {_MOST_NESTED} are allowed"
    if _OPERATORS.search(grammar):
        return "it has 20 operators in a row"
    if not grammar.lstrip().startswith("{"):
        return _lark_problem(grammar)
    try:
        document = json.loads(grammar)
    except ValueError as error:
        return f"it is not JSON: {error}"
    parts = document.get("grammars")
    if (
        not set(document) <= _WHOLE
        or document.get("max_tokens") is not None
        or not isinstance(parts, list)
        or not 1 <= len(parts) <= _MOST_PARTS
    ):
        return f"it must be {{'grammars': [...]}} with 1 to {_MOST_PARTS} parts"
    if any(not isinstance(part, Mapping) or not set(part) <= _PART for part in parts):
        return f"its parts must be objects of {', '.join(sorted(_PART))}"
    larks = [part["lark_grammar"] for part in parts if part.get("lark_grammar") is not None]
    schemas = [part["json_schema"] for part in parts if part.get("json_schema") is not None]
    if not all(isinstance(lark, str) for lark in larks):
        return "lark_grammar must be a text"
    if not all(isinstance(schema, Mapping | bool) for schema in schemas):
        return "json_schema must be an object"
    if (levels := sum(map(_levels, schemas))) > _MOST_LEVELS:
        return (
            f"the schema and those that it refers to have {levels} levels together; at most {_MOST_LEVELS} are allowed"
        )
    if problem := _multiple_problem(schemas) or _optional_problem("".join(_strings(schemas))):
        return problem
    return _lark_problem("\n".join(larks))


def _lark_problem(lark: str) -> str:
    rules = lark.count(":") - lark.count("(?:")
    if rules > _MOST_RULES:
        return f"it has {rules} colons, one for each rule; at most {_MOST_RULES} are allowed"
    return _optional_problem(lark) or _multiple_problem(list(_schemas_within(lark)))


def _optional_problem(expressions: str) -> str:
    optional = expressions.count("?") + expressions.count("{")
    if optional > _MOST_OPTIONAL:
        return f"its expressions have ? and {{ {optional} times together; at most {_MOST_OPTIONAL} are allowed"
    return ""


def _within(value: Any) -> Iterator[Any]:
    """A value of JSON, and all values in it."""
    yield value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _within(inner)


def _strings(schemas: Any) -> Iterator[str]:
    """All strings in schemas; patterns may be among their names, too."""
    for value in _within(schemas):
        if isinstance(value, dict):
            yield from value
        elif isinstance(value, str):
            yield value


def _schemas_within(lark: str) -> Iterator[Any]:
    """The schemas that stand in a grammar in Lark, behind ``%json``."""
    for found in _SCHEMA.finditer(lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, found.end())[0]
        except ValueError:  # the library does not read it either
            continue


def _multiple_problem(schemas: Any) -> str:
    """Why the numbers in "multipleOf" cause too much work."""
    multiple = 1
    for divisor in _divisors(schemas):
        multiple = math.lcm(multiple, divisor)
        if multiple > _MOST_MULTIPLE:
            return (
                f"the least common multiple of its numbers in multipleOf, without a point and zeros at their end, is "
                f"above {_MOST_MULTIPLE}"
            )
    return ""


def _divisors(schemas: Any) -> Iterator[int]:
    """The digits of each number in "multipleOf", without a point, and without zeros at the end."""
    for value in _within(schemas):
        divisor = value.get("multipleOf") if isinstance(value, dict) else None
        if is_real(divisor) and 0 < abs(divisor) < math.inf:
            yield int("".join(map(str, Decimal(str(divisor)).normalize().as_tuple().digits)))


def _nesting(text: str) -> int:
    """The largest number of brackets that are open at once."""
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth = depth + 1 if found[0] in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _levels(schema: Any) -> int:
    """The levels of a schema, and of each that it refers to: the library is at most so deep in it at once."""
    whole = _depth(schema)
    return whole + sum(_depth(_target(schema, reference)) for reference in set(_references(schema)))


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 1


def _references(schema: Any) -> Iterator[str]:
    for value in _within(schema):
        if isinstance(value, dict):
            yield from (v for key, v in value.items() if key in ("$ref", "$dynamicRef") and isinstance(v, str))


def _target(schema: Any, reference: str) -> Any:
    """What a reference points to; the whole schema where that is not plain."""
    found = schema
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and len(key) < 9 and int(key) < len(found):
            found = found[int(key)]
        else:
            return schema
    return found
