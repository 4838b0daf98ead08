"""Answers that must match a schema, and answers that call tools, with OpenAI's own client."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from served import Served
from text_plans import text_plan

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra guided")
openai = pytest.importorskip("openai", reason="needs the extra test")

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
REQUIRED = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("text") / "tiny.plan", length=1024)


@pytest.fixture(scope="module")
def client(plan):
    with (
        Served(plan, "--threads", "1", "--tool-parser", "hermes", environment=ENVIRONMENT) as server,
        openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


def chat(client, **options):
    return client.chat.completions.create(model="tiny", **{"messages": MESSAGES, **options})


def fits(arguments: str) -> bool:
    found = json.loads(arguments)
    return set(found) == {"city", "days"} and found["city"] in ("Rome", "Oslo") and found["days"] in (1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_matches_its_schema(client, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    choice = chat(client, response_format=wanted, seed=seed).choices[0]
    assert choice.finish_reason == "stop"
    assert fits(choice.message.content)
    stream = chat(client, response_format=wanted, seed=seed, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content


def test_a_completion_matches_a_choice(client):
    answer = client.completions.create(
        model="tiny", prompt="x", max_tokens=20, n=4, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}


@pytest.mark.parametrize("seed", range(3))
def test_a_required_tool_is_called_with_arguments_of_its_schema(client, seed):
    choice = chat(client, **REQUIRED, seed=seed).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", None, "function")
    assert call.function.name == "weather"
    assert call.id
    assert fits(call.function.arguments)


def test_a_stream_brings_the_name_of_a_tool_first_and_its_arguments_in_pieces(client):
    chunks = [chunk.choices[0] for chunk in chat(client, **REQUIRED, seed=1, stream=True)]
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    first, *rest = pieces
    assert (first.index, first.type, first.function.name, first.function.arguments) == (0, "function", "weather", "")
    assert all(piece.id is None and piece.function.name is None and piece.index == 0 for piece in rest)
    assert fits("".join(piece.function.arguments for piece in rest))
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    assert chunks[0].delta.role == "assistant"


def test_text_that_calls_nothing_stays_text(client):
    plain = chat(client, max_tokens=20, seed=1).choices[0].message.content
    found = chat(client, max_tokens=20, seed=1, tools=TOOLS, tool_choice="none").choices[0]
    assert (found.message.content, found.message.tool_calls) == (plain, None)
    free = chat(client, max_tokens=20, seed=1, tools=TOOLS).choices[0]
    assert (free.message.content.strip(), free.message.tool_calls) == (plain.strip(), None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x"}}}},
         "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "other"}], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_by_name(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "tiny", "messages": MESSAGES, **body}, cast_to=object)
    assert caught.value.body["param"] == param


def test_tools_need_to_know_how_the_model_calls_them(plan):
    with (
        Served(plan, "--threads", "1", environment=ENVIRONMENT) as server,
        openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="--tool-parser") as caught,
    ):
        chat(client, tools=TOOLS)
    assert caught.value.body["param"] == "tools"


@pytest.mark.parametrize("guide", [{"guided_regex": "a" * 100_000}, {"guided_json": {"$ref": "#"}}])
def test_a_guide_that_cannot_be_followed_is_the_fault_of_the_request(client, guide):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", max_tokens=50, extra_body=guide)
