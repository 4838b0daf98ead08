"""Answers, chunks and errors against the types of OpenAI's client, and the documented fields against its requests."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from served import Served
from text_plans import text_plan

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("openai", reason="needs the extra test")

from openai.types import Completion, Model, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.shared import ErrorObject

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OPTIONS = [
    {},
    {"n": 2, "seed": 3},
    {"stop_token_ids": list(range(3, 320)), "include_stop_str_in_output": True},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}},
]
CALLS = [
    *(("/v1/completions", {"prompt": "The quick", **one}) for one in (*OPTIONS, {"logprobs": 2}, {"echo": True})),
    *(
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **one})
        for one in (
            *OPTIONS,
            {"logprobs": True, "top_logprobs": 2},
            {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
            {"tools": [TOOL], "logprobs": True},
        )
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    plan = text_plan(tmp_path_factory.mktemp("types") / "tiny.plan")
    with Served(plan, "--threads", "1", "--tool-parser", "hermes", environment=ENVIRONMENT) as found:
        yield found


def answer(server, path, body, **more):
    status, _, raw = server.ask(path, json.dumps({"max_tokens": 6, **body, **more}).encode())
    assert status == 200, raw
    return raw


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_an_answer_has_the_type_of_the_client(server, path, body):
    if "tools" in body:
        pytest.importorskip("llguidance", reason="needs the extra guided")
    kind = ChatCompletion if "chat" in path else Completion
    whole = kind.model_validate_json(answer(server, path, body), strict=True)
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    assert whole.system_fingerprint.startswith("onnxsplit-")
    if body.get("tool_choice") == "required":
        assert whole.choices[0].message.tool_calls[0].function.name == "look"


@pytest.mark.parametrize(("path", "body"), CALLS)
def test_a_chunk_has_the_type_of_the_client(server, path, body):
    """Chunks of completions have a null reason until the last one, though the type of the client has none."""
    if "tools" in body:
        pytest.importorskip("llguidance", reason="needs the extra guided")
    *events, done, rest = answer(server, path, body, stream=True).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    kind = ChatCompletionChunk if "chat" in path else Completion
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk["choices"] if kind is Completion else ():
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        assert kind.model_validate_json(json.dumps(chunk), strict=True).system_fingerprint


def test_models_and_errors_have_the_types_of_the_client(server):
    Model.model_validate_json(server.ask("/v1/models/tiny")[2], strict=True)
    for path, body in (
        ("/v1/completions", b"{"),
        ("/v1/completions", b'{"prompt": 7}'),
        ("/v1/chat/completions", b'{"messages": [], "model": "other"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "moderation": {"model": "m"}}'),
        ("/v1/nothing", None),
        ("/detokenize", b'{"tokens": [320]}'),
    ):
        status, _, raw = server.ask(path, body)
        assert status in (400, 404)
        ErrorObject.model_validate_json(json.dumps(json.loads(raw)["error"]), strict=True)


def test_every_field_of_openais_requests_is_in_the_table():
    table = (ROOT / "docs/serving.md").read_text().partition("### Fields")[2].partition("### Answers")[0]
    named = set(re.findall(r"`(?:\w+(?:\[\])?\.)?(\w+)", table))
    for kind in (
        completion_create_params.CompletionCreateParamsStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
        ChatCompletionStreamOptionsParam,
    ):
        assert set(kind.__annotations__) - named == set()


def test_the_fingerprint_is_that_of_the_plan(server, tmp_path):
    first, again = (json.loads(answer(server, *CALLS[0]))["system_fingerprint"] for _ in range(2))
    with Served(text_plan(tmp_path / "other.plan", seed=1), "--threads", "1", environment=ENVIRONMENT) as other:
        assert json.loads(answer(other, *CALLS[0]))["system_fingerprint"] != first == again


def test_a_request_may_choose_the_name_of_its_answer(server):
    assert json.loads(answer(server, *CALLS[0], request_id="my-1"))["id"] == "cmpl-my-1"
    status, _, raw = server.ask("/v1/completions", b'{"prompt": "x", "request_id": "a\\r\\nb: c"}')
    assert (status, json.loads(raw)["error"]["param"]) == (400, "request_id")
