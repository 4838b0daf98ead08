"""The bodies of HTTP requests: limited in size, in time, and in the memory of all together."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

from onnxsplit.errors import InputError, shown
from runtime.errors import Cancelled
from runtime.gateway.budget import Budget
from runtime.gateway.errors import NotLoaded, TooLarge, TooSlow
from runtime.gateway.threads import Workers

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Body = bytes | bytearray
T = TypeVar("T")

STOPPING = "the server is stopping and gave the request up"
SILENCE_S = 10.0
SLOWEST_BYTES_PER_S = 64 << 10
_WINDOW_S = 30.0  # in each window, a body must arrive at the slowest rate or faster
_WINDOW_BYTES = int(_WINDOW_S) * SLOWEST_BYTES_PER_S
_DISCARD_S = 3.0
_DIGITS = 18
_QUICK_BYTES = 4 << 10  # a compressed body up to this size expands to a few MiB at most
_STEP_BYTES = 1 << 20  # most bytes that are decompressed at once
_SLICE_BYTES = 64 << 10  # most compressed bytes that zlib is given at once

_PARSED_TIMES = 20  # the most bytes of Python's objects for a byte of JSON: numbers, and lists and objects of one entry

_WBITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers of a request by their names in small letters; the first where one is repeated."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


class Bodies:
    """Receives bodies.

    Args:
        most_bytes: Most bytes of one body, also after it was decompressed.
        budget: Memory for all requests.
        workers: Threads for work that takes long.
    """

    def __init__(self, most_bytes: int, budget: Budget, workers: Workers) -> None:
        self.most_bytes = most_bytes
        self._budget = budget
        self._workers = workers

    async def read(self, headers: Mapping[str, str], scope: Scope, receive: Receive) -> Body:
        """Receive a whole body, and decompress it.

        The scope records how many bytes are held for it, until :meth:`release`. The connection notices when nothing
        arrives, and then sets ``scope["silent"]``.

        Raises:
            TooLarge: The body is larger than allowed.
            TooSlow: The body arrives too slowly.
            Busy: The memory for requests is used up.
            InputError: The body is not compressed as its header says.
            Cancelled: The client went away.
            NotLoaded: The server is stopping and does not wait for the rest.
        """
        if scope.get("whole") and "content-encoding" not in headers:
            pieces: list[bytes] = scope["pieces"]
            size = sum(map(len, pieces))
            if size <= self.most_bytes:
                if len(pieces) > 1:
                    self._hold(scope, size)
                return b"".join(pieces)
        claimed = headers.get("content-length", "")
        length = int(claimed) if claimed.isdecimal() and len(claimed) <= _DIGITS else None
        if length is not None and length > self.most_bytes:
            if "expect" not in headers:
                await _discard(scope, receive)
            raise TooLarge(f"the request has {length} bytes; at most {self.most_bytes} are allowed (--max-body)")
        coding = headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "gzip", "deflate"):
            raise InputError(f"Content-Encoding is {shown(coding)}; allowed: gzip, deflate, identity")
        try:
            body = await self._whole(scope, receive)
        except asyncio.CancelledError as error:  # not by a client that went away: that arrives as a message
            raise NotLoaded(STOPPING) from error
        if coding == "identity":
            return body
        return await self._workers.run(len(body) > _QUICK_BYTES, self._decompress, body, coding, scope)

    async def answer(
        self, headers: Mapping[str, str], scope: Scope, receive: Receive, work: Callable[[Body], Awaitable[T]]
    ) -> T | None:
        """Receive a whole body and work on it. A client that goes away cancels the work.

        Returns:
            What the work returns; None if the client has gone away.

        Raises:
            NotLoaded: The server stops.
            OnnxsplitError: As :meth:`read`, and as the work.
        """
        try:
            body = await self.read(headers, scope, receive)
            scope["task"] = asyncio.current_task()  # the connection cancels it
            return await work(body)
        except asyncio.CancelledError as error:
            if scope.get("gone"):
                return None
            raise NotLoaded(STOPPING) from error
        finally:
            scope.pop("task", None)
            self.release(scope)

    def hold_parsed(self, scope: Scope, body: Body) -> None:
        """Count what a body of JSON may take once it is parsed, too, until :meth:`release`.

        Raises:
            Busy: The memory for requests is used up.
        """
        self._hold(scope, min(_PARSED_TIMES * len(body), self._budget.all_bytes - scope.get("held", 0)))

    def release(self, scope: Scope) -> None:
        """Stop counting the body that was read as held."""
        if held := scope.pop("held", 0):
            self._budget.give(held)

    def _hold(self, scope: Scope, size: int) -> None:
        self._budget.take(size)
        scope["held"] = scope.get("held", 0) + size

    async def _whole(self, scope: Scope, receive: Receive) -> Body:
        """The whole body. The connection puts pieces into ``scope["pieces"]``, and ``receive`` only announces them."""
        pieces: list[bytes] = scope["pieces"]
        message = await receive()
        ended = message["type"] == "http.request" and not message["more_body"]
        if ended and len(pieces) < 2 and sum(map(len, pieces)) <= self.most_bytes:
            return pieces[0] if pieces else b""
        body = bytearray()
        due_s, due_bytes = time.monotonic() + _WINDOW_S, _WINDOW_BYTES
        while True:
            if message["type"] == "http.disconnect":
                raise Cancelled("the client went away before its request was whole")
            more = sum(map(len, pieces))
            late = time.monotonic() > due_s
            if scope.get("silent") or (late and len(body) + more < due_bytes):
                raise TooSlow(
                    f"the body is too slow: {SILENCE_S:g} s without a byte, or under {SLOWEST_BYTES_PER_S} bytes/s "
                    f"for {_WINDOW_S:g} s"
                )
            if late:
                due_s, due_bytes = time.monotonic() + _WINDOW_S, len(body) + more + _WINDOW_BYTES
            if len(body) + more > self.most_bytes:
                await _discard(scope, receive)
                raise TooLarge(f"the request has more than the {self.most_bytes} bytes allowed (--max-body)")
            self._hold(scope, more)
            for piece in pieces:  # joining them all at the end would block the other threads
                body += piece
            pieces.clear()
            if not message["more_body"]:
                return body
            message = await receive()

    def _decompress(self, body: bytes | bytearray, coding: str, scope: Scope) -> bytearray:
        """Decompress a body step by step, so that it is refused before it takes more memory than allowed.

        The decompressed bytes count as held instead of the compressed ones.
        """
        self.release(scope)
        decompressor = zlib.decompressobj(_WBITS[coding])
        data = bytearray()
        try:
            for step in _steps(decompressor, body):
                if len(data) + len(step) > self.most_bytes:
                    raise TooLarge(
                        f"decompressed, the request has more than the {self.most_bytes} bytes allowed (--max-body)"
                    )
                self._hold(scope, len(step))
                data += step
        except zlib.error as error:
            raise InputError(f"the body is not {coding}, as Content-Encoding says: {error}") from error
        if not decompressor.eof:
            raise InputError(f"the body ends within its {coding} stream")
        return data


def _steps(decompressor: zlib._Decompress, body: bytes | bytearray) -> Iterator[bytes]:
    """The pieces of a decompressed body.

    The body is given to zlib in slices, because zlib copies its unconsumed input whenever it stops.
    """
    view = memoryview(body)
    for start in range(0, len(view), _SLICE_BYTES):
        rest: bytes | memoryview = view[start : start + _SLICE_BYTES]
        while rest and not decompressor.eof:
            yield decompressor.decompress(rest, _STEP_BYTES)
            rest = decompressor.unconsumed_tail
        if decompressor.eof:
            if left := len(decompressor.unused_data) + len(view[start + _SLICE_BYTES :]):
                raise InputError(f"the body has {left} bytes after the end of its compressed stream; send one stream")
            return


async def _discard(scope: Scope, receive: Receive) -> None:
    """Discard further data for some time: many clients read the response only after they have sent all data."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body"):
                scope["pieces"].clear()


def coding_of(accepted: str) -> str:
    """The compression that a client asks for as the only one; empty for no compression.

    Browsers and libraries accept several in every request, but tensors compress slowly and gain little.
    """
    coding = accepted.strip().lower()
    return coding if coding in _WBITS else ""


def compress(pieces: list[bytes | memoryview], coding: str) -> list[bytes | memoryview]:
    """Compress the body of a response, with a coding from :func:`coding_of`."""
    compressor = zlib.compressobj(1, wbits=_WBITS[coding])
    return [*(compressor.compress(piece) for piece in pieces), compressor.flush()]
