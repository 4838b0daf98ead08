"""Timers of HTTP connections: what does not go on is closed, and what goes on is not."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
import uvicorn

from runtime.gateway.budget import Budget
from runtime.gateway.http import connections
from runtime.gateway.http.bodies import Bodies, headers_of
from runtime.gateway.http.responses import send_answer
from runtime.gateway.threads import Workers

POST = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@asynccontextmanager
async def serving():
    """A server that answers with the size of the body; its port."""
    bodies = Bodies(1 << 20, Budget(1 << 20, 1 << 20), Workers(1))

    async def app(scope, receive, send):
        async def size(body):
            return b"%d" % len(body)

        answer = await bodies.answer(headers_of(scope), scope, receive, size)
        if answer is not None:
            await send_answer(send, [answer], [])

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=connections.Connection, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def answer(reader) -> bytes:
    """The body of the next response."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return await reader.readexactly(int(length.partition(b":")[2]))


def talk(conversation) -> None:
    """Run a conversation with a server; it must not take a minute."""

    async def scene():
        async with asyncio.timeout(60), serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await conversation(reader, writer)
            writer.close()

    asyncio.run(scene())


def test_empty_lines_do_not_keep_a_connection_open(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.2)

    async def conversation(reader, writer):
        writer.write(POST % 3 + b"abc")
        assert await answer(reader) == b"3"
        writer.write(b"\r\n")
        assert await reader.read() == b"", "closed although uvicorn's own timer was cancelled"

    talk(conversation)


def test_a_request_behind_empty_lines_is_answered():
    async def conversation(reader, writer):
        for _ in range(3):
            writer.write(b"\r\n" + POST % 2)
            await asyncio.sleep(0.02)
            writer.write(b"ab")
            assert await answer(reader) == b"2"

    talk(conversation)


def test_half_a_header_is_closed_wherever_it_begins(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_S", 0.2)

    async def at_once(reader, writer):
        writer.write(POST[:20])
        assert await reader.read() == b""

    async def behind_a_request(reader, writer):
        writer.write(POST % 3 + b"abc" + POST[:20])
        assert await answer(reader) == b"3"
        assert await reader.read() == b""

    async def later(reader, writer):
        writer.write(POST % 3 + b"abc")
        assert await answer(reader) == b"3"
        writer.write(POST[:20])
        assert await reader.read() == b""

    for conversation in (at_once, behind_a_request, later):
        talk(conversation)


def test_a_slow_body_whose_header_began_behind_another_request_is_not_cut_off(monkeypatch):
    """Its connection is not one whose answered request goes on."""
    monkeypatch.setattr(connections, "LINGER_S", 0.05)

    async def conversation(reader, writer):
        header = POST % 6
        writer.write(POST % 3 + b"abc" + header[:20])
        assert await answer(reader) == b"3"
        writer.write(header[20:])
        for piece in (b"ab", b"cd", b"ef"):
            await asyncio.sleep(0.1)
            writer.write(piece)
            await writer.drain()
        assert await answer(reader) == b"6"

    talk(conversation)


def test_a_body_in_pieces_is_the_same_as_one_at_once():
    async def conversation(reader, writer):
        for pieces in ([b"abcdef"], [b"ab", b"cdef"], [b"a", b"b", b"c", b"d", b"e", b"f"]):
            writer.write(POST % 6)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            assert await answer(reader) == b"6"
        writer.write(
            b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        assert await answer(reader) == b"5"

    talk(conversation)
