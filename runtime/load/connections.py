"""HTTP/1.1 connections of one event loop that cost little: messages are made once, and only ``httptools`` parses.

A load takes processor time that the server on the same host lacks. A request costs about a third here of what it costs
in a client of general use.
"""

from __future__ import annotations

import asyncio
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from onnxsplit.errors import InputError, MissingDependency, one_line
from runtime.load.target import EndDetail, Ended

MOST_CONNECTIONS = 1000
"""The most connections at once. Requests above wait for one, and that time is part of their latency."""

_LOST = "connection lost"
_KINDS: dict[type[Exception], str] = {
    ConnectionRefusedError: "connection refused",
    ConnectionResetError: _LOST,
    TimeoutError: "connection timed out",
}


def post(url: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A request as it is sent.

    Raises:
        InputError: a header is not text of one line.
    """
    lines = {"Host": urlsplit(url).netloc, "Content-Length": str(len(body)), **headers}
    for name, value in lines.items():
        if not (name + value).isprintable() or not (name + value).isascii():
            raise InputError(f"the header {name!r:.80} is not plain text of one line")
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class Exchange(ABC):
    """One request in flight: takes its answer as it comes, and calls ``ended``.

    Args:
        ended: called with the end of the request.
    """

    def __init__(self, ended: Ended) -> None:
        self.ended = ended

    @abstractmethod
    def body(self, status: int, data: bytes) -> None:
        """Take a part of the answer's body."""

    @abstractmethod
    def complete(self, status: int) -> None:
        """The answer is complete: call ``ended``."""


class Connections:
    """Connections to one server. Each request takes a free one, or a new one.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``.

    Raises:
        MissingDependency: the parser is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            import httptools
        except ImportError as error:
            raise MissingDependency("load over HTTP needs one more package: pip install 'onnxsplit[load]'") from error
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self.parser_of = httptools.HttpResponseParser
        self._free: deque[_Connection] = deque()
        self._all: set[_Connection] = set()
        self._waiting: deque[tuple[bytes, Exchange]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(self) -> None:
        """Take requests from now on."""
        self._closed = False

    async def close(self) -> None:
        """Close all connections; requests in flight are given up."""
        self._closed = True
        self._waiting.clear()
        for task in tuple(self._opening):
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        connections = tuple(self._all)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.gone.wait() for connection in connections))
        self._free.clear()

    def send(self, message: bytes, exchange: Exchange) -> None:
        """Send a request now, or as soon as there is a connection for it."""
        if self._free:
            self._free.pop().send(message, exchange)
            return
        self._waiting.append((message, exchange))
        if len(self._all) + len(self._opening) < MOST_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def take(self, connection: _Connection) -> None:
        """Use a connection that is new or has answered for the next request that waits."""
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._free.append(connection)

    def forget(self, connection: _Connection) -> None:
        """Forget a connection that has ended."""
        self._all.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        if self._waiting and not self._closed:
            self.send(*self._waiting.popleft())

    async def _connect(self) -> None:
        context = ssl.create_default_context() if self._secure else None
        loop = asyncio.get_running_loop()
        try:
            _, made = await loop.create_connection(lambda: _Connection(self), self._host, self._port, ssl=context)
            if made.gone.is_set():
                raise ConnectionResetError("the server closed the connection at once")
        except Exception as error:  # sockets, TLS and names of hosts have errors of many types
            if self._waiting:
                _, exchange = self._waiting.popleft()
                kind = _KINDS.get(type(error), type(error).__name__)
                exchange.ended(kind, EndDetail(message=one_line(error, 300)))
            return
        self._all.add(made)
        self.take(made)


class _Connection(asyncio.Protocol):
    """One connection, with at most one request in flight."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._parser = connections.parser_of(self)
        self._transport: Any = None
        self._exchange: Exchange | None = None
        self._answered = self._unasked = False  # whether a request was answered since data came; or none was asked
        self._headed = self._sized = False  # whether the head of an answer is complete; whether it says where it ends
        self.gone = asyncio.Event()

    def send(self, message: bytes, exchange: Exchange) -> None:
        self._exchange = exchange
        self._transport.write(message)

    def abort(self) -> None:
        self._exchange = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except Exception as error:  # of the parser, or of an answer that may be anything
            self._fail("not understood", error.__context__ or error)
            self._transport.abort()
            return
        if self._unasked:
            self._fail("not understood", ValueError("the server sent more answers than there were requests"))
            self._transport.abort()
        elif self._answered:
            self._answered = False
            if self._parser.should_keep_alive() and not self._transport.is_closing():
                self._connections.take(self)
            else:
                self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self._connections.forget(self)
        if exc is None and self._headed and not self._sized and self._exchange is not None:
            self._end()  # such an answer ends where the connection does
        self._fail(_LOST, exc or ConnectionResetError("the server closed the connection"))

    def on_message_begin(self) -> None:
        self._headed = self._sized = False
        self._unasked = self._exchange is None

    def on_header(self, name: bytes, _: bytes) -> None:
        self._sized = self._sized or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._headed = self._parser.get_status_code() >= 200  # one below 200 is followed by another one

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.body(self._parser.get_status_code(), data)

    def on_message_complete(self) -> None:
        if self._headed and self._exchange is not None:
            self._end()
            self._answered = True

    def _end(self) -> None:
        assert self._exchange is not None
        self._exchange.complete(self._parser.get_status_code())
        self._exchange = None

    def _fail(self, kind: str, error: BaseException) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.ended(kind, EndDetail(message=one_line(error, 300)))
