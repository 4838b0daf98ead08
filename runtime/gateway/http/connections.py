"""HTTP connections with limits, so that a client cannot hold one without using it. Built on uvicorn's protocol.

Events, and how the connection reacts:

    no header, or half of one                    closes after ``HEADER_S``
    a header of more than ``HEADER_BYTES``       answers 400 and closes
    a body that stops arriving                   sets ``scope["silent"]`` after ``SILENCE_S``; then 408
    trailers behind a chunked body               counts them as a header, and ignores them
    a body that goes on after its response       discards it, and closes after ``LINGER_S``
    a response that is not read                  aborts after ``UNREAD_S`` in which no byte left
    a request that is whole                      sets ``scope["whole"]``
    a client that closes before the response     sets ``scope["gone"]``, and cancels the request (``scope["task"]``)
    requests behind one that is being answered   wait; reading goes on, up to limits, to notice a client that closes
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from onnxsplit.errors import InputError
from runtime.gateway.http.bodies import SILENCE_S
from runtime.gateway.http.responses import JOINED_BYTES, error_response

HEADER_S = 10.0
HEADER_BYTES = 64 << 10
AHEAD_BYTES = 1 << 20
LINGER_S = 5.0
UNREAD_S = 30.0
MOST_AHEAD = 16

_TOO_LARGE = f"the header is larger than the {HEADER_BYTES} bytes allowed"


class _OneWrite:
    """A transport that sends the head of a response together with its body: two writes would wake the client twice."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        for name in ("get_extra_info", "is_closing", "abort", "pause_reading", "resume_reading", "set_protocol"):
            setattr(self, name, getattr(transport, name))

    def write(self, data: bytes | memoryview) -> None:
        """Send data, but keep the head of a response until its body is written."""
        if self._head:
            head, self._head = self._head, b""
            if len(data) <= JOINED_BYTES:
                self._transport.write(head + bytes(data))
            else:
                self._transport.writelines((head, data))
        elif bytes(data[:9]) == b"HTTP/1.1 " and bytes(data[9:12]) != b"100":
            self._head = bytes(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head that has no body after it."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Send a head that was kept, and close."""
        self.flush()
        self._transport.close()


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    _in_header = True  # a header arrives, or must
    _header_timer: asyncio.TimerHandle | None = None
    _silence_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _answered: RequestResponseCycle | None = None  # the request that is being answered; ``cycle`` is the newest one
    _whole = True  # no request is arriving
    _pieces: list[bytes]
    _ahead_bytes = 0
    _header_bytes = 0
    _unfinished_bytes = 0
    _progress = False  # the data received last completed something
    _problem = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects, and must send its first header."""
        super().connection_made(_OneWrite(transport))  # type: ignore[arg-type]  # it has the methods that are used
        self._expect_header()
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()  # the other file descriptors are for nodes

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, so its requests are cancelled."""
        self._stop_header_timer()
        self._stop_unread_timer()
        self._stop_linger_timer()
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        self.pipeline.clear()  # nobody waits for these any more
        super().connection_lost(exc)
        cycle = self._answered
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.scope["gone"] = True  # type: ignore[typeddict-unknown-key]
            task = cycle.scope.get("task")
            if isinstance(task, asyncio.Task):
                task.cancel()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """A request begins to arrive."""
        super().on_message_begin()
        self._header_bytes = 0
        self._whole = False
        self._in_header = True

    def on_url(self, url: bytes) -> None:
        """A part of the request line arrived."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header arrived, or a trailer. Trailers are dropped: the request was already accepted by its headers."""
        self._count(len(name) + len(value))
        if self._in_header:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers arrived."""
        self._in_header = False
        self._stop_header_timer()
        self._progress = True
        self.scope["pieces"] = self._pieces = []  # type: ignore[typeddict-unknown-key]
        self.scope["target"] = self.url.decode("latin-1")  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        if 0 < len(self.pipeline) < MOST_AHEAD:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """A piece of a body arrived. :class:`~runtime.gateway.http.bodies.Bodies` takes it from the scope."""
        self._progress = True
        if self.cycle.response_complete:
            return
        if not self._pieces and not self.pipeline:
            self._ahead_bytes = 0
        self._pieces.append(body)
        self._ahead_bytes += len(body)
        if self._ahead_bytes > AHEAD_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The whole request arrived."""
        self._whole = self._progress = True
        self.cycle.scope["whole"] = True  # type: ignore[typeddict-unknown-key]
        self._stop_linger_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The request was answered. If it is not whole, the client gets time to read the response while it sends."""
        self.transport.flush()  # type: ignore[attr-defined]  # it is a _OneWrite
        is_newest = self._answered is self.cycle
        super().on_response_complete()
        if is_newest and not self._whole and not self._in_header and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        """Bytes arrive. Those that complete no header, no request and no piece of a body are counted.

        The parser keeps an unfinished header or trailer in memory until it is whole. Such bytes do not end a silence
        either.
        """
        self._progress = False
        super().data_received(data)
        if not self._progress and self._whole and (self.cycle is None or self.cycle.response_complete):
            self._in_header = True  # empty lines before a request; uvicorn counts the connection as used
        if self._in_header and self._header_timer is None:
            self._expect_header()
        if self._progress:
            self._unfinished_bytes = 0
            self._restart_silence_timer()
        elif not self.transport.is_closing():
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > HEADER_BYTES:
                self._problem = _TOO_LARGE
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  the parser's message says too little
        """Send an error in the form that the path has for errors, as far as it arrived, and close."""
        path = b"" if self._whole else self.url.partition(b"?")[0]
        error = InputError(self._problem or "this is not HTTP/1.1 as RFC 9112 defines it")
        body = bytes(error_response(error, path.decode("latin-1")).body)
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read the response."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads the response again."""
        super().resume_writing()
        self._stop_unread_timer()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            self._problem = _TOO_LARGE
            raise ValueError(_TOO_LARGE)

    def _restart_silence_timer(self) -> None:
        """Bytes arrived. If the request is not whole, more must follow."""
        if self._silence_timer is not None:
            self._silence_timer.cancel()
            self._silence_timer = None
        if not self._whole and not self._in_header:
            self._silence_timer = self.loop.call_later(SILENCE_S, self._tell_silence)

    def _tell_silence(self) -> None:
        self.cycle.scope["silent"] = True  # type: ignore[typeddict-unknown-key]
        self.cycle.message_event.set()

    def _expect_header(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_S, self.transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_linger_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
