"""Calls of tools in answers, as OpenAI's API has them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.gateway.openai.objects import FunctionCall, ToolCallObject
from runtime.text.tools import ToolCallArguments, ToolCallBegin, ToolParser, ToolText


class ToolCalls:
    """Finds the calls in one answer.

    Args:
        parser: reads the format in which the model writes them.
        only_one: whether calls after the first are dropped.
    """

    def __init__(self, parser: ToolParser, *, only_one: bool) -> None:
        self._parser = parser
        self._only_one = only_one
        self._found = False

    def add(self, text: str, *, ended: bool) -> list[str | ToolCallObject]:
        """Add text of the model; returns text of the answer, and pieces of calls with their index."""
        events = [*self._parser.add(text), *(self._parser.finish() if ended else ())]
        found: list[str | ToolCallObject] = []
        for event in events:
            if isinstance(event, ToolText):
                found.append(event.text)
            elif not (self._only_one and event.index > 0):
                found.append(_piece(event))
                self._found = True
        return found

    def reason(self, reason: str) -> str:
        """Why the answer ended: ``tool_calls`` where it has calls and ended by itself."""
        return "tool_calls" if self._found and reason == "stop" else reason


def joined_calls(pieces: Sequence[str | ToolCallObject]) -> tuple[str | None, list[ToolCallObject]]:
    """The text of an answer, None where it only calls tools, and its whole calls."""
    text = "".join([piece for piece in pieces if isinstance(piece, str)])
    whole: dict[object, ToolCallObject] = {}
    for piece in pieces:
        if isinstance(piece, str):
            continue
        begun = whole.get(piece.index, piece)
        arguments = "" if begun is piece else str(begun.function.arguments)
        function = FunctionCall(begun.function.name, arguments + str(piece.function.arguments))
        whole[piece.index] = ToolCallObject(function, begun.id, "function")
    return (text or None) if whole else text, list(whole.values())


def _piece(event: ToolCallBegin | ToolCallArguments) -> ToolCallObject:
    if isinstance(event, ToolCallBegin):
        return ToolCallObject(FunctionCall(event.name, ""), event.id, "function", event.index)
    return ToolCallObject(FunctionCall(arguments=event.text), index=event.index)
