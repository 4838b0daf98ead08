"""Where guided output and calls of tools join a request. Pure."""

from __future__ import annotations

from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.protocol import ChatRequest, SampledRequest


def check_guidance(request: SampledRequest) -> None:
    """Refuse what needs guided output or a parser of tool calls.

    Raises:
        FieldError: it names the field.
    """
    if request.response_format is not None and request.response_format.get("type") != "text":
        raise FieldError("response_format", "response_format is not served by this server; ask for JSON in the prompt")
    if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
        raise FieldError("tools", "tools are not served by this server; leave tools out, or set tool_choice: none")
