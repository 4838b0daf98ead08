"""Hostile connections: wrong framing, wrong hosts, endless or broken connections; model loading and unloading."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from benchmarks.gateway.attacks.http_cases import HEAD, INFER, MIB, get, inference, many, post, raw, tensor
from benchmarks.gateway.attacks.target import Case, Target, case, together


def _framing() -> list[Case]:
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: HOST\r\n"
    small = json.dumps(inference()).encode()
    length = b"Content-Length: %d\r\n" % len(small)

    def pipelined(target: Target) -> list[str]:
        one = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with target.connect(timeout=20) as connection:
            connection.sendall(one * 1000)
            found, count = b"", 0
            with suppress(TimeoutError):
                while count < 1000 and (more := connection.recv(1 << 16)):
                    found += more
                    count = found.count(b"HTTP/1.1 200")
        return ["200"] * count if count == 1000 else [f"{count} of 1000 answers"]

    return [
        case("a body over --max-body", "413", raw(HEAD + b"Content-Length: 300000000\r\n\r\n")),
        case("a length of 2^63", "400 413", raw(HEAD + b"Content-Length: 9223372036854775808\r\n\r\n")),
        case("a length of 5,000 digits", "400 413", raw(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n")),
        *(case(f"a length of {text}", "400", raw(HEAD + b"Content-Length: " + text.encode() + b"\r\n\r\n")) for text in ("-5", "+5", "5, 5", "0x10", "five", "")),
        case("two lengths that differ", "400", raw(HEAD + length + b"Content-Length: 3\r\n\r\n", small)),
        case("a length and chunks", "400", raw(HEAD + length + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        case("an unknown transfer coding", "400 501", raw(HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n")),
        case("a chunk of 2^68 bytes", "400 413", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n")),
        case("a chunk of -1 bytes", "400", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n")),
        case("chunks over --max-body", "413 closed", lambda target: target.talk(_chunks(300))),
        case("a header of 100 KB", "400 431", raw(live + b"X: " + b"a" * 100_000 + b"\r\n\r\n")),
        case("20,000 headers", "400 431", raw(live + b"X-A: b\r\n" * 20_000 + b"\r\n")),
        case("a model's name of 8 MB", "400 414 431", raw(b"GET /v2/models/" + b"m" * 8 * MIB + b" HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("a model's name of 50 KB", "404", get("/v2/models/" + "m" * 50_000)),
        case("a zero in a header", "400", raw(live + b"X: a\0b\r\n\r\n")),
        case("a blank in a header's name", "400", raw(live + b"X Y: a\r\n\r\n")),
        case("a folded header", "200 400", raw(live + b"X: a\r\n b\r\n\r\n")),
        case("HTTP/1.0", "200", raw(b"GET /v2/health/live HTTP/1.0\r\nHost: HOST\r\n\r\n")),
        case("HTTP/0.9", "400 closed", raw(b"GET /v2/health/live\r\n")),
        case("HTTP/3.7", "400 505", raw(b"GET /v2/health/live HTTP/3.7\r\nHost: HOST\r\n\r\n")),
        case("HTTP/2's preface", "400 closed", raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
        case("a hello of TLS", "400 closed", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 400)),
        case("garbage", "400 closed", raw(bytes(range(256)) * 100)),
        case("an unknown method", "400 404 405", raw(b"BREW /v2 HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("CONNECT", "400 403 404 405", raw(b"CONNECT evil.example:443 HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("TRACE", "400 404 405", raw(b"TRACE /v2 HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("OPTIONS *", "200 400 404 405", raw(b"OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("an upgrade to a web socket", "200 400 404 405 426", raw(live + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: aaaaaaaaaaaaaaaaaaaaaa==\r\nSec-WebSocket-Version: 13\r\n\r\n")),
        case("1,000 requests in a pipeline", "200", pipelined),
        case("Expect: 100-continue", "200", raw(HEAD + length + b"Expect: 100-continue\r\nConnection: close\r\n\r\n", small)),
        *(case(f"the path {path}", "400 404", raw(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: HOST\r\n\r\n")) for path in ("/v2/models/..%2f..%2fetc%2fpasswd", "/v2/models/%00", "/v2/models/%ff%fe", "/v2/models/chain/versions/" + "9" * 5000, "/example/..%2f..%2fetc", "//evil.example/v2")),
        case("an unknown model", "404", post("/v2/models/none/infer", inference())),
        case("an unknown version", "404", post("/v2/models/chain/versions/-1/infer", inference())),
        case("a stage by itself", "501", post("/v2/models/chain.stage0/infer", inference())),
        case("a stage of 2^70", "404", post(f"/v2/models/chain.stage{2**70}/infer", inference())),
        case("a stage of 5,000 digits", "404", get("/v2/models/chain.stage" + "9" * 5000)),
        case("/metrics", "200", get("/metrics")),
        case("/metrics by POST", "405", get("/metrics", "POST")),
        case("/openapi.json", "200", get("/openapi.json")),
        case("/metrics by DELETE", "405", get("/metrics", "DELETE")),
        case("50 x /metrics at once", "200", many(50, get("/metrics"))),
    ]  # fmt: skip


def _chunks(count: int) -> Iterator[bytes]:
    """Send this many MiB in chunks, without a Content-Length."""
    yield b"POST /v2/models/chain/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(count):
        yield b"100000\r\n" + b" " * MIB + b"\r\n"
    yield b"0\r\n\r\n"


def _hosts() -> list[Case]:
    live = b"GET /v2/health/live HTTP/1.1\r\n"
    return [
        case("another Host", "400 403", raw(live + b"Host: evil.example\r\n\r\n")),
        case("two Hosts, ours first", "400 403", raw(live + b"Host: HOST\r\nHost: evil.example\r\n\r\n")),
        case("two Hosts, ours last", "400 403", raw(live + b"Host: evil.example\r\nHost: HOST\r\n\r\n")),
        case("the same Host twice", "400 403", raw(live + b"Host: HOST\r\nHost: HOST\r\n\r\n")),
        case("no Host", "400 403", raw(live + b"\r\n")),
        case("an empty Host", "400 403", raw(live + b"Host:\r\n\r\n")),
        case("a Host that is not an address", "400 403", raw(live + b"Host: [::1\r\n\r\n")),
        case("a Host with a user", "400 403", raw(live + b"Host: localhost@evil.example\r\n\r\n")),
        case("an absolute URL of another host", "400 403", raw(b"GET http://evil.example/v2/health/live HTTP/1.1\r\nHost: HOST\r\n\r\n")),
        case("another Origin", "403", raw(live + b"Host: HOST\r\nOrigin: http://evil.example\r\n\r\n")),
        case("Origin null", "403", raw(live + b"Host: HOST\r\nOrigin: null\r\n\r\n")),
        case("two Origins, ours first", "400 403", raw(live + b"Host: HOST\r\nOrigin: http://HOST\r\nOrigin: http://evil.example\r\n\r\n")),
        case("two Origins, ours last", "400 403", raw(live + b"Host: HOST\r\nOrigin: http://evil.example\r\nOrigin: http://HOST\r\n\r\n")),
        case("an Origin that is not an address", "400 403", raw(live + b"Host: HOST\r\nOrigin: http://[::1\r\n\r\n")),
    ]  # fmt: skip


def _repository() -> list[Case]:
    load, unload = "/v2/repository/models/{}/load", "/v2/repository/models/{}/unload"

    def storm(target: Target) -> list[str]:
        paths = [(unload if number % 2 else load).format("dag") for number in range(24)]
        found = together(12, lambda number: post(paths[number], {})(target))
        found += together(12, lambda number: post(paths[number + 12], {})(target))
        found.append(post(load.format("dag"), {})(target))
        return [*found, get("/v2/models/dag/ready")(target)]

    return [
        *(case(f"/load with parameters {p!r}", "400", post(load.format("chain"), {"parameters": p})) for p in (5, "x", {"a": 1}, [1], True, {"config": "x" * 100_000})),
        case("/load with parameters []", "200 400", post(load.format("chain"), {"parameters": []})),
        *(case(f"/load with {b!r}", "400", post(load.format("chain"), b)) for b in (b"[]", b"5", b"{", b"\xff")),
        case("/load of an unknown model", "404", post(load.format("none"), {})),
        case("/load of ../..", "404", post(load.format("..%2f..%2ftmp"), {})),
        case("/unload of an unknown model", "404", post(unload.format("none"), {})),
        *(case(f"/index with ready {r!r}", "400", post("/v2/repository/index", {"ready": r})) for r in (5, "x", [], None)),
        case("a storm of load and unload", "200 503", storm),
    ]  # fmt: skip


def _away() -> list[Case]:
    small = json.dumps(inference()).encode()
    whole = HEAD.replace(b"HOST", b"localhost") + b"Content-Length: %d\r\n\r\n" % len(small) + small

    def gone(target: Target) -> str:
        for number in range(60):
            with target.connect() as connection:
                connection.sendall(whole[: len(whole) if number % 3 else -20])
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "gone"

    def events(target: Target) -> str:
        """Open six readers of /events that do not read, and cause errors with long texts."""
        with ExitStack() as stack:
            for _ in range(6):
                connection = stack.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect((target.host, target.port))
                connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            long = inference(tensor(name="n" * 8 * MIB))
            end = time.monotonic() + 6
            found = set()
            while time.monotonic() < end:
                found.add(post(INFER, long)(target))
                time.sleep(0.5)
            return " ".join(sorted(found))

    def silent(target: Target) -> list[str]:
        with ExitStack() as stack:
            opened = [stack.enter_context(target.connect(timeout=20)) for _ in range(500)]
            return [_how_it_ends(one) for one in opened]

    def unread(target: Target) -> str:
        """Request a large answer and do not read it."""
        data = b"\0" * (16 * MIB)
        described = tensor(shape=[len(data) // 128, 32], data=..., parameters={"binary_data_size": len(data)})
        said = json.dumps(inference(described, parameters={"binary_data_output": True})).encode()
        head = HEAD.replace(b"HOST", b"localhost") + (
            f"Content-Length: {len(said) + len(data)}\r\nInference-Header-Content-Length: {len(said)}\r\n\r\n".encode()
        )
        with target.connect(timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head + said + data)
            time.sleep(34)
            return "held"

    def slowly(target: Target) -> str:
        def pieces() -> Iterator[bytes]:
            yield HEAD.replace(b"HOST", b"localhost") + b"Content-Length: 1000\r\n\r\n"
            for _ in range(90):
                time.sleep(0.5)
                yield b" "

        return target.talk(pieces())

    half = HEAD + b"X-Slow: "
    return [
        case("60 clients that disconnect midway", "gone", gone),
        case("six readers of /events that do not read, and names of 8 MB", "400", events, most_mib=150),
        case("500 silent connections", "closed", silent, slow=True),
        case("half a header", "closed 400 408", raw(half, timeout=30), slow=True),
        case("a body that does not arrive", "408", raw(HEAD + b"Content-Length: 200000000\r\n\r\n{", timeout=30), slow=True),
        case("chunks that never end", "408", raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", timeout=30), slow=True),
        case("a byte of a body every 0.5 s", "408", slowly, slow=True),
        case("a large answer that is not read", "held", unread, slow=True),
    ]  # fmt: skip


def _how_it_ends(connection: socket.socket) -> str:
    try:
        return "closed" if connection.recv(1) == b"" else "answered"
    except TimeoutError:
        return "unanswered"
    except OSError:
        return "closed"


def plain() -> list[Case]:
    """Return the cases for a server with default options."""
    return [*_framing(), *_hosts(), *_repository(), *_away()]
