"""The endpoint for clients of OpenAI's API, with OpenAI's own client against a server in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
from pathlib import Path

import pytest
from served import Served
from text_plans import END, text_plan

pytest.importorskip("uvicorn", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the extra test")

MESSAGES = [{"role": "user", "content": "Hello"}]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("text") / "tiny.plan")


@pytest.fixture(scope="module")
def server(plan):
    with Served(plan, "--threads", "1", environment=ENVIRONMENT) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as found:
        yield found


def complete(client, prompt="The quick", **options):
    return client.completions.create(model="tiny", prompt=prompt, **options)


def chat(client, messages=MESSAGES, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def greedy(client, **options):
    """The text that the model writes when it always takes the most probable token."""
    return complete(client, temperature=0, extra_body={"ignore_eos": True}, **options)


def refusal(call, kind):
    with pytest.raises(kind) as caught:
        call()
    return caught.value.body


# Models


def test_the_model_is_listed_with_its_length(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 256)
    assert client.models.retrieve("tiny").id == "tiny"


def test_an_unknown_model_is_not_found(client):
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.completions.create(model="other", prompt="x"),
    ):
        body = refusal(call, openai.NotFoundError)
        assert (body["code"], body["param"]) == ("model_not_found", "model")


def test_the_only_model_need_not_be_named(server):
    assert server.json("/v1/completions", {"prompt": "x", "max_tokens": 1})["model"] == "tiny"


def test_a_model_without_a_tokenizer_completes_nothing(chain_plan, plan, tmp_path):
    with Served(chain_plan, plan, "--served-model-name", "a", "--served-model-name", "b", environment=ENVIRONMENT) as s:
        assert [model["id"] for model in s.json("/v1/models")["data"]] == ["a", "b"]
        assert s.json("/v1/completions", {"model": "b", "prompt": "x", "max_tokens": 1})["model"] == "b"
        assert s.ask("/v1/completions", b'{"model": "tiny", "prompt": "x"}')[0] == 404
        assert s.ask("/v1/completions", b'{"model": "model", "prompt": "x"}')[0] == 404


# Completions


def test_a_completion_has_text_usage_and_a_reason(client):
    answer = greedy(client, max_tokens=5)
    (choice,) = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.object == "text_completion"
    assert answer._request_id == answer.id


def test_a_completion_has_16_tokens_unless_it_says_how_many(client):
    assert greedy(client).usage.completion_tokens == 16


def test_a_stream_has_the_text_of_the_whole_answer(client):
    whole = greedy(client, max_tokens=40).choices[0]
    chunks = list(greedy(client, max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.choices[0].text or chunk.choices[0].finish_reason for chunk in chunks)


def test_prompts_may_be_texts_tokens_and_lists_of_them(client, server):
    tokens = server.json("/tokenize", {"prompt": "The quick"})["tokens"]
    text = greedy(client, max_tokens=8).choices[0].text
    for prompt, count in ((tokens, 1), (["The quick", "The quick"], 2), ([tokens, tokens, tokens], 3)):
        answer = greedy(client, prompt=prompt, max_tokens=8)
        assert [choice.text for choice in answer.choices] == [text] * count
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert answer.usage.prompt_tokens == len(tokens) * count
        assert answer.usage.completion_tokens == 8 * count


def test_the_same_seed_gives_the_same_text_and_choices_have_seeds_of_their_own(client):
    three = [choice.text for choice in complete(client, n=3, seed=5, max_tokens=12).choices]
    singles = [complete(client, seed=seed, max_tokens=12).choices[0].text for seed in (5, 6, 7)]
    assert three == singles
    assert len(set(three)) == 3


def test_a_stream_of_several_choices_has_the_text_of_each(client):
    texts = [""] * 3
    for chunk in complete(client, n=3, seed=5, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in complete(client, n=3, seed=5, max_tokens=12).choices]


def test_echo_repeats_the_prompt(client, server):
    tokens = server.json("/tokenize", {"prompt": "The quick"})["tokens"]
    text = greedy(client, max_tokens=4).choices[0].text
    assert greedy(client, max_tokens=4, echo=True).choices[0].text == "The quick" + text
    assert greedy(client, prompt=tokens, max_tokens=4, echo=True).choices[0].text == "The quick" + text
    stream = greedy(client, max_tokens=4, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "The quick" + text


def test_a_stop_string_ends_the_text_wherever_tokens_begin(client):
    text = greedy(client, max_tokens=40).choices[0].text
    for place in (3, 7, 12):
        stop = text[place : place + 4]
        before = text[: text.find(stop)]
        choice = greedy(client, max_tokens=40, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (before, "stop", stop)
        stream = greedy(client, max_tokens=40, stop=["never to be seen", stop], stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == before
        kept = complete(
            client, temperature=0, max_tokens=40, stop=stop,
            extra_body={"ignore_eos": True, "include_stop_str_in_output": True},
        )  # fmt: skip
        assert kept.choices[0].text == before + stop


def test_logit_bias_chooses_tokens_and_end_tokens_end_the_text(client, server):
    (token,) = server.json("/tokenize", {"prompt": "f"})["tokens"]
    assert complete(client, max_tokens=4, logit_bias={str(token): 100}).choices[0].text == "ffff"
    ended = complete(client, max_tokens=4, logit_bias={str(END): 100})
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    later = complete(client, max_tokens=8, logit_bias={str(END): 100}, extra_body={"min_tokens": 3})
    assert later.usage.completion_tokens == 4
    never = complete(client, max_tokens=8, logit_bias={str(END): 100}, extra_body={"ignore_eos": True})
    assert never.usage.completion_tokens == 8
    own = complete(
        client, max_tokens=8, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]}
    )  # fmt: skip
    assert (own.usage.completion_tokens, own.choices[0].stop_reason) == (1, token)


def test_logprobs_of_a_completion(client):
    answer = greedy(client, max_tokens=6, logprobs=3)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 6
    assert all(logprob <= 0 for logprob in found.token_logprobs)
    assert all(1 <= len(top) <= 4 for top in found.top_logprobs)
    assert found.text_offset[0] == 0
    chunks = list(greedy(client, max_tokens=6, logprobs=3, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == found.tokens
    assert [place for chunk in chunks for place in chunk.choices[0].logprobs.text_offset] == found.text_offset


# Conversations


def test_an_answer_has_a_role_and_a_content(client):
    answer = chat(client, max_completion_tokens=6, seed=1)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason, choice.message.tool_calls) == ("assistant", "length", None)
    assert answer.usage.completion_tokens == 6


def test_the_first_chunk_has_the_role_and_the_last_the_reason(client):
    whole = chat(client, max_tokens=20, seed=1).choices[0].message.content
    chunks = list(chat(client, max_tokens=20, seed=1, stream=True))
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_a_chunk_without_choices_and_only_when_asked_for(client):
    def stream(**options):
        return chat(client, max_tokens=5, stream=True, stream_options=options, extra_body={"ignore_eos": True})

    *chunks, last = stream(include_usage=True)
    assert (last.choices, last.usage.completion_tokens) == ([], 5)
    assert all(chunk.usage is None for chunk in chunks)
    counts = [chunk.usage.completion_tokens for chunk in stream(include_usage=True, continuous_usage_stats=True)]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_the_default_length_is_all_the_room(client):
    answer = chat(client, seed=1, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 256


def test_logprobs_of_a_conversation_come_with_bytes(client):
    answer = chat(client, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for token in content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 2
        assert token.bytes
    chunks = chat(client, max_tokens=4, logprobs=True, temperature=0, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [(token.token, token.logprob) for token in streamed] == [(token.token, token.logprob) for token in content]
    assert all(token.top_logprobs == [] for token in streamed)


def test_messages_may_have_parts_and_every_role(client, server):
    def tokens(messages):
        return server.json("/tokenize", {"messages": messages})["tokens"]

    part = {"type": "text", "text": "Hello"}
    assert tokens([{"role": "user", "content": [part]}]) == tokens(MESSAGES)
    assert tokens([{"role": "user", "content": [part, part]}]) == tokens([{"role": "user", "content": "Hello\nHello"}])
    assert tokens([{"role": "developer", "content": "x"}]) == tokens([{"role": "system", "content": "x"}])
    chat(client, [*MESSAGES, {"role": "assistant", "content": "x"}, *MESSAGES], max_tokens=1)


def test_the_last_message_can_be_continued(server):
    messages = [*MESSAGES, {"role": "assistant", "content": "Sure: "}]
    tokens = server.json("/tokenize", {"messages": messages, "continue_final_message": True})["tokens"]
    assert server.json("/detokenize", {"tokens": tokens})["prompt"].endswith("assistant\nSure:")


def test_tokens_and_texts_go_both_ways(server):
    found = server.json("/tokenize", {"prompt": "Grüße 🙂", "return_token_strs": True})
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert server.json("/detokenize", {"tokens": found["tokens"]})["prompt"] == "Grüße 🙂"


def test_tokens_are_not_counted_by_another_template(server):
    status, _, raw = server.ask("/tokenize", json.dumps({"messages": MESSAGES, "chat_template": "x"}).encode())
    assert (status, json.loads(raw)["error"]["param"]) == (400, "chat_template")


def test_async_clients_stream_side_by_side(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as client:

            async def one(seed):
                stream = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=30, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async def whole(seed):
                answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, seed=seed)
                return answer.choices[0].message.content

            streamed = await asyncio.gather(*map(one, range(8)))
            assert streamed == await asyncio.gather(*map(whole, range(8)))

    asyncio.run(main())


# The bytes of a stream


def test_a_stream_byte_by_byte(server):
    body = {"messages": MESSAGES, "max_tokens": 3, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    status, headers, raw = server.ask("/v1/chat/completions", json.dumps(body).encode())
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, end = raw.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0] == {
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None
    }  # fmt: skip
    assert chunks[-1]["choices"] == []
    assert headers["x-request-id"] == chunks[0]["id"]


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1000}, "max_tokens"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1_000_000]}, "prompt"),
        ({"prompt": "x", "stop_token_ids": [1_000_000]}, "stop_token_ids"),
        ({"prompt": "x", "repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"prompt": ["x"] * 100, "n": 2}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({}, "prompt"),
    ],
)
def test_a_wrong_completion_is_refused_by_the_name_of_its_field(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny", **body}, cast_to=object)
    error = caught.value.body
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
        ({"presence_penalty": -1e308}, "presence_penalty"),
    ],
)
def test_a_wrong_conversation_is_refused_by_the_name_of_its_field(client, body, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "tiny", "messages": MESSAGES, **body}, cast_to=object)
    assert (caught.value.body["type"], caught.value.body["param"]) == ("invalid_request_error", param)


def test_harmless_and_unknown_fields_are_taken(client):
    chat(
        client, max_tokens=1, user="me", store=False, metadata={"a": "b"}, modalities=["text"], service_tier="auto",
        parallel_tool_calls=True,
        extra_body={
            "unknown": 1, "priority": 0, "bad_words": [], "thinking_token_budget": -1, "top_k": -1, "functions": [],
        },
    )  # fmt: skip


def test_a_body_that_is_not_json_and_unknown_paths_have_the_same_form(server):
    for path, body, status in (
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b'{"prompt": "\xff"}', 400),
        ("/v1/nothing", None, 404),
        ("/v1/models/nothing", None, 404),
        ("/v1/completions", None, 405),
    ):
        found, _, raw = server.ask(path, body)
        assert found == status
        assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}
    assert isinstance(json.loads(server.ask("/v2/models/nothing")[2])["error"], str)


def test_a_token_is_asked_for_in_the_same_form(plan, tmp_path):
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    (tmp_path / "tokens").chmod(0o600)
    words = (plan, "--token-file", tmp_path / "tokens", "--threads", "1", "--max-body", "64K")
    with Served(*words, environment=ENVIRONMENT) as server:
        url = f"{server.http}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            assert refusal(client.models.list, openai.AuthenticationError)["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key="a-token-of-some-length", max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny"
            with pytest.raises(openai.APIStatusError) as caught:
                complete(client, prompt="x" * 100_000)
            assert (caught.value.status_code, caught.value.body["code"]) == (413, "request_too_large")
        basic = base64.b64encode(b":a-token-of-some-length").decode()
        assert server.ask("/v1/models", authorization=f"Basic {basic}")[0] == 200


def test_a_body_that_would_take_much_memory_is_refused(server):
    status, _, raw = server.ask("/v1/completions", b'{"prompt": [' + b"1000," * (2 << 20) + b"1]}")
    assert (status, json.loads(raw)["error"]["code"]) == (413, "request_too_large")


def test_a_time_limit_is_a_timeout_error(client):
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, max_tokens=200, extra_body={"timeout": 1e-6, "ignore_eos": True})
    assert (caught.value.status_code, caught.value.body["type"]) == (504, "timeout_error")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_request_in_pieces_is_answered(server):
    """A client may send its request byte by byte and read the answer so."""
    host, port = server.host.split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head + body:
            link.sendall(bytes((byte,)))
        raw = b""
        while not raw.endswith(b"0\r\n\r\n"):
            raw += link.recv(1)
    assert b"data: [DONE]" in raw


def test_usage_says_how_much_of_a_prompt_was_not_computed(plan):
    with Served(plan, "--threads", "1", "--prefill-chunk", "8", environment=ENVIRONMENT) as server:
        client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0)
        first, second = (complete(client, prompt="The quick brown fox " * 6, max_tokens=2).usage for _ in range(2))
        streamed = list(
            complete(
                client, "The quick brown fox " * 6, max_tokens=2, stream=True, stream_options={"include_usage": True}
            )
        )[-1].usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // 8 * 8 > 0
    assert streamed.prompt_tokens_details == second.prompt_tokens_details
