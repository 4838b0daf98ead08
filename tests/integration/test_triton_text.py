"""Texts for clients of Triton's backends for language models: streams over gRPC, and the extension generate."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("tritonclient.http", reason="needs the extra test")

import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from served import Served
from text_plans import text_plan
from tritonclient.utils import InferenceServerException
from waiting import wait_until

PROMPT = "The quick brown fox"
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    plan = text_plan(tmp_path_factory.mktemp("plans") / "writer.plan", length=2048)
    with Served(plan, "--max-rows", "8", environment=environment) as found:
        yield found


def tensor(name, values, datatype):
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, {"BYTES": object, "BOOL": bool, "INT32": np.int32}[datatype]))
    return made


def inputs(prompt=PROMPT, *, stream=True, sampling=GREEDY):
    """The inputs as the sample client of Triton's vLLM backend sends them: numbers are texts."""
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in sampling.items()}
    return [
        tensor("text_input", [prompt.encode()], "BYTES"),
        tensor("stream", [stream], "BOOL"),
        tensor("sampling_parameters", [json.dumps(texts).encode()], "BYTES"),
    ]


class Stream:
    """A stream of the callback client; responses and errors arrive in a queue."""

    def __init__(self, server: Served) -> None:
        self.arrived: queue.Queue = queue.Queue()
        self.client = triton.InferenceServerClient(server.grpc)
        self.client.start_stream(callback=lambda result, error: self.arrived.put((result, error)))

    def ask(self, name, given, request_id="", **more):
        self.client.async_stream_infer(name, given, request_id=request_id, **more)

    def next(self):
        return self.arrived.get(timeout=60)

    def text(self):
        """The text and the responses of the only request."""
        results = []
        while not results or not is_final(results[-1]):
            result, error = self.next()
            assert error is None, error
            results.append(result)
        return "".join(result.as_numpy("text_output")[0].decode() for result in results), results

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.stop_stream()
        self.client.close()


def is_final(result):
    return result.get_response().parameters["triton_final_response"].bool_param


def completed(server, **options):
    """The text as OpenAI's API gives it."""
    body = {"prompt": PROMPT, "model": "writer", **GREEDY, **options}
    return server.json("/v1/completions", body)["choices"][0]["text"]


@pytest.mark.parametrize("name", ["writer.text", "writer"])
def test_a_stream_has_a_response_for_each_part_of_the_text(server, name):
    with Stream(server) as stream:
        outputs = [triton.InferRequestedOutput("text_output")]
        stream.ask(name, inputs(), "one", outputs=outputs, enable_empty_final_response=True)
        text, results = stream.text()
    assert text == completed(server)
    assert len(results) > 1
    assert {result.get_response().id for result in results} == {"one"}
    assert {result.get_response().model_name for result in results} == {name}
    assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]


def test_without_a_stream_there_is_one_response_that_begins_with_the_prompt(server):
    with Stream(server) as stream:
        stream.ask("writer.text", inputs(stream=False))
        text, results = stream.text()
        flag = tensor("exclude_input_in_output", [True], "BOOL")
        stream.ask("writer.text", [*inputs(stream=False), flag])
        only, _ = stream.text()
    assert text == PROMPT + completed(server)
    assert len(results) == 1
    assert only == completed(server)


def test_the_names_of_tensorrt_llm_and_parameters_of_the_request_work_too(server):
    given = [tensor("text_input", [PROMPT.encode()], "BYTES"), tensor("max_tokens", [5], "INT32")]
    given += [tensor("stop_words", [b""], "BYTES"), tensor("stream", [True], "BOOL")]
    with Stream(server) as stream:
        stream.ask("writer.text", given, parameters={"temperature": 0, "ignore_eos": True})
        text, _ = stream.text()
    assert text == completed(server, max_tokens=5)


def test_reports_are_further_outputs(server):
    names = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
    with Stream(server) as stream:
        stream.ask("writer.text", [*inputs(), *(tensor(name, [True], "BOOL") for name in names)])
        _, results = stream.text()
    reasons = [result.as_numpy("finish_reason")[0].decode() for result in results]
    assert reasons == ["None"] * (len(results) - 1) + ["length"]
    assert sum(int(result.as_numpy("num_output_tokens")[0]) for result in results) == 12
    assert {int(result.as_numpy("num_input_tokens")[0]) for result in results} == {
        server.json("/tokenize", {"prompt": PROMPT})["count"]
    }


def test_an_output_that_is_requested_needs_no_flag(server):
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "finish_reason", "num_output_tokens")]
    with Stream(server) as stream:
        stream.ask("writer.text", inputs(stream=False), outputs=outputs)
        _, (result,) = stream.text()
    assert result.as_numpy("finish_reason")[0] == b"length"
    assert result.as_numpy("num_output_tokens")[0] == 12
    assert result.as_numpy("num_input_tokens") is None


def test_a_text_is_not_written_into_shared_memory(server):
    output = triton.InferRequestedOutput("text_output")
    output.set_shared_memory("region", 1024)
    with Stream(server) as stream:
        stream.ask("writer.text", inputs(), outputs=[output])
        _, error = stream.next()
    assert "cannot be written into shared memory" in str(error)


def test_the_timeout_of_a_request_counts_microseconds(server):
    endless = {**GREEDY, "max_tokens": 2000}
    with Stream(server) as stream:
        stream.ask("writer.text", inputs(sampling=endless), timeout=20_000)
        stream.ask("writer.text", inputs(sampling={**endless, "timeout": 0.02}), timeout=60_000_000)
        errors = []
        while len(errors) < 2:
            _, error = stream.next()
            errors += [str(error)] if error is not None else []
    assert ["time ran out" in error for error in errors] == [True, True]


def test_several_requests_share_a_stream(server):
    async def ask():
        async def requests():
            for number in range(6):
                sampling = {**GREEDY, "max_tokens": 40 + number}
                yield {"model_name": "writer.text", "inputs": inputs(sampling=sampling), "request_id": str(number)}

        texts, order = dict.fromkeys(map(str, range(6)), ""), []
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                request_id = result.get_response().id
                texts[request_id] += result.as_numpy("text_output")[0].decode()
                order.append(request_id)
        return texts, order

    texts, order = asyncio.run(ask())
    assert texts == {str(number): completed(server, max_tokens=40 + number) for number in range(6)}
    assert order != sorted(order), "the parts of several texts come as the texts do"


def test_tensors_keep_their_order_between_texts(server):
    plan = server.json("/v2/models/writer")
    given = []
    for one in plan["inputs"]:
        shape = [abs(size) if size != -1 else 1 for size in one["shape"]]
        made = triton.InferInput(one["name"], shape, one["datatype"])
        kind = {"INT64": np.int64, "FP32": np.float32, "INT32": np.int32}[one["datatype"]]
        made.set_data_from_numpy(np.ones(shape, kind))
        given.append(made)
    with Stream(server) as stream:
        for number in range(4):
            stream.ask("writer", given, f"tensors {number}")
            stream.ask("writer", inputs(), f"text {number}")
        seen, open_texts = [], 4
        while open_texts or len(seen) < 4:
            result, error = stream.next()
            assert error is None, error
            if result.get_response().id.startswith("tensors"):
                seen.append(result.get_response().id)
            else:
                open_texts -= is_final(result)
    assert seen == [f"tensors {number}" for number in range(4)]


BAD = [
    ([tensor("stream", [True], "BOOL")], "text_input must be one text"),
    (inputs(sampling={"frobnicate": 1}), "'frobnicate' is not served for texts; served are add_special_tokens, freq"),
    (inputs(sampling={"temperature": -1}), "temperature"),
    (inputs(sampling={"temperature": "warm"}), "option of the text does not fit"),
    (inputs(sampling={"n": 2}), "n is 2"),
    (inputs("a" * (5 << 20)), "at most 4194304 are allowed for a text"),
    (inputs(PROMPT * 2000), "tokens, but sequences have at most 2048"),
    ([*inputs(), tensor("exclude_input_in_output", [False], "BOOL")], "a stream never repeats the prompt"),
    ([tensor("text_input", [b"a", b"b"], "BYTES")], "has the shape [2]; it takes one element"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_an_error_is_a_message_in_the_stream_which_goes_on(server, given, message):
    with Stream(server) as stream:
        stream.ask("writer.text", given, "bad")
        _, error = stream.next()
        assert message in str(error)
        stream.ask("writer.text", inputs())
        assert stream.text()[0] == completed(server)


def test_a_stream_that_is_cancelled_ends_its_texts(server):
    stream = Stream(server)
    long = {"temperature": 0, "max_tokens": 1900, "ignore_eos": True}
    for number in range(4):
        stream.ask("writer.text", inputs(sampling=long), str(number))
    stream.next()
    wait_until(lambda: server.metric("onnxsplit_num_requests_running") == 4)
    before = server.metric("onnxsplit_request_success_total", 'finished_reason="abort"')
    stream.client.stop_stream(cancel_requests=True)
    stream.client.close()
    wait_until(lambda: server.metric("onnxsplit_num_requests_running") == 0)
    after = server.metric("onnxsplit_request_success_total", 'finished_reason="abort"')
    assert after == before + 4, "they did not run to their ends"


def test_the_text_is_announced_as_decoupled(server):
    client = triton.InferenceServerClient(server.grpc)
    config = client.get_model_config("writer.text").config
    assert config.model_transaction_policy.decoupled
    assert {one.name: one.optional for one in config.input}["text_input"] is False
    assert client.is_model_ready("writer.text")
    metadata = client.get_model_metadata("writer.text")
    assert "text_input" in {one.name for one in metadata.inputs}
    assert not client.get_model_config("writer").config.model_transaction_policy.decoupled
    with pytest.raises(InferenceServerException, match="answers in parts; use ModelStreamInfer"):
        client.infer("writer.text", inputs())
    client.close()


def test_generate_gives_the_text_in_one_answer(server):
    body = {"text_input": PROMPT, "parameters": {**GREEDY, "exclude_input_in_output": True}}
    for path in ("/v2/models/writer/generate", "/v2/models/writer.text/versions/1/generate"):
        found = server.json(path, body)
        name = path.split("/")[3]
        assert found == {"model_name": name, "model_version": "1", "text_output": completed(server)}
    flat = {"text_input": PROMPT, **GREEDY, "return_finish_reason": True, "bad_words": "", "stop_words": ""}
    found = server.json("/v2/models/writer/generate", flat)
    assert found["text_output"] == PROMPT + completed(server)
    assert found["finish_reason"] == "length"


def test_a_text_follows_its_grammar(server):
    pytest.importorskip("llguidance", reason="needs the extra guided")
    body = {"text_input": PROMPT, "exclude_input_in_output": True, "guided_regex": "[ab]{3}", "max_tokens": 20}
    assert re.fullmatch("[ab]{3}", server.json("/v2/models/writer/generate", body)["text_output"])
    status, _, found = server.ask("/v2/models/writer/generate", json.dumps({**body, "guided_regex": "("}).encode())
    assert status == 400
    assert b"grammar" in found


def test_generate_stream_sends_the_parts(server):
    body = json.dumps({"text_input": PROMPT, "parameters": {**GREEDY, "stream": True}}).encode()
    request = urllib.request.Request(f"{server.http}/v2/models/writer/generate_stream", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = answer.read().decode().split("\n\n")
    assert events[-1] == ""
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert len(parts) > 1
    assert "".join(part["text_output"] for part in parts) == completed(server)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("writer/generate", b"[1]", 400, "not a JSON object"),
        ("writer/generate", b"{}", 400, "text_input must be one text"),
        ("writer/generate", b'{"text_input": ""}', 400, "text_input must be one text that is not empty"),
        ("writer/generate", b'{"text_input": "a", "stream": true}', 400, "use generate_stream"),
        ("writer/generate", b'{"text_input": "a", "parameters": {"top_p": 7}}', 400, "top_p"),
        ("nobody/generate", b'{"text_input": "a"}', 404, "unknown"),
        ("writer.stage0/generate", b'{"text_input": "a"}', 400, "takes tensors only"),
        ("writer/generate_stream", b'{"text_input": "a", "max_tokens": 0}', 400, "max_tokens is 0"),
        ("writer/generate", b'{"text_input": "%b"}' % (b"a" * (5 << 20)), 413, "are allowed here"),
    ],
)
def test_errors_of_generate_have_a_status(server, path, body, status, message):
    found, _, answer = server.ask(f"/v2/models/{path}", body)
    assert found == status, answer
    assert message in json.loads(answer)["error"]


def test_texts_are_measured_under_the_names_of_vllms_metrics(server):
    def all_of(name, **labels):
        return server.metric(f"onnxsplit_{name}", ".*".join(f'{label}="{value}"' for label, value in labels.items()))

    begun = {name: all_of(name) for name in ("prompt_tokens_total", "generation_tokens_total", "steps_total")}
    length = all_of("request_success_total", finished_reason="length", model_name="writer")
    counts = {name: all_of(f"{name}_count") for name in HISTOGRAMS}
    completed(server, max_tokens=9)
    assert all_of("generation_tokens_total") == begun["generation_tokens_total"] + 9
    assert (
        all_of("prompt_tokens_total") - begun["prompt_tokens_total"]
        == server.json("/tokenize", {"prompt": PROMPT})["count"]
    )
    assert all_of("request_success_total", finished_reason="length", model_name="writer") == length + 1
    assert all_of("steps_total") >= begun["steps_total"] + 9
    assert all_of("step_rows_total") >= all_of("steps_total")
    assert {name: all_of(f"{name}_count") - count for name, count in counts.items()} == HISTOGRAMS
    text = server.ask("/metrics")[2].decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_bytes"):
        assert f'onnxsplit_{name}{{model="writer",model_name="writer",version="1"}}' in text


def test_a_prompt_that_was_read_before_is_a_hit_of_the_prefix_cache(server):
    prompt = PROMPT * 40
    tokens = server.json("/tokenize", {"prompt": prompt})["count"]
    completed(server, prompt=prompt)
    hits = server.metric("onnxsplit_prefix_cache_hits_total")
    queries = server.metric("onnxsplit_prefix_cache_queries_total")
    completed(server, prompt=prompt)
    assert server.metric("onnxsplit_prefix_cache_queries_total") == queries + tokens
    assert hits + tokens // 2 < server.metric("onnxsplit_prefix_cache_hits_total") < hits + tokens


def test_the_dashboard_shows_metrics_that_exist(server):
    completed(server)
    text = server.ask("/metrics")[2].decode()
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    names = set(re.findall(r"onnxsplit_\w+", dashboard)) - {"onnxsplit_drift_ratio"}  # only with --rebalance
    assert len(names) > 20
    assert {name for name in names if not re.search(rf"^{name}[ {{]", text, re.MULTILINE)} == set()


HISTOGRAMS = {
    "time_to_first_token_seconds": 1,
    "inter_token_latency_seconds": 8,
    "e2e_request_latency_seconds": 1,
    "request_prompt_tokens": 1,
    "request_generation_tokens": 1,
}
