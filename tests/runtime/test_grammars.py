"""What clients ask of an answer becomes a grammar, and a random model that follows it writes what they asked for."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from guided import END, TOKENIZER, Guided

from onnxsplit.errors import InputError, ModelError
from runtime.guided.guide import GuidedTokenizer, check_grammar
from runtime.text.grammars import (
    grammar_of,
    guided_choice,
    guided_grammar,
    guided_json,
    guided_regex,
    structured_outputs,
)
from runtime.text.tools import ToolCallArguments, ToolCallBegin, ToolParser, tool_grammar

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}, "s": {"$ref": "#/$defs/side"}},
    "required": ["x", "s"],
    "additionalProperties": False,
    "$defs": {"side": {"enum": ["left", "right"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "move.to", "parameters": POINT}},
    {"type": "function", "function": {"name": "stop"}},
]
SETS = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return GuidedTokenizer(TOKENIZER.to_str().encode(), (END,))


def written(tokenizer, grammar: str, seed: int) -> str:
    """What a random model writes; its end token is likely, so that it does not write for ever."""
    return Guided(tokenizer, grammar, temperature=1.0, seed=seed, bias=((END, 8.0),)).finish(2000)


def response(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


def is_point(text: str) -> bool:
    jsonschema.validate(json.loads(text), POINT)
    return True


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        (grammar_of(response(POINT, strict=True)), is_point),
        (guided_json(json.dumps(POINT)), is_point),
        (grammar_of(response(SETS)), lambda text: isinstance(json.loads(text), list)),
        (guided_regex(r"^(?:ab|c)[0-9]{2}\\$"), lambda text: re.fullmatch(r"(ab|c)[0-9]{2}\\", text)),
        (guided_regex(r"a\$"), lambda text: text == "a$"),
        (guided_choice(["a: b", '"é\n', "🙂"]), lambda text: text in ("a: b", '"é\n', "🙂")),
        (guided_grammar('root ::= "a" | "b" root'), lambda text: re.fullmatch("b*a", text)),
        (guided_grammar('start: "a" | "b" start'), lambda text: re.fullmatch("b*a", text)),
        (structured_outputs({"choice": ["on", "off"], "json": None}), lambda text: text in ("on", "off")),
    ],
)
def test_a_random_model_writes_what_was_asked_for(tokenizer, grammar, holds, seed):
    assert holds(written(tokenizer, grammar, seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["hermes", "json"])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"move.to", "stop"}), ({"type": "function", "function": {"name": "move.to"}}, {"move.to"})],
)
def test_a_random_model_calls_the_tools_that_it_must(tokenizer, kind, choice, names, seed):
    grammar = tool_grammar(TOOLS, choice, kind)
    check_grammar(grammar)
    parser = ToolParser(kind)
    events = parser.add(written(tokenizer, grammar, seed)) + parser.finish()
    assert {type(event) for event in events} == {ToolCallBegin, ToolCallArguments}
    schemas = {"move.to": POINT, "stop": {"maxProperties": 0, "type": "object"}}
    called = [event.name for event in events if isinstance(event, ToolCallBegin)]
    assert set(called) <= names
    assert len(called) == 1 or (kind, choice) == ("hermes", "required")
    for index, name in enumerate(called):
        arguments = [event.text for event in events if isinstance(event, ToolCallArguments) and event.index == index]
        jsonschema.validate(json.loads("".join(arguments)), schemas[name])


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_an_answer_that_need_not_call_a_tool_is_free(choice):
    assert tool_grammar(TOOLS, choice, "hermes") == ""
    assert grammar_of({"type": "text"}) == ""


def test_a_hundred_tools_make_a_grammar():
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": POINT}} for n in range(100)]
    check_grammar(tool_grammar(tools, "required", "hermes"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: grammar_of({"type": "xml"}), "type text, json_object or json_schema"),
        (lambda: grammar_of({"type": "json_schema", "json_schema": {"name": "x"}}), "must hold an object schema"),
        (lambda: grammar_of(response(SETS, strict=True)), "uniqueItems"),
        (lambda: guided_json("{"), "cannot be read"),
        (lambda: guided_json({"a": {1, 2}}), "cannot be read"),
        (lambda: guided_json([]), "must be an object"),
        (lambda: guided_json({"enum": ["x" * (1 << 18)]}), "at most 262144 are allowed"),
        (lambda: guided_regex("(?=a)b"), "look-ahead"),
        (lambda: guided_regex("(a|b"), "unclosed group"),
        (lambda: guided_regex(7), "must be text"),
        (lambda: guided_choice([]), "a list of 1 to 1000"),
        (lambda: guided_choice("ab"), "a list of 1 to 1000"),
        (lambda: guided_choice(["a", 1]), "must be text"),
        (lambda: guided_grammar("(" * 50_000), "nested 50000 levels"),
        (lambda: guided_grammar("root ::= ("), "cannot be"),
        (lambda: structured_outputs({"json": {}, "regex": "a"}), "must hold one of"),
        (lambda: structured_outputs({"tag": {}}), "must hold one of"),
        (lambda: tool_grammar([{"type": "function"}], "required", "json"), "a tool must be"),
        (lambda: tool_grammar([{"function": {"name": "a b"}}], "required", "json"), "the name of a tool"),
        (lambda: guided_regex("a\ud800"), "half of a surrogate pair"),
        (lambda: guided_choice(["a", "\udc00"]), "half of a surrogate pair"),
        (lambda: tool_grammar([{"function": {"name": "a", "parameters": 1}}], "required", "json"), "a JSON schema"),
        (lambda: tool_grammar(TOOLS, "always", "json"), "tool_choice must be none"),
        (lambda: tool_grammar(TOOLS, {"function": {"name": "go"}}, "json"), "names none of the tools"),
        (lambda: tool_grammar([], "required", "json"), "names none of the tools"),
        (lambda: tool_grammar(TOOLS * 60, "required", "json"), "at most 100"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused(make, reason):
    with pytest.raises(InputError, match=reason):
        make()


def test_a_schema_that_is_too_hard_is_an_error_of_the_model_and_not_of_the_node(tokenizer):
    with pytest.raises(ModelError, match="cannot be used"):
        tokenizer.guide(guided_json({"type": "integer", "multipleOf": 49_999, "minimum": 7, "maximum": 10**8}))
