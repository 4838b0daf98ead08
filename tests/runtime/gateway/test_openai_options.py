"""What chat templates see of a request."""

from __future__ import annotations

import pytest

from runtime.gateway.openai.options import template_messages, template_variables
from runtime.gateway.openai.protocol import ChatMessage, ChatRequest

HELLO = ChatMessage(role="user", content="Hello")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_the_reasoning_of_an_answer_has_both_names(name):
    (message,) = template_messages([ChatMessage(role="assistant", content="4", **{name: "2 + 2"})])
    assert message["reasoning"] == message["reasoning_content"] == "2 + 2"
    assert "reasoning" not in template_messages([HELLO])[0]


@pytest.mark.parametrize(
    ("effort", "given", "found"),
    [("none", {}, False), ("low", {}, True), ("low", {"enable_thinking": False}, False), (None, {}, None)],
)
def test_an_effort_turns_thinking_on_or_off_unless_the_client_does(effort, given, found):
    request = ChatRequest(messages=[HELLO], reasoning_effort=effort, chat_template_kwargs=given)
    assert template_variables(request).get("enable_thinking") == found
