"""Grammars for what clients ask of an answer: OpenAI's ``response_format``, and the options of vLLM's server.

Each function returns a grammar for :class:`~runtime.requests.generate_options.GenerateOptions`, which llguidance has
checked. That takes a millisecond for usual grammars and at most about a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxsplit.errors import InputError, shown
from runtime.guided.guide import check_grammar, lark_grammar, regex_grammar
from runtime.text.tools import FORMATTED, lark_string
from runtime.wire.messages.sequences import MOST_GRAMMAR

_MOST_CHOICES = 1000


def grammar_of(response_format: Mapping[str, Any]) -> str:
    """The grammar of a ``response_format``: its ``type`` is text, json_object or json_schema; empty for text.

    A ``json_schema`` with ``strict`` is refused if it has keywords that cannot be enforced. Without, these are ignored.

    Raises:
        InputError: it is none of these, or the schema cannot be used.
        MissingDependency: llguidance is not installed.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return guided_json({"type": "object"})
    if kind != "json_schema":
        raise InputError(
            f"response_format must have the type text, json_object or json_schema, not {shown(response_format)}"
        )
    described = response_format.get("json_schema")
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise InputError(f"response_format.json_schema must hold an object schema, not {shown(described)}")
    return guided_json(described["schema"], strict=bool(described.get("strict")))


def guided_json(schema: Mapping[str, Any] | bool | str, *, strict: bool = True) -> str:
    """The grammar of JSON by a schema, given as an object or as its text.

    Args:
        schema: the schema.
        strict: whether keywords that cannot be enforced are an error; they are ignored otherwise.

    Raises:
        InputError: it is not a schema, or it is too large.
        MissingDependency: llguidance is not installed.
    """
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        if read is True:
            read = {}
        if not isinstance(read, Mapping):
            raise InputError(f"a JSON schema must be an object, not {shown(schema)}")
        options = {**FORMATTED, "lenient": not strict}
        grammar = json.dumps({"grammars": [{"json_schema": {"x-guidance": options, **read}}]})
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the JSON schema cannot be read: {error}") from error
    return _checked(grammar)


def guided_regex(regex: str) -> str:
    """The grammar of texts that a regular expression matches as a whole.

    Raises:
        InputError: it is not a regular expression, or it is too large. Look-around and back-references are not allowed.
        MissingDependency: llguidance is not installed.
    """
    return _checked(regex_grammar(_text("guided_regex", regex)))


def guided_choice(choices: Sequence[str]) -> str:
    """The grammar of one of some texts.

    Raises:
        InputError: they are no texts, or there are too many.
        MissingDependency: llguidance is not installed.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not 1 <= len(choices) <= _MOST_CHOICES:
        raise InputError(f"guided_choice must be a list of 1 to {_MOST_CHOICES} texts, not {shown(choices)}")
    return _checked("start: " + " | ".join(lark_string(_text("guided_choice", choice)) for choice in choices))


def guided_grammar(text: str) -> str:
    """The grammar that a text in Lark's form or in GBNF describes.

    Raises:
        InputError: it cannot be read, or it is too large.
        MissingDependency: llguidance is not installed.
    """
    return _checked(lark_grammar(_text("guided_grammar", text)))


def structured_outputs(options: Mapping[str, Any]) -> str:
    """The grammar of vLLM's ``structured_outputs``: one of json, json_object, regex, choice and grammar.

    Raises:
        InputError: there is not exactly one of them, or it cannot be used.
        MissingDependency: llguidance is not installed.
    """
    makers: dict[str, Callable[[Any], str]] = {
        "json": guided_json,
        "json_object": lambda wanted: guided_json({"type": "object"}) if wanted is True else "",
        "regex": guided_regex,
        "choice": guided_choice,
        "grammar": guided_grammar,
    }
    given = {k: v for k, v in options.items() if v is not None} if isinstance(options, Mapping) else {}
    if len(given) != 1 or not set(given) <= set(makers):
        raise InputError(f"structured_outputs must hold one of {', '.join(makers)}, not {shown(options)}")
    ((kind, value),) = given.items()
    return makers[kind](value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MOST_GRAMMAR:
        raise InputError(f"{name} must be text of at most {MOST_GRAMMAR} characters, not {shown(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name} must be text in Unicode; {shown(value)} holds half of a surrogate pair")
    return value


def _checked(grammar: str) -> str:
    check_grammar(grammar)
    return grammar
