"""Requests over HTTP against servers that answer in every way that servers do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra load")

from onnxsplit.errors import InputError
from runtime.load import connections
from runtime.load.http import HttpTarget
from runtime.load.loop import measure
from runtime.load.patterns import ClosedLoop
from runtime.load.point import LoadPoint
from runtime.load.target import LoadTarget
from runtime.load.text import TextTarget
from runtime.load.windows import Measuring

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
X = {"x": np.zeros(3, np.float32)}


class _Answers(asyncio.Protocol):
    """Answers every request by the next of some answers; None closes the connection."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self._answers = answers

    def connection_made(self, transport):
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if answer is not None:
            self._transport.write(answer)
        if answer is None or b"Connection: close" in answer or answer.endswith(b"..."):
            self._transport.close()


class _Beside(LoadTarget):
    """A target that is opened together with a server in the same loop."""

    def __init__(self, make: Callable[[str], LoadTarget], answers: list[bytes | None]) -> None:
        self._make, self._answers = make, answers

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Answers(self._answers), "127.0.0.1", 0)
        self._target = self._make(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}")
        await self._target.open()

    async def close(self) -> None:
        await self._target.close()
        self._server.close()

    def start(self, number, ended) -> None:
        self._target.start(number, ended)


def inferred(*answers: bytes | None, requests: int = 6, concurrency: int = 1) -> LoadPoint:
    beside = _Beside(lambda url: HttpTarget(url, "m", [X], {}), list(answers))
    return measure(beside, ClosedLoop(concurrency=concurrency), Measuring(warmup_s=0, requests=requests, drain_s=5))


def told(*answers: bytes | None, requests: int = 1) -> LoadPoint:
    def make(url: str) -> LoadTarget:
        return TextTarget(url, "m", [{"prompt": "x"}], chat=False, options={}, headers={})

    return measure(_Beside(make, list(answers)), ClosedLoop(concurrency=1), Measuring(warmup_s=0, requests=requests))


def chunked(*parts: bytes, head: bytes = b"200 OK") -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 " + head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
        chunked(b"{", b"}"),
        b"HTTP/1.1 200 OK\r\n\r\n...",  # without a length: it ends where the connection does
        b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\n...",
    ],
)
def test_answers_of_every_form_are_counted(answer):
    point = inferred(answer)
    assert (point.latency.count, point.failures) == (6, {})


def test_a_refusal_has_the_servers_words():
    refusal = json.dumps({"error": "the queue is full"}).encode()
    answer = b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n%s" % (len(refusal), refusal)
    point = inferred(answer, GOOD)
    assert point.failures == {"HTTP 503": 1}
    assert point.messages == {"HTTP 503": "the queue is full"}
    assert point.latency.count == 5


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (None, "connection lost"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n...", "connection lost"),
        (b"HTTP/1.1 200 OK\r\nContent-Le...", "connection lost"),
        (b"no answer of HTTP\r\n\r\n", "not understood"),
    ],
)
def test_an_answer_that_breaks_off_is_a_failure_and_the_next_request_is_sent(answer, kind):
    point = inferred(answer, GOOD)
    assert point.failures == {kind: 1}
    assert point.latency.count == 5


def test_answers_that_nobody_asked_for_answer_no_request():
    point = inferred(GOOD * 50, None, requests=3, concurrency=3)  # one connection has 50 answers, the others none
    assert (point.latency.count, point.failures) == (1, {"connection lost": 2})


def test_the_last_request_is_awaited_as_long_as_others_took():
    class Slow(LoadTarget):
        def start(self, number, ended) -> None:
            asyncio.get_running_loop().call_later(0.2, ended)

    point = measure(Slow(), ClosedLoop(concurrency=1), Measuring(warmup_s=0, requests=2, drain_s=0.01))
    assert (point.latency.count, point.unanswered) == (2, 0)


def test_requests_above_the_most_connections_wait_for_one(monkeypatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    point = inferred(GOOD, requests=40, concurrency=8)
    assert (point.latency.count, point.failures) == (40, {})


def test_nobody_at_the_address_is_a_failure():
    point = measure(
        HttpTarget("http://127.0.0.1:9", "m", [X], {}), ClosedLoop(concurrency=3), Measuring(warmup_s=0, requests=6)
    )
    assert point.failures == {"connection refused": 6}


def test_a_text_in_any_pieces_has_the_times_of_its_tokens():
    events = [{"choices": [{"text": text}]} for text in ("a", "b", "c")]
    events.append({"choices": [], "usage": {"completion_tokens": 5}})
    stream = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"
    for size in (1, 7, 1000):
        point = told(chunked(*(stream[at : at + size] for at in range(0, len(stream), size))))
        assert point.failures == {}
        assert point.counts_per_s["tokens"] * point.seconds == pytest.approx(5)
        assert point.times["first_token"].count == point.times["between_tokens"].count == 1


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (b'data: {"error": {"message": "the node died"}}\n\ndata: [DONE]\n\n', "stream broke off"),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "stream broke off"),
        (b"data: {\n\n", "not understood"),
        (b"data: {", "not understood"),
        (b"data: [1]\n\n", "not understood"),
        (b"x" * (5 << 20), "not understood"),  # no line may grow without end
        (b'data: {"usage": {"completion_tokens": -12}}\n\ndata: [DONE]\n\n', "not understood"),
        (b'data: {"usage": {"completion_tokens": 1%s}}\n\ndata: [DONE]\n\n' % (b"0" * 400), "not understood"),
    ],
)
def test_a_text_that_breaks_off_is_a_failure(stream, kind):
    assert told(chunked(stream)).failures == {kind: 1}


@pytest.mark.parametrize("count", ["12", "12.0", '"12"'])
def test_numbers_of_tokens_are_read_as_servers_write_them(count):
    stream = f'data: {{"choices": [{{"text": "a"}}], "usage": {{"completion_tokens": {count}}}}}\n\ndata: [DONE]\n\n'
    point = told(chunked(stream.encode()))
    assert point.counts_per_s["tokens"] * point.seconds == pytest.approx(12)


def test_a_header_cannot_bring_another_request():
    with pytest.raises(InputError, match="not plain text"):
        HttpTarget("http://127.0.0.1:9", "m", [X], {"A": "b\r\n\r\nPOST /"})
