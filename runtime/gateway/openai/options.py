"""From the fields of a request to the options of :meth:`runtime.text.text.Text.complete`. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnxsplit.errors import shown
from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.protocol import ChatMessage, ChatRequest, CompletionRequest, SampledRequest
from runtime.requests.generate_options import MOST_SEED

_COMPLETION_TOKENS = 16  # of a completion that does not say how many, as in OpenAI's API
_TEMPERATURE = 1.0
_SAME = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
)  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def text_options(
    request: SampledRequest, defaults: Mapping[str, Any], ends: tuple[int, ...], room: int
) -> dict[str, Any]:
    """The options for the first text of a prompt.

    Args:
        request: the request.
        defaults: the options that the model's makers recommend.
        ends: the model's own end tokens.
        room: the number of tokens for which there is room behind the prompt.

    Raises:
        FieldError: a field is wrong.
    """
    options: dict[str, Any] = {} if "temperature" in defaults else {"temperature": _TEMPERATURE}
    options |= {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    options["max_tokens"] = _max_tokens(request, room)
    options["logprobs"] = _logprobs(request)
    if request.top_k is not None:
        options["top_k"] = max(0, request.top_k)  # clients of vLLM send -1 for all
    if request.seed is not None:
        options["seed"] = request.seed % MOST_SEED
    if request.logit_bias:
        options["logit_bias"] = _bias(request.logit_bias)
    if request.stop:
        options["stop"] = request.stop
    if request.stop_token_ids or request.ignore_eos:
        own = () if request.ignore_eos else tuple(defaults.get("stop_tokens") or ends)
        options["stop_tokens"] = (*own, *(request.stop_token_ids or ()))
    options["include_stop"] = bool(request.include_stop_str_in_output)
    options["skip_special"] = request.skip_special_tokens is not False
    return options


def numbered(options: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The options for one more text of the same prompt: another seed."""
    if "seed" not in options:
        return dict(options)
    return {**options, "seed": (options["seed"] + number) % MOST_SEED}


def _max_tokens(request: SampledRequest, room: int) -> int:
    """The most new tokens."""
    name, most = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, most = "max_completion_tokens", request.max_completion_tokens
    if most is None:
        return min(_COMPLETION_TOKENS, room) if isinstance(request, CompletionRequest) else room
    if not 1 <= most <= room:
        code = "context_length_exceeded" if most > room else None
        raise FieldError(
            name, f"{name} is {most}; allowed are 1 to {room}, for which there is room behind this prompt", code
        )
    return most


def _logprobs(request: SampledRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    assert isinstance(request, CompletionRequest)
    if request.echo and request.logprobs is not None:
        raise FieldError("logprobs", "logprobs are not served together with echo: the prompt has no probabilities here")
    return request.logprobs


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise FieldError("logit_bias", f"logit_bias names {shown(token)}; allowed are numbers of tokens")
    return {int(token): value for token, value in given.items()}


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates read them.

    Raises:
        FieldError: a role is unknown, or a part is not text.
    """
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: ChatMessage) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        allowed = ", ".join(_ROLES)
        raise FieldError(f"messages[{number}].role", f"the role {shown(message.role)} is unknown; allowed: {allowed}")
    found: dict[str, Any] = {"role": role, "content": _content(number, message)}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
    if reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = reasoning  # templates know either
    if message.tool_calls:
        found["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return found


def _content(number: int, message: ChatMessage) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise FieldError(f"messages[{number}].content", f"a message of the role {message.role} needs a content")
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for place, part in enumerate(message.content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal") or text is None:
            where = f"messages[{number}].content[{place}]"
            raise FieldError(
                where, f"{where} is of type {shown(part.type)}; only parts of type text, with one, are served"
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as an object, as templates want them; clients send them as JSON."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            return call
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the chat template may use beside the messages."""
    variables = {**(request.chat_template_kwargs or {})}
    for name in ("tools", "documents", "reasoning_effort"):
        if (value := getattr(request, name)) is not None:
            variables[name] = value
    if request.reasoning_effort is not None:
        variables.setdefault("enable_thinking", request.reasoning_effort != "none")
    if request.continue_final_message and request.add_generation_prompt:
        raise FieldError(
            "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
        )
    variables["add_generation_prompt"] = (
        request.add_generation_prompt is not False and not request.continue_final_message
    )
    return variables
