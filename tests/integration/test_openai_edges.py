"""Edges of the endpoint for clients of OpenAI's API: nulls, empty texts, models that are unloaded, broken requests."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from served import Served
from text_plans import text_plan
from waiting import wait_until

pytest.importorskip("uvicorn", reason="needs the extra serve")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    plan = text_plan(tmp_path_factory.mktemp("text") / "tiny.plan")
    with Served(plan, "--threads", "1", "--tool-parser", "hermes", environment=ENVIRONMENT) as found:
        yield found


def problem(server, path, body=None):
    """The status and the error of an answer."""
    status, _, raw = server.ask(path, None if body is None else json.dumps(body).encode())
    return status, json.loads(raw)["error"]


def problem_free(server, body):
    """Whether a request is answered."""
    return server.ask("/v1/chat/completions", json.dumps({**body, "max_tokens": 1}).encode())[0] == 200


def test_nulls_are_as_good_as_absent_when_tokens_are_counted(server):
    plain = server.json("/tokenize", {"messages": MESSAGES})
    nulls = dict.fromkeys(["prompt", "model", "tools", "chat_template", "add_special_tokens", "return_token_strs"])
    assert server.json("/tokenize", {"messages": MESSAGES, **nulls}) == plain
    assert server.json("/tokenize", {"prompt": "a", "messages": None})["count"] == 1
    assert problem(server, "/tokenize", {"prompt": None, "messages": None})[0] == 400


def test_an_empty_value_asks_for_nothing(server):
    lists = ["bad_words", "functions", "logits_processors", "logprob_token_ids"]
    objects = ["ec_transfer_params", "kv_transfer_params", "media_io_kwargs", "mm_processor_kwargs", "vllm_xargs"]
    empty = {**{name: [] for name in lists}, **{name: {} for name in objects}}
    body = {"prompt": "a", "max_tokens": 1, **empty}
    assert server.json("/v1/completions", body)["usage"]["completion_tokens"] == 1
    assert problem(server, "/v1/completions", {**body, "vllm_xargs": {"a": 1}})[1]["param"] == "vllm_xargs"


def test_an_empty_text_has_no_tokens(server):
    assert server.json("/tokenize", {"prompt": ""})["tokens"] == []
    assert server.json("/detokenize", {"tokens": []})["prompt"] == ""


@pytest.mark.parametrize("body", [None, [], 5, "x"])
def test_a_body_that_is_no_object_blames_no_field(server, body):
    status, _, raw = server.ask("/v1/chat/completions", json.dumps(body).encode())
    assert (status, json.loads(raw)["error"]["param"]) == (400, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_an_error_of_tools_names_the_field_at_fault(server, fields, param):
    status, error = problem(server, "/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert (status, error["param"]) == (400, param)


def test_a_request_that_is_not_http_gets_the_error_of_its_path(server):
    host, port = server.host.split(":")
    for path, kind in (("/v1/completions?a=b", dict), ("/v2/health/live", str)):
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(f"POST {path} HTTP/1.1\r\nHost: {server.host}\r\nX: {'a' * 70_000}\r\n\r\n".encode())
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        error = json.loads(body)["error"]
        assert type(error) is kind
        assert "the header is larger" in (error["message"] if kind is dict else error)


def test_a_model_that_is_unloaded_is_not_an_unknown_one(tmp_path):
    with Served(text_plan(tmp_path / "tiny.plan"), "--threads", "1", environment=ENVIRONMENT) as server:
        assert server.ask("/v2/repository/models/tiny/unload", b"{}")[0] == 200
        assert server.json("/v1/models")["data"] == []
        status, error = problem(server, "/v1/models/tiny")
        assert (status, error["code"]) == (503, "service_unavailable")
        assert problem(server, "/v1/models/other")[0] == 404


def test_requests_that_take_much_memory_once_parsed_are_bounded_together(tmp_path):
    plan = text_plan(tmp_path / "tiny.plan", length=4096)
    bounds = ("--max-queue-bytes", "4M", "--max-body", "4M")
    with Served(plan, "--threads", "1", *bounds, environment=ENVIRONMENT) as server:
        large = {"messages": MESSAGES, "documents": [{"a": 1}] * 15_000, "ignore_eos": True, "stream": True}
        body = json.dumps(large).encode()
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
            status, error = problem(server, "/v1/chat/completions", {**large, "max_tokens": 1})
            assert (status, error["code"]) == (429, "rate_limit_exceeded")
            assert server.json("/v1/completions", {"prompt": "a", "max_tokens": 1})["usage"]["completion_tokens"] == 1
        wait_until(lambda: problem_free(server, {"messages": MESSAGES, "documents": large["documents"]}))
