"""The body of an HTTP request: bounded in size, in time and in what all of them hold together."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from onnxsplit.errors import InputError
from runtime.errors import Busy, Cancelled
from runtime.gateway.errors import TooLarge, TooSlow

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

SILENCE_S = 10.0
SLOWEST_BYTES_PER_S = 64 << 10
_PATIENCE_S = 30.0
_DISCARD_S = 3.0

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Bodies:
    """Takes bodies in.

    Args:
        most_bytes: of one, also after it was decompressed.
        all_bytes: of those that are on their way, together.
    """

    def __init__(self, most_bytes: int, all_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._all_bytes = all_bytes
        self.held_bytes = 0

    async def read(self, headers: Mapping[str, str], scope: Scope, receive: Receive) -> bytes:
        """A whole body, decompressed. Silence is noticed by the connection, which sets ``scope["silent"]``.

        Raises:
            TooLarge, TooSlow, Busy: as said above.
            InputError: it is not compressed as it says.
            Cancelled: the client went away.
        """
        claimed = headers.get("content-length", "")
        length = int(claimed) if claimed.isdecimal() else None
        if length is not None and length > self.most_bytes:
            if "expect" not in headers:
                await _discard(scope, receive)
            raise TooLarge(f"the request has {length} bytes; at most {self.most_bytes} are allowed (--max-body)")
        coding = headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "gzip", "deflate"):
            raise InputError(f"Content-Encoding is {coding!r}; allowed: gzip, deflate, identity")
        body = await self._whole(scope, receive)
        return body if coding == "identity" else self._decompress(body, coding)

    async def _whole(self, scope: Scope, receive: Receive) -> bytes:
        """All of it. Pieces lie in ``scope["pieces"]``, from the connection; ``receive`` only tells that some came."""
        pieces: list[bytes] = scope["pieces"]
        message = await receive()
        if len(pieces) < 2 and message["type"] == "http.request" and not message["more_body"]:
            return pieces[0] if pieces else b""
        begun = time.monotonic()
        body: list[bytes] = []
        size = 0
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client went away before its request was whole")
                if scope.get("silent") or time.monotonic() > begun + _PATIENCE_S + size / SLOWEST_BYTES_PER_S:
                    raise TooSlow(
                        f"the body is too slow: {SILENCE_S:g} s without a byte, or under {SLOWEST_BYTES_PER_S} bytes/s"
                    )
                more = sum(map(len, pieces))
                if size + more > self.most_bytes:
                    await _discard(scope, receive)
                    raise TooLarge(f"the request has more than the {self.most_bytes} bytes allowed (--max-body)")
                if size and self.held_bytes + more > self._all_bytes:
                    raise Busy(f"requests of {self.held_bytes} bytes are being received, which is all; try again later")
                self.held_bytes += more
                size += more
                body += pieces
                pieces.clear()
                if not message["more_body"]:
                    return b"".join(body)
                message = await receive()
        finally:
            self.held_bytes -= size

    def _decompress(self, body: bytes, coding: str) -> bytes:
        machine = zlib.decompressobj(_WINDOW[coding])
        try:
            data = machine.decompress(body, self.most_bytes + 1)
        except zlib.error as error:
            raise InputError(f"the body is not {coding}, as Content-Encoding says: {error}") from error
        if len(data) > self.most_bytes:
            raise TooLarge(f"decompressed, the request has more than the {self.most_bytes} bytes allowed (--max-body)")
        if not machine.eof:
            raise InputError(f"the body ends within its {coding} stream")
        return data


async def _discard(scope: Scope, receive: Receive) -> None:
    """Throw away what a client sends on for a while: many read no answer before they have sent all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body"):
                scope["pieces"].clear()


def compress(pieces: list[bytes | memoryview], accepted: str) -> tuple[list[bytes | memoryview], str]:
    """An answer's body in the coding that a client asks for by name alone, and that; else as it is, and ``""``.

    Browsers and libraries name several codings in every request; tensors gain little from any, and it takes long.
    """
    coding = accepted.strip().lower()
    if coding not in _WINDOW:
        return pieces, ""
    machine = zlib.compressobj(1, wbits=_WINDOW[coding])
    return [*(machine.compress(piece) for piece in pieces), machine.flush()], coding
