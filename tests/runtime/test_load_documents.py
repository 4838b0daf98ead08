"""What servers say of their models, by servers that say anything."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from onnxsplit.errors import InputError
from runtime.errors import PipelineError
from runtime.load.http import HttpServer
from runtime.load.served_model import choose_model, spent

METADATA = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [3]}]}


def reply(document: object, status: str = "200 OK", head: str = "") -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@contextmanager
def saying(**replies: bytes) -> Iterator[HttpServer]:
    """A server whose documents, by the last part of their path, are the given bytes."""
    wanted = {"index": reply([{"name": "m"}]), "m": reply(METADATA), "config": reply({}), "stats": reply({}), **replies}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            path = self.rfile.readline().split()[1].decode()
            length = 0
            while line := self.rfile.readline().strip().lower():
                length = int(line.split(b":")[1]) if line.startswith(b"content-length:") else length
            self.rfile.read(length)
            self.wfile.write(wanted[path.rpartition("/")[2]])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield HttpServer(f"http://127.0.0.1:{server.server_address[1]}", {"Authorization": "Bearer secret"})
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ({"m": b"no answer of HTTP\r\n\r\n"}, "does not answer: no answer of HTTP"),
        ({"m": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}, "does not answer"),
        ({"m": reply(b"[" * 200_000)}, "does not answer: maximum recursion"),
        ({"m": reply({}, "503 Busy")}, "answers 503 Busy to /v2/models/m"),
        ({"config": reply([1])}, "describes the model 'm' in a way"),
        ({"config": reply({"input": 5})}, "describes the model 'm' in a way"),
        ({"m": reply({"inputs": [{"name": 5}]})}, "describes the model 'm' in a way"),
    ],
)
def test_a_document_that_cannot_be_read_is_one_message(replies, message):
    with saying(**replies) as server, pytest.raises(PipelineError, match=message):
        choose_model(server, "http://host", "m")


@pytest.mark.parametrize("document", [[1], {"model_stats": 5}, {"model_stats": [{"inference_stats": {"queue": "x"}}]}])
def test_statistics_of_another_form_are_a_message_not_an_accident(document):
    with saying(stats=reply(document)) as server:
        model = choose_model(server, "http://host", "m")
        with pytest.raises(PipelineError, match="not of the protocol"):
            spent(server, model)


def test_a_list_of_models_of_another_form_is_no_list():
    with saying(index=reply(5)) as server:
        assert server.models() == []
        with pytest.raises(InputError, match="does not list its models"):
            choose_model(server, "http://host", None)


def test_a_redirect_is_not_followed_so_that_no_header_goes_elsewhere():
    with saying() as other:
        moved = reply({}, "302 Found", f"Location: {other._url}/v2/models/m\r\n")
        with saying(m=moved) as server, pytest.raises(PipelineError, match=r"302 Found.*give that address"):
            server.metadata("m")
