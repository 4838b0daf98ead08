"""The body of an HTTP request: bounded in size, in time and in what all of them hold together."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from onnxsplit.errors import InputError, shown
from runtime.errors import Cancelled
from runtime.gateway.budget import Budget
from runtime.gateway.errors import NotLoaded, TooLarge, TooSlow

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]

STOPPING = "the server is stopping and gave the request up"
SILENCE_S = 10.0
SLOWEST_BYTES_PER_S = 64 << 10
_WINDOW_S = 30.0  # in each, a body must keep up the slowest pace
_WINDOW_BYTES = int(_WINDOW_S) * SLOWEST_BYTES_PER_S
_DISCARD_S = 3.0
_DIGITS = 18
_QUICK_BYTES = 4 << 10  # compressed, are decompressed at once: to some MiB at most
_STEP_BYTES = 1 << 20  # decompressed at once
_SLICE_BYTES = 64 << 10  # given to be decompressed at once

_WBITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class Bodies:
    """Takes bodies in.

    Args:
        most_bytes: of one, also after it was decompressed.
        budget: of all requests.
        workers: where what takes long is done, beside the event loop.
    """

    def __init__(self, most_bytes: int, budget: Budget, workers: Executor) -> None:
        self.most_bytes = most_bytes
        self._budget = budget
        self._workers = workers

    async def read(self, headers: Mapping[str, str], scope: Scope, receive: Receive) -> bytes | bytearray:
        """A whole body, decompressed. Silence is noticed by the connection, which sets ``scope["silent"]``.

        What is held of it is noted in the scope, until :meth:`release`.

        Raises:
            TooLarge, TooSlow, Busy: as said above.
            InputError: it is not compressed as it says.
            Cancelled: the client went away.
            NotLoaded: the server stops, and does not wait for the rest.
        """
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
        except asyncio.CancelledError as error:  # a client that goes away is told of otherwise
            raise NotLoaded(STOPPING) from error
        if coding == "identity":
            return body
        if len(body) <= _QUICK_BYTES:
            return self._decompress(body, coding, scope)
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._decompress, body, coding, scope)

    def release(self, scope: Scope) -> None:
        """The body that was read is not needed any more."""
        self._budget.give(scope.pop("held", 0))

    def _hold(self, scope: Scope, size: int) -> None:
        self._budget.take(size)
        scope["held"] = scope.get("held", 0) + size

    async def _whole(self, scope: Scope, receive: Receive) -> bytes | bytearray:
        """All of it. Pieces lie in ``scope["pieces"]``, from the connection; ``receive`` only tells that some came."""
        pieces: list[bytes] = scope["pieces"]
        message = await receive()
        if len(pieces) < 2 and message["type"] == "http.request" and not message["more_body"]:
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
            for piece in pieces:  # not joined at the end, which would keep all other threads waiting
                body += piece
            pieces.clear()
            if not message["more_body"]:
                return body
            message = await receive()

    def _decompress(self, body: bytes | bytearray, coding: str, scope: Scope) -> bytearray:
        """What a body is when it is decompressed, step by step, so that its size is known before it is there.

        From now on that is what counts as held.
        """
        self.release(scope)
        machine = zlib.decompressobj(_WBITS[coding])
        data = bytearray()
        try:
            for step in _steps(machine, body):
                if len(data) + len(step) > self.most_bytes:
                    raise TooLarge(
                        f"decompressed, the request has more than the {self.most_bytes} bytes allowed (--max-body)"
                    )
                self._hold(scope, len(step))
                data += step
        except zlib.error as error:
            raise InputError(f"the body is not {coding}, as Content-Encoding says: {error}") from error
        if not machine.eof:
            raise InputError(f"the body ends within its {coding} stream")
        return data


def _steps(machine: zlib._Decompress, body: bytes | bytearray) -> Iterator[bytes]:
    """Pieces of what a body decompresses to.

    It is fed in slices, since zlib copies what it has not consumed whenever it stops.
    """
    view = memoryview(body)
    for start in range(0, len(view), _SLICE_BYTES):
        rest: bytes | memoryview = view[start : start + _SLICE_BYTES]
        while rest and not machine.eof:
            yield machine.decompress(rest, _STEP_BYTES)
            rest = machine.unconsumed_tail
        if machine.eof:
            if left := len(machine.unused_data) + len(view[start + _SLICE_BYTES :]):
                raise InputError(f"the body has {left} bytes after the end of its compressed stream; send one stream")
            return


async def _discard(scope: Scope, receive: Receive) -> None:
    """Throw away what a client sends on for a while: many read no answer before they have sent all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body"):
                scope["pieces"].clear()


def coding_of(accepted: str) -> str:
    """The coding that a client asks an answer in by name alone; empty for none.

    Browsers and libraries name several codings in every request; tensors gain little from any, and it takes long.
    """
    coding = accepted.strip().lower()
    return coding if coding in _WBITS else ""


def compress(pieces: list[bytes | memoryview], coding: str) -> list[bytes | memoryview]:
    """An answer's body in a coding that :func:`coding_of` gave."""
    machine = zlib.compressobj(1, wbits=_WBITS[coding])
    return [*(machine.compress(piece) for piece in pieces), machine.flush()]
