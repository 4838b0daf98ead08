"""Hostile HTTP/2 frames for gRPC's port, built by hand because gRPC's own client refuses to send them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from benchmarks.gateway.attacks.grpc_cases import MIB, call, request
from benchmarks.gateway.attacks.target import Case, Target, case

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """Build an HTTP/2 frame."""
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def fields(*pairs: tuple[bytes, bytes]) -> bytes:
    """Build a header block whose fields are literals without indexing."""

    def text(value: bytes) -> bytes:
        if len(value) < 127:
            return bytes([len(value)]) + value
        rest, size = len(value) - 127, b"\x7f"
        while rest >= 128:
            size += bytes([rest % 128 + 128])
            rest //= 128
        return size + bytes([rest]) + value

    return b"".join(b"\0" + text(name) + text(value) for name, value in pairs)


def rpc_fields(method: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Build the header block of a call."""
    return fields(
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/inference.GRPCInferenceService/" + method),
        (b":authority", b"localhost"), (b"content-type", b"application/grpc"), (b"te", b"trailers"), *more,
    )  # fmt: skip


def talk_http2(target: Target, sent: bytes | Iterable[bytes], *, timeout: float = 5.0) -> str:
    """Send a preface and frames, and return how the server ends the stream or the connection."""
    with target.connect(grpc=True, timeout=timeout) as connection:
        with suppress(OSError):
            connection.sendall(PREFACE + frame(SETTINGS, 0, 0, b""))
            for piece in (sent,) if isinstance(sent, bytes) else sent:
                connection.sendall(piece)
        waiting = b""
        try:
            while True:
                more = connection.recv(65536)
                if not more:
                    return "closed"
                waiting += more
                while len(waiting) >= 9 and len(waiting) >= 9 + (size := int.from_bytes(waiting[:3], "big")):
                    kind, flags, waiting = waiting[3], waiting[4], waiting[9 + size :]
                    if kind == GOAWAY:
                        return "closed"
                    if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                        return "ended"
        except TimeoutError:
            return "unanswered"
        except OSError:
            return "closed"


def plain() -> list[Case]:
    """Return the cases for a server with default options."""
    live = rpc_fields(b"ServerLive")
    empty = b"\0\0\0\0\0"
    ends = "ended closed"

    def asked(block: bytes, data: bytes = empty) -> Callable[[Target], str]:
        sent = frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, data)
        return lambda target: talk_http2(target, sent)

    def timed(text: bytes) -> Callable[[Target], str]:
        infer = request().SerializeToString()
        block = rpc_fields(b"ModelInfer", (b"grpc-timeout", text))
        return asked(block, b"\0" + struct.pack(">I", len(infer)) + infer)

    def bare(sent: bytes) -> Callable[[Target], str]:
        def send(target: Target) -> str:
            with target.connect(grpc=True, timeout=15) as connection:
                with suppress(OSError):
                    connection.sendall(sent)
                    while connection.recv(1 << 16):
                        pass
                return "closed"

        return send

    def reset(target: Target) -> str:
        """Open 3,000 streams and reset them at once."""
        pieces = (
            frame(HEADERS, END_HEADERS, stream, live) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
            for stream in range(1, 6001, 2)
        )
        talk_http2(target, pieces, timeout=2)
        return "reset"

    def settings(target: Target) -> str:
        """Send 20,000 settings that each require an answer, and read none."""
        talk_http2(target, (frame(SETTINGS, 0, 0, b"") * 1000 for _ in range(20)), timeout=1)
        return "sent"

    def silent(target: Target) -> str:
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(target.connect(grpc=True).getpeername()))
            return call(request())(target)

    return [
        case("a deadline of -5 s, by hand", ends, timed(b"-5S")),
        case("a deadline of 99999999 h, by hand", ends, timed(b"99999999H")),
        case("a deadline of 10^20 n, by hand", ends, timed(b"1" + b"0" * 20 + b"n")),
        case("an invalid deadline, by hand", ends, timed(b"soon")),
        case("metadata that is not ASCII, by hand", ends, asked(rpc_fields(b"ServerLive", (b"x", b"\xff\xfe")))),
        case("two paths, by hand", ends, asked(live + fields((b":path", b"/x")))),
        case("a message that claims 4 GB, by hand", ends, asked(rpc_fields(b"ModelInfer"), b"\0\xff\xff\xff\xff")),
        case("a compressed message that is not compressed, by hand", ends, asked(rpc_fields(b"ModelInfer", (b"grpc-encoding", b"gzip")), b"\1\0\0\0\4abcd")),
        case("headers that never end, by hand", f"{ends} unanswered", lambda target: talk_http2(target, [frame(HEADERS, 0, 1, live), *(frame(CONTINUATION, 0, 1, fields((b"x" * 100, b"y" * 4000))) for _ in range(500))])),
        case("a frame of 16 MB, by hand", ends, lambda target: talk_http2(target, b"\xff\xff\xff\0\0\0\0\0\1" + b"\0" * MIB)),
        case("3,000 streams reset at once, by hand", "reset", reset),
        case("20,000 settings, by hand", "sent", settings),
        case("HTTP/1.1 at gRPC's port", "closed", bare(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")),
        case("a hello of TLS at gRPC's port", "closed", bare(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 600)),
        case("half a preface at gRPC's port", "closed", bare(PREFACE[:10]), slow=True),
        case("200 silent connections at gRPC's port", "OK", silent),
    ]  # fmt: skip
