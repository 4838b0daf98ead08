"""What an answer must match, and the calls of tools in it, by the fields of a request. Compiling may take a second."""

from __future__ import annotations

from collections.abc import Callable

from onnxsplit.errors import InputError, MissingDependency
from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.protocol import ChatRequest, SampledRequest
from runtime.text import grammars
from runtime.text.tools import ToolFormat, ToolParser, tool_grammar

_MAKERS: dict[str, Callable[..., str]] = {
    "response_format": grammars.grammar_of,
    "structured_outputs": grammars.structured_outputs,
    "guided_json": grammars.guided_json,
    "guided_regex": grammars.guided_regex,
    "guided_choice": grammars.guided_choice,
    "guided_grammar": grammars.guided_grammar,
}


def calls_tools(request: SampledRequest) -> bool:
    """Whether the answer may call tools."""
    return isinstance(request, ChatRequest) and bool(request.tools) and request.tool_choice != "none"


def is_guided(request: SampledRequest) -> bool:
    """Whether :func:`grammar_for` has work to do."""
    return calls_tools(request) or any(getattr(request, name) is not None for name in _MAKERS)


def grammar_for(request: SampledRequest, kind: ToolFormat | None) -> str:
    """The grammar of the answers to a request; empty for any text.

    Args:
        request: the request.
        kind: how the model writes calls of tools; None where that is not known.

    Raises:
        FieldError: a field asks for something that cannot be made, or two contradict each other.
    """
    made = {name: _made(name, request) for name in _MAKERS if getattr(request, name) is not None}
    if calls_tools(request):
        assert isinstance(request, ChatRequest)
        made["tool_choice"] = _tool_grammar(request, kind)
    wanted = {name: grammar for name, grammar in made.items() if grammar}
    if len(wanted) > 1:
        raise FieldError(list(wanted)[1], f"{' and '.join(wanted)} exclude each other; leave one of them out")
    if wanted and request.ignore_eos and not request.stop_token_ids:
        raise FieldError("ignore_eos", f"{next(iter(wanted))} needs a token that ends the text; leave ignore_eos out")
    return next(iter(wanted.values()), "")


def tool_parser(request: ChatRequest, kind: ToolFormat | None) -> ToolParser | None:
    """A parser for the calls in one answer; None where it may call no tools."""
    return ToolParser(kind) if kind is not None and calls_tools(request) else None


def _made(name: str, request: SampledRequest) -> str:
    try:
        return _MAKERS[name](getattr(request, name))
    except (InputError, MissingDependency) as error:
        raise FieldError(name, str(error)) from error


def _tool_grammar(request: ChatRequest, kind: ToolFormat | None) -> str:
    if kind is None:
        raise FieldError(
            "tools",
            "this server does not know how the model writes calls of tools: start it with --tool-parser hermes or "
            "json, or set tool_choice: none",
        )
    tools, choice = request.tools or (), "auto" if request.tool_choice is None else request.tool_choice
    try:
        return tool_grammar(tools, choice, kind, parallel=request.parallel_tool_calls is not False)
    except InputError as error:
        raise FieldError(error.option, str(error)) from error
