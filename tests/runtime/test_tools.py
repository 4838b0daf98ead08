"""Calls of tools are found in an answer, however it is divided into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.errors import InputError
from runtime.text.json_scanner import JsonScanner, Place
from runtime.text.tools import ToolCallArguments, ToolCallBegin, ToolParser, ToolText


def parse(kind: str, pieces) -> list:
    """The events of an answer, joined: texts, and pairs of a name and arguments."""
    parser, found, ids = ToolParser(kind), [], set()
    events = [event for piece in pieces for event in parser.add(piece)] + parser.finish()
    for event in events:
        match event:
            case ToolText(text) if found and isinstance(found[-1], str):
                found[-1] += text
            case ToolText(text):
                found.append(text)
            case ToolCallBegin(index, id, name):
                assert (index, id[:5], id in ids) == (len(ids), "call_", False)
                ids.add(id)
                found.append([name, ""])
            case ToolCallArguments(index, text):
                assert index == len(ids) - 1
                found[-1][1] += text
    return found


CALL = '{"name": "weather", "arguments": {"city": "Kö\\"ln}", "days": [1, 2.5e3, {"a": null}]}}'
ARGUMENTS = '{"city": "Kö\\"ln}", "days": [1, 2.5e3, {"a": null}]}'
CASES = [
    ("hermes", "", []),
    ("hermes", "Hello <b> <tool_ you", ["Hello <b> <tool_ you"]),
    ("hermes", "  \n", ["  \n"]),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", [["weather", ARGUMENTS]]),
    ("hermes", f"\n<tool_call>{CALL}</tool_call>\n", [["weather", ARGUMENTS]]),
    ("hermes", f"Well.\n<tool_call>{CALL}</tool_call>\nDone", ["Well.\n", ["weather", ARGUMENTS], "\nDone"]),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", [["weather", ARGUMENTS]] * 2),
    ("hermes", f"<tool_call>{CALL}<tool_call>{CALL}", [["weather", ARGUMENTS]] * 2),
    ("hermes", f"<tool_call>{CALL} and more", [["weather", ARGUMENTS], " and more"]),
    ("hermes", '<tool_call>{"arguments": {"x": 1 }, "name": "f"}</tool_call>', [["f", '{"x": 1 }']]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [["f", "{}"]]),
    ("hermes", '<tool_call>{"id": 3, "name": "f", "arguments": {}, "z": [{}]}</tool_call>', [["f", "{}"]]),
    ("hermes", "<<tool_call>sorry</tool_call>", ["<<tool_call>sorry</tool_call>"]),
    ("hermes", '<tool_call>{"name": 3}', ['<tool_call>{"name": 3}']),
    ("hermes", '<tool_call>{"name": ""}', ['<tool_call>{"name": ""}']),
    ("hermes", '<tool_call>["name"]', ['<tool_call>["name"]']),
    ("hermes", '<tool_call>{"name": "f", "arguments": "x"}', ['<tool_call>{"name": "f", "arguments": "x"}']),
    ("hermes", '<tool_call>{"arguments": 12, "name": "f"}', ['<tool_call>{"arguments": 12, "name": "f"}']),
    ("hermes", '<tool_call>{"name": "f", "argu', ['<tool_call>{"name": "f", "argu']),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [1', [["f", '{"x": [1']]),
    ("hermes", f"<tool_call>{CALL}</tool_", [["weather", ARGUMENTS]]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": }} more', [["f", '{"x": '], "}} more"]),
    ("json", "Hello {", ["Hello {"]),
    ("json", CALL, [["weather", ARGUMENTS]]),
    ("json", f" [{CALL} , {CALL}] ", [["weather", ARGUMENTS]] * 2),
    ("json", '{"name": "f", "parameters": {}}', [["f", "{}"]]),
    ("json", '{"type": "function", "name": "f", "parameters": {}} Yes', [["f", "{}"], " Yes"]),
    ("json", '{"name": "Ann", "age": 3}', ['{"name": "Ann", "age": 3}']),
    ("json", '[{"name": "Ann"}, {"name": "Bob"}]', ['[{"name": "Ann"}, {"name": "Bob"}]']),
    ("json", "[]", ["[]"]),
    ("json", "[1, 2]", ["[1, 2]"]),
    ("json", f"[{CALL}, 3]", [["weather", ARGUMENTS], ", 3]"]),
    ("json", f"[{CALL}", [["weather", ARGUMENTS]]),
    ("json", '{"name": "f", "parameters": [1]}', ['{"name": "f", "parameters": [1]}']),
]


@pytest.mark.parametrize(("kind", "text", "wanted"), CASES)
def test_calls_are_found(kind, text, wanted):
    assert parse(kind, [text]) == wanted
    assert parse(kind, list(text)) == wanted


PARTS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        CALL,
        *CALL,
        "\n",
        " ",
        "<",
        "[",
        "]",
        ",",
        "{",
        "}",
        '"name"',
        ":",
        '"f"',
        "{}",
        "é🙂",
    ]
)


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(["hermes", "json"]), parts=st.lists(PARTS, max_size=12), data=st.data())
def test_any_division_of_an_answer_gives_the_same_events(kind, parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = parse(kind, pieces)
    assert found == parse(kind, [text])
    for name, arguments in (event for event in found if isinstance(event, list)):
        assert name in text
        assert arguments in (*[text[at : at + len(arguments)] for at in range(len(text))], "{}")
    if not any(isinstance(event, list) for event in found):
        assert "".join(found) == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, escaped=st.booleans(), indent=st.sampled_from([None, 1]), data=st.data())
def test_the_scanner_takes_json_and_nothing_else(value, escaped, indent, data):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    if data.draw(st.booleans(), label="damaged"):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from([*'{}[]",:0.-e \\tn', ""])) + text[at + 1 :]
    scanner = JsonScanner()
    taken = all(scanner.add(character) for character in text + " ")
    try:
        json.loads(text, parse_constant=lambda name: [][0])
        wanted = True
    except (ValueError, IndexError):
        wanted = False
    assert (taken and scanner.place is Place.DONE) == wanted


def test_the_scanner_bounds_the_depth():
    scanner = JsonScanner()
    assert not all(scanner.add(character) for character in "[" * 1000)


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match="must be hermes or json"):
        ToolParser("xml")
