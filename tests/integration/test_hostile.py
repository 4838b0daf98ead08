"""Hostile and wrong requests: each is refused with a status and a message, and the server is not affected."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from served import Served

pytest.importorskip("uvicorn", reason="needs the extra serve")
grpc = pytest.importorskip("grpc", reason="needs the extra serve")
from tritonclient.grpc import service_pb2 as pb  # noqa: E402

from runtime.gateway.access import AccessControl  # noqa: E402
from runtime.gateway.errors import Forbidden, Unauthorized  # noqa: E402
from runtime.gateway.http.codec import ask  # noqa: E402

LIMIT = 48 << 20
TENSOR = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32}


@pytest.fixture(scope="module")
def server(chain_plan):
    words = ("--max-body", str(LIMIT), "--max-queue-bytes", str(LIMIT))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Served(chain_plan, *words, environment=environment) as found:
        found.model = chain_plan.name.removesuffix(".plan")
        found.ask(f"/v2/models/{found.model}/infer", json.dumps({"inputs": [TENSOR]}).encode())
        yield found


def raw(server, head: str) -> tuple[int, str]:
    """Return the status and the body of the answer to a raw request."""
    host, port = server.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()


def infer(server, body: dict | bytes, **headers: str) -> tuple[int, str]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, found = server.ask(f"/v2/models/{server.model}/infer", text, **headers)
    return status, json.loads(found).get("error", "")


def works(server) -> bool:
    return infer(server, {"inputs": [TENSOR]})[0] == 200


@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        ("GET /v2 HTTP/1.1\nHost: {host}\nHost: evil.example\n", 400, "has 2 Host headers"),
        ("GET /v2 HTTP/1.1\n", 400, "has 0 Host headers"),
        ("GET /v2 HTTP/1.0\n", 400, "has 0 Host headers"),
        ("GET /v2 HTTP/1.1\nHost: \n", 400, "Host"),
        ("GET http://evil.example/v2 HTTP/1.1\nHost: {host}\n", 403, "asks 'evil.example'"),
        ("GET /v2 HTTP/1.1\nHost: {host}\nOrigin: http://{host}\nOrigin: http://evil.example\n", 403, "2 Origin"),
        ("GET /v2 HTTP/1.1\nHost: evil.example\n", 403, "ask localhost"),
        ("GET http://{host}/v2 HTTP/1.1\nHost: {host}\n", 200, "onnxsplit"),
        ("GET /v2 HTTP/1.1\nHost: {host}\nOrigin: http://{host}\n", 200, "onnxsplit"),
    ],
)
def test_ambiguous_requests_are_refused(server, head, status, words):
    found, body = raw(server, head.format(host=server.host) + "Connection: close\n\n")
    assert (found, words in body) == (status, True), body


def test_one_authorization_counts_and_several_are_none():
    access = AccessControl(("a" * 16,))
    access.check([f"Bearer {'a' * 16}"])
    for shown in ([], ["Bearer " + "b" * 16], [f"Bearer {'a' * 16}", "Bearer x"], [f"Bearer {'a' * 16}"] * 2):
        with pytest.raises(Unauthorized):
            access.check(shown)
    with pytest.raises(Forbidden):
        access.check_site(["localhost"], ["null"], "/")


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [0, 2**62], "data": []},
        {"shape": [2**62, 2], "data": []},
        {"shape": [2**70], "data": []},
        {"shape": [1, 32], "data": [1e39] * 32},
        {"shape": [1], "data": [0.5] * 1_000_000},
    ],
)
def test_shapes_and_numbers_that_no_tensor_has_are_the_client_s_mistake(server, changed):
    status, said = infer(server, {"inputs": [{**TENSOR, **changed}]})
    assert (status, "'x'" in said) == (400, True), said
    assert works(server)


@pytest.mark.parametrize("timeout", [2**63 - 1, 2**64, -1, "5", 1.5])
def test_odd_timeouts_are_the_client_s_mistake(server, timeout):
    assert infer(server, {"inputs": [TENSOR], "parameters": {"timeout": timeout}})[0] == 400
    assert works(server)


@pytest.mark.parametrize("parameters", [5, [], "x", None, {"a": 1}])
def test_a_load_takes_no_parameters_of_any_kind(server, parameters):
    path = f"/v2/repository/models/{server.model}/load"
    status, _, body = server.ask(path, json.dumps({"parameters": parameters}).encode())
    assert (status, "without parameters" in json.loads(body)["error"]) == (400, True)


def test_a_name_of_any_length_makes_a_short_error_everywhere(server):
    name = "x" * 8_000_000
    status, said = infer(server, {"inputs": [{**TENSOR, "name": name}]})
    assert status == 400
    assert len(said) < 3000
    host, port = server.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 60) as listener:
        listener.sendall(f"GET /events HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
        seen = b""
        while b"unknown" not in seen:  # the next view of the model contains its last error
            seen += listener.recv(65536)
            assert len(seen) < 500_000
    assert len(server.ask("/metrics")[2]) < 500_000


def test_a_bomb_is_refused_and_others_are_answered_meanwhile(server):
    import gzip

    bomb = gzip.compress(bytes(2 * LIMIT))
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        bombs = [clients.submit(infer, server, bomb, Content_Encoding="gzip") for _ in range(8)]
        assert server.ask("/v2/health/live")[0] == 200
        assert {found.result()[0] for found in bombs} <= {413, 503}
    assert works(server)


def peak_bytes(server) -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1]) << 10


def test_messages_of_many_clients_stay_within_their_bound_together(server):
    """Eight messages of 40 MB arrive at once: received and held bytes are bounded."""
    before = peak_bytes(server)
    request = pb.ModelInferRequest(model_name="nobody", raw_input_contents=[bytes(40 << 20)])
    message = request.SerializeToString()

    async def ask(channel):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=120)
        return error.value.code()

    async def all_at_once():
        options = [("grpc.max_send_message_length", -1)]
        channels = [grpc.aio.insecure_channel(server.grpc, [*options, ("n", n)]) for n in range(8)]
        try:
            return await asyncio.gather(*(ask(channel) for channel in channels))
        finally:
            for channel in channels:
                await channel.close()

    codes = set(asyncio.run(all_at_once()))
    assert codes <= {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE}
    assert grpc.StatusCode.NOT_FOUND in codes
    assert peak_bytes(server) - before < 8 * LIMIT
    assert works(server)


def call(server, method: str, message: bytes, metadata=()) -> tuple[str, str]:
    """Return the code and the message of a call that fails."""
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(message, timeout=60, metadata=metadata)
    return error.value.code().name, error.value.details()


def infer_message(**changed) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(**{"name": "x", "datatype": "FP32", "shape": [1, 32], **changed})
    return pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[bytes(128)]).SerializeToString()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ModelInfer", b"\xff" * 20),
        ("ModelInfer", b"\x3a\xff\xff\xff\xff\x0f"),
        ("ModelInfer", b"\x0b\x0c"),
        ("ModelReady", b"\xff" * 20),
        ("RepositoryModelLoad", b"\x12\xff"),
    ],
)
def test_bytes_that_are_not_a_message_are_a_client_error(server, method, message):
    assert call(server, method, message)[0] == "INVALID_ARGUMENT"
    assert works(server)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shape": [0, 2**62]}, "fit into memory"),
        ({"shape": [-1, 32]}, "sizes must be 0 or more"),
        ({"shape": [1] * 33}, "at most 32"),
        ({"contents": {"fp32_contents": [1.0] * 32}}, "give one of them"),
        ({"datatype": "FP99"}, "allowed: BOOL"),
    ],
)
def test_invalid_tensors_are_a_client_error_over_grpc_too(server, changed, words):
    message = infer_message(**changed).replace(
        b"\x0a\x01m", b"\x0a" + bytes([len(server.model)]) + server.model.encode()
    )
    code, said = call(server, "ModelInfer", message)
    assert (code, words in said) == ("INVALID_ARGUMENT", True), said


def test_a_call_without_a_message_is_the_client_s_mistake(server):
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        channel.stream_unary("/inference.GRPCInferenceService/ServerLive")(iter(()), timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_very_distant_deadline_counts_as_none(server):
    message = pb.ModelInferRequest(
        model_name=server.model,
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 32])],
        raw_input_contents=[np.full(32, 0.5, np.float32).tobytes()],
    )
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", message.__class__.SerializeToString)
        for timeout in (2**31, 1e9, 60):
            assert infer(message, timeout=timeout)


@pytest.mark.parametrize("rows", [1, 6_000, 12_000])
def test_answers_of_any_size_come_whole(server, rows):
    given = np.random.default_rng(0).standard_normal((rows, 32)).astype(np.float32)
    pieces, length = ask({"x": given})
    path = f"/v2/models/{server.model}/infer"
    said = {"binary_data_output": True}
    head = json.loads(pieces[0]) | {"parameters": said}
    text = json.dumps(head).encode()
    status, headers, body = server.ask(path, text + bytes(pieces[1]), Inference_Header_Content_Length=str(len(text)))
    assert status == 200
    at = int(headers["inference-header-content-length"])
    assert json.loads(body[:at])["outputs"][0]["parameters"]["binary_data_size"] == len(body) - at == given.nbytes
    assert length


def test_silent_calls_do_not_block_other_clients(server):
    with grpc.insecure_channel(server.grpc) as channel:
        silent = [
            channel.stream_unary("/inference.GRPCInferenceService/ModelInfer").future(Silence(), timeout=50)
            for _ in range(4)
        ]
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=40)
        assert pb.ServerLiveResponse.FromString(live).live
        for call in silent:
            call.cancel()


class Silence:
    """A stream of messages that never arrive."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.over.wait(60)
        raise StopIteration


def exchange(server, *parts: bytes) -> bytes:
    """Return all bytes that a server answers to parts, until it closes the connection."""
    host, port = server.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 60) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_large_request_and_the_beginning_of_the_next_are_both_answered(server):
    body = json.dumps({"inputs": [TENSOR], "id": "x" * 100_000}).encode()
    first = (
        f"POST /v2/models/{server.model}/infer HTTP/1.1\r\nHost: {server.host}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    second = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(server, first.encode() + body + second[:20], second[20:])
    assert answer.count(b"HTTP/1.1 200") == 2, answer[:300]


@pytest.mark.parametrize(
    ("header", "trailer", "status"),
    [
        ("", "Host: localhost", 400),
        ("Host: localhost\r\n", "Content-Encoding: gzip", 200),
        ("Host: localhost\r\n", "Host: evil.example", 200),
    ],
)
def test_trailers_change_no_request(server, header, trailer, status):
    answer = exchange(
        server,
        f"POST /v2/repository/index HTTP/1.1\r\n{header}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        f"2\r\n{{}}\r\n0\r\n{trailer}\r\n\r\n".encode(),
    )
    assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer


@pytest.mark.parametrize("endless", [b"2\r\n{}\r\n0\r\nX: ", b"1;"])
def test_a_trailer_or_a_chunk_s_extension_without_an_end_is_refused(server, endless):
    head = b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = server.host.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 60) as connection:
        connection.sendall(head + endless)
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * 10_000_000)
    assert works(server)


def test_the_head_of_events_is_answered_at_once(server):
    head = b"HEAD /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = exchange(server, head, head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.count(b"HTTP/1.1 200") == answer.count(b"content-type: text/event-stream") == 2


def test_requests_that_are_half_sent_when_the_server_stops_are_told_so(chain_plan):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Served(chain_plan, environment=environment) as found, contextlib.ExitStack() as opened:
        model, (host, port) = chain_plan.name.removesuffix(".plan"), found.host.rsplit(":", 1)
        connections = []
        for path in (f"/v2/models/{model}/infer", "/v2/repository/index"):
            connection = opened.enter_context(socket.create_connection((host, int(port)), 60))
            head = f"POST {path} HTTP/1.1\r\nHost: {found.host}\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
            connection.sendall(head.encode())
            assert b"100 Continue" in connection.recv(65536), "the body is waited for"
            connection.sendall(b"{")
            connections.append(connection)
        assert found.end() == 0
        for connection in connections:
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503"), answer
            assert "is stopping" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert not any("without starting response" in line for line in found.log)
