"""Finds calls of tools in the text that a model writes, and makes it write them. Pure.

    hermes   text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ...     Hermes, Qwen, SmolLM2
    json     {"name": "f", "parameters": {...}}, or a list of such calls           Llama 3.1 and 3.2

In both, ``arguments`` and ``parameters`` are the same. What is not a call is text: nothing that the model writes is
lost, except the marks of the format, white space around calls and other members of a call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

from msgspec import Struct

from onnxsplit.errors import InputError, shown
from runtime.text.json_scanner import JsonScanner, Place

ToolFormat = Literal["hermes", "json"]
_Result = TypeVar("_Result")
Reader = Generator[None, str, _Result]

_BEGIN, _END = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MOST_TOOLS = 100

FORMATTED = {"whitespace_pattern": r"[ \n\t]{0,16}"}
"""How JSON is laid out: some white space, but not so much that a model that writes nothing else gets nowhere."""


class ToolText(Struct, frozen=True):
    """Text of the answer that is not a call."""

    text: str


class ToolCallBegin(Struct, frozen=True):
    """A call of a tool begins.

    Attributes:
        index: the number of the call in this answer, from 0.
        id: identifies the call.
        name: the name of the tool.
    """

    index: int
    id: str
    name: str


class ToolCallArguments(Struct, frozen=True):
    """The next part of a call's arguments, a JSON object. It is not complete where the model was stopped."""

    index: int
    text: str


ToolEvent = ToolText | ToolCallBegin | ToolCallArguments


class ToolParser:
    """Finds the calls in one answer. However the text is divided into pieces, the events are the same when joined.

    Args:
        kind: the format.

    Raises:
        InputError: there is no such format.
    """

    def __init__(self, kind: ToolFormat) -> None:
        if kind not in ("hermes", "json"):
            raise InputError(f"the format of tool calls must be hermes or json, not {shown(kind)}")
        self._events: list[ToolEvent] = []
        self._text: list[str] = []  # text that is not given out yet
        self._arguments: list[str] = []  # the same of arguments
        self._near_call = True  # whether nothing but white space has come since the last call, or at all
        self._unread = ""  # characters that are to be read again
        self._ended = False
        self._calls = 0
        self._reader = self._read_hermes() if kind == "hermes" else self._read_json()
        next(self._reader)

    def add(self, text: str) -> list[ToolEvent]:
        """Add new text; returns what is certain now."""
        for character in text:
            self._reader.send(character)
        return self._taken()

    def finish(self) -> list[ToolEvent]:
        """The text has ended; returns what was held back."""
        self._ended = True
        with suppress(StopIteration):
            self._reader.send("")
        self._near_call = self._near_call and self._calls > 0
        return self._taken()

    # Events

    def _taken(self) -> list[ToolEvent]:
        self._give_text()
        self._give_arguments()
        taken, self._events = self._events, []
        return taken

    def _give_text(self) -> None:
        """Give text out. White space around calls waits until it is known that other text follows."""
        text = "".join(self._text)
        if text and not (self._near_call and not text.strip(_SPACE)):
            self._near_call = False
            self._text = []
            self._events.append(ToolText(text))

    def _give_arguments(self) -> None:
        if self._arguments:
            self._events.append(ToolCallArguments(self._calls, "".join(self._arguments)))
            self._arguments = []

    def _begin(self, name: str) -> None:
        self._give_text()
        self._text = []
        self._near_call = True
        self._events.append(ToolCallBegin(self._calls, f"call_{secrets.token_hex(12)}", name))

    def _end(self) -> None:
        self._give_arguments()
        self._calls += 1

    # Readers: each waits in ``yield`` for the next character

    def _next(self) -> Reader[str]:
        """The next character; empty behind the last one."""
        if self._unread:
            character, self._unread = self._unread[0], self._unread[1:]
            return character
        return "" if self._ended else (yield)

    def _space(self) -> Reader[str]:
        """White space, up to another character."""
        space = ""
        while (character := (yield from self._next())) and character in _SPACE:
            space += character
        self._unread = character + self._unread
        return space

    def _mark(self, mark: str) -> Reader[str]:
        """What is there of a mark."""
        text = ""
        while text != mark and (character := (yield from self._next())):
            if not mark.startswith(text + character):
                self._unread = character + self._unread
                break
            text += character
        return text

    def _read_hermes(self) -> Reader[None]:
        while character := (yield from self._next()):
            if character != _BEGIN[0]:
                self._text.append(character)
                continue
            self._unread = character + self._unread
            mark = yield from self._mark(_BEGIN)
            if mark != _BEGIN:
                self._text.append(mark)
            elif (yield from self._read_call(mark, needs_arguments=False)):
                space = yield from self._space()
                mark = yield from self._mark(_END)
                if mark != _END and not self._ended:
                    self._text.append(space)
                    self._unread = mark + self._unread

    def _read_json(self) -> Reader[None]:
        raw = yield from self._space()
        listed = yield from self._mark("[")
        raw += listed + (yield from self._space())
        while (yield from self._read_call(raw, needs_arguments=True)):
            raw = yield from self._space()
            if not listed or (yield from self._mark("]")):
                self._text.append(raw)
                break
            raw += yield from self._mark(",")
            raw += yield from self._space()
        while character := (yield from self._next()):
            self._text.append(character)

    def _read_call(self, raw: str, *, needs_arguments: bool) -> Reader[bool]:
        """Read one call; returns whether it was one. Otherwise it has become text.

        Args:
            raw: what was read before it and belongs to it.
            needs_arguments: whether an object without arguments is not a call.
        """
        call, begun = _Call(), False
        while call.scanner.place is not Place.DONE:
            character = yield from self._next()
            if not character or not call.add(character):
                self._unread = character + self._unread
                break
            raw += character
            if not begun and call.name and call.arguments:
                self._begin(call.name)
                begun = True
            if begun:
                self._arguments += call.arguments
                call.arguments.clear()
        done = call.scanner.place is Place.DONE
        if not begun and done and call.name and not needs_arguments:
            self._begin(call.name)
            self._arguments.append("{}")
            begun = True
        if not begun:
            self._text.append(raw)
            return False
        self._end()
        return done


class _Call:
    """One call, as its characters come.

    Attributes:
        scanner: reads the object.
        name: the name of the tool; empty before it was read.
        arguments: the characters of the arguments that nobody has taken yet.
    """

    def __init__(self) -> None:
        self.scanner = JsonScanner()
        self.name = ""
        self.arguments: list[str] = []
        self._key = ""  # that of the arguments
        self._has_arguments = False

    def add(self, character: str) -> bool:
        """Read the next character; returns whether this can still be a call."""
        scanner, inside = self.scanner, self.scanner.depth > 0
        if not scanner.add(character):
            return False
        if not inside:
            return character in _SPACE or character == "{"
        if scanner.opening and scanner.key == "name" and not self.name:
            return character == '"'
        if scanner.opening and scanner.key in _ARGUMENTS and not self._key:
            self._key = scanner.key
            if scanner.opening != "{":
                return False
        if scanner.string is not None and scanner.key == "name" and not self.name:
            self.name = scanner.string
            return bool(self.name)
        if scanner.key == self._key and not self._has_arguments:
            self.arguments.append(character)
            self._has_arguments = scanner.depth == 1
        return True


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], kind: ToolFormat, *, parallel: bool = True
) -> str:
    """The grammar of an answer that has to call tools; empty where it need not. It is not checked.

    Args:
        tools: the tools, as in OpenAI's ``tools``.
        choice: none or auto; required for a call of any tool; ``{"type": "function", "function": {"name": ...}}`` for
            a call of one.
        kind: the format.
        parallel: whether ``required`` allows several calls.

    Raises:
        InputError: a tool or the choice is not valid; ``option`` is ``tools`` or ``tool_choice``.
    """
    functions = [_function(tool) for tool in tools]
    if choice in ("none", "auto"):
        return ""
    if choice != "required":
        functions = [function for function in functions if function["name"] == _chosen(choice)]
        parallel = False
    if not functions:
        raise InputError(f"tool_choice {shown(choice)} names none of the tools", option="tool_choice")
    if len(functions) > _MOST_TOOLS:
        raise InputError(
            f"there are {len(functions)} tools; tool_choice {choice!r} allows at most {_MOST_TOOLS}",
            option="tool_choice",
        )
    key, before, after = "arguments", "<tool_call>\n", "\n</tool_call>"
    if kind == "json":
        key, before, after, parallel = "parameters", "", "", False
    calls, schemas = [], []
    for number, function in enumerate(functions):
        opening = f'{before}{{"name": {json.dumps(function["name"])}, "{key}": '
        calls.append(f"{lark_string(opening)} @p{number} {lark_string('}' + after)}")
        options = {**FORMATTED, "lenient": not function.get("strict")}
        schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        schemas.append({"name": f"p{number}", "json_schema": {"x-guidance": options, **schema}})
    start = "start: call" + (' ("\\n" call)*' if parallel else "") + "\ncall: " + " | ".join(calls)
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start}, *schemas]})


def lark_string(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text).replace(":", "\\u003a")


def _function(tool: object) -> Mapping[str, Any]:
    """The function of a tool.

    Raises:
        InputError: it has none, or its name or its parameters are not allowed.
    """
    function = (
        tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    )
    if not isinstance(function, Mapping):
        raise InputError(
            f'a tool must be {{"type": "function", "function": {{...}}}}, not {shown(tool)}', option="tools"
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"the name of a tool must be 1 to 64 letters, digits, '_', '-' or '.', not {shown(name)}", option="tools"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InputError(
            f"the parameters of tool {name!r} must be a JSON schema, not {shown(parameters)}", option="tools"
        )
    return function


def _chosen(choice: object) -> str:
    function = (
        choice.get("function") if isinstance(choice, Mapping) and choice.get("type", "function") == "function" else None
    )
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            "tool_choice must be none, auto, required or "
            f'{{"type": "function", "function": {{"name": ...}}}}, not {shown(choice)}',
            option="tool_choice",
        )
    return name
