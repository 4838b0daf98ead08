"""HTTP connections that cannot be held for nothing: uvicorn's protocol, with limits on headers and on waiting.

What a client may do, and what becomes of it:

    silent after connecting, or half a header    closed after ``HEADER_S``
    a header of more than ``HEADER_BYTES``       400, closed
    a body that stops arriving                   ``scope["silent"]`` after ``SILENCE_S``; then 408
    trailers behind a chunked body               counted as a header, and ignored
    a body that goes on after its answer         thrown away, closed after ``LINGER_S``
    an answer that is not read                   aborted after ``UNREAD_S`` without a byte leaving
    gone before the answer                       the request is given up (``scope["abandon"]``)
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.gateway.http.bodies import SILENCE_S

HEADER_S = 10.0
HEADER_BYTES = 64 << 10
AHEAD_BYTES = 1 << 20
LINGER_S = 5.0
UNREAD_S = 30.0

_JOINED_BYTES = 64 << 10  # larger bodies are not copied behind their head

_TOO_LARGE = f"the header is larger than the {HEADER_BYTES} bytes allowed"


class _OneWrite:
    """A transport that holds the head of an answer until its body is there: two writes would wake the client twice."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        for name in ("get_extra_info", "is_closing", "abort", "pause_reading", "resume_reading", "set_protocol"):
            setattr(self, name, getattr(transport, name))

    def write(self, data: bytes | memoryview) -> None:
        """Send; but hold a head."""
        if self._head:
            head, self._head = self._head, b""
            if len(data) < _JOINED_BYTES:
                self._transport.write(head + bytes(data))
            else:
                self._transport.writelines((head, data))
        elif bytes(data[:9]) == b"HTTP/1.1 " and bytes(data[9:12]) != b"100":
            self._head = bytes(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head that has no body."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Send what is held, and close."""
        self.flush()
        self._transport.close()


class Connection(HttpToolsProtocol):
    """One connection."""

    _clock: asyncio.TimerHandle | None = None
    _silence: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _whole = True
    _pieces: list[bytes]
    _ahead_bytes = 0
    _header_bytes = 0
    _unfinished_bytes = 0
    _progress = False
    _problem = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connects: the first header is due."""
        super().connection_made(_OneWrite(transport))  # type: ignore[arg-type]  # it has what is used of one
        self._due()
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            transport.abort()  # descriptors are needed for other things, too

    def connection_lost(self, exc: Exception | None) -> None:
        """Somebody is gone: so is the reason to work on the request."""
        self._came()
        self._read()
        self._stop_lingering()
        if self._silence is not None:
            self._silence.cancel()
        waiting = [self.cycle, *(cycle for cycle, _ in self.pipeline)]
        super().connection_lost(exc)
        for cycle in waiting:
            if cycle is not None and not cycle.response_complete:
                abandon = cycle.scope.get("abandon")
                if callable(abandon):
                    abandon()

    def on_message_begin(self) -> None:
        """A header begins."""
        super().on_message_begin()
        self._header_bytes = 0
        self._whole = False
        if self._clock is None:
            self._due()

    def on_url(self, url: bytes) -> None:
        """Part of it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Part of it; or a trailer, which must not change a request that was judged by its header."""
        self._count(len(name) + len(value))
        if self._clock is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """It is whole."""
        self._came()
        self._progress = True
        self.scope["pieces"] = self._pieces = []  # type: ignore[typeddict-unknown-key]
        self.scope["target"] = self.url.decode("latin-1")  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body, laid where :class:`~runtime.gateway.http.bodies.Bodies` takes it: copied but once more."""
        self._progress = True
        if self.cycle.response_complete:
            return
        if not self._pieces:
            self._ahead_bytes = 0
        self._pieces.append(body)
        self._ahead_bytes += len(body)
        if self._ahead_bytes > AHEAD_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._whole = self._progress = True
        self._stop_lingering()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It was answered; perhaps before it was whole, and then a client that sends on must be able to read that."""
        self.transport.flush()  # type: ignore[attr-defined]  # as above
        super().on_response_complete()
        if not self._whole and self._linger is None:
            self._linger = self.loop.call_later(LINGER_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        """Bytes come. Reads that complete no header, no request and no piece of a body are counted.

        The parser keeps what belongs to an unfinished field, of a header or of trailers, until the field is whole.
        Such reads do not end a silence either.
        """
        self._progress = False
        super().data_received(data)
        if self._progress:
            self._unfinished_bytes = 0
            self._heard()
        elif not self.transport.is_closing():
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > HEADER_BYTES:
                self._problem = _TOO_LARGE
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  the parser's words say too little
        """Say what is wrong, as all errors are said, and hang up."""
        text = (self._problem or "this is not HTTP/1.1 as RFC 9112 has it").encode()
        body = b'{"error":"' + text + b'"}'
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        self.transport.close()

    def pause_writing(self) -> None:
        """The answer waits to be read."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It is being read."""
        super().resume_writing()
        self._read()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            self._problem = _TOO_LARGE
            raise ValueError(_TOO_LARGE)

    def _heard(self) -> None:
        """Bytes came: if the request is not whole yet, more are due."""
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if not self._whole and self._clock is None:
            self._silence = self.loop.call_later(SILENCE_S, self._tell_silence)

    def _tell_silence(self) -> None:
        self.cycle.scope["silent"] = True  # type: ignore[typeddict-unknown-key]
        self.cycle.message_event.set()

    def _due(self) -> None:
        self._clock = self.loop.call_later(HEADER_S, self.transport.close)

    def _came(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
