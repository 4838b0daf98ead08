"""Hostile requests over HTTP. Each case has a name, a request and the statuses that are right."""

from __future__ import annotations

import gzip
import http.client
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from benchmarks.gateway.attacks.target import Case, Target, case, later, status_text, together

MIB = 1 << 20
INFER = "/v2/models/chain/infer"
STRINGS = "/v2/models/strings/infer"


def tensor(**changes: Any) -> dict[str, Any]:
    """Make the input of the chain, with changes; None leaves a field out."""
    whole = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32, **changes}
    return {name: value for name, value in whole.items() if value is not ...}


def inference(*inputs: Any, **more: Any) -> dict[str, Any]:
    """Make the body of an inference request."""
    return {"inputs": list(inputs) or [tensor()], **more}


def post(path: str, body: Any, *, timeout: float = 60.0, **headers: str) -> Callable[[Target], str]:
    """Post an object as JSON, or bytes unchanged; a callable makes them when they are needed."""

    def send(target: Target) -> str:
        made = body() if callable(body) else body
        made = made if isinstance(made, bytes) else json.dumps(made).encode()
        try:
            return status_text(*target.ask("POST", path, made, timeout=timeout, **headers))
        except TimeoutError:
            return "unanswered"
        except (OSError, http.client.HTTPException):
            return "closed"

    return send


def many(count: int, send: Callable[[Target], str]) -> Callable[[Target], list[str]]:
    """Send the same request several times at once."""
    return lambda target: together(count, lambda _: send(target))


def raw(head: bytes, body: bytes = b"", *, timeout: float = 60.0) -> Callable[[Target], str]:
    """Send bytes unchanged; ``HOST`` stands for the server's own address."""
    return lambda target: target.talk(
        head.replace(b"HOST", f"{target.host}:{target.port}".encode()) + body, timeout=timeout
    )


def get(path: str, method: str = "GET", **headers: str) -> Callable[[Target], str]:
    """Send a request without a body."""
    return lambda target: status_text(*target.ask(method, path, **headers))


def binary(shape: Any, size: Any, data: bytes = b"", *, datatype: str = "FP32", length: str | None = None) -> Any:
    """Make an inference request with bytes after its JSON."""
    described = tensor(shape=shape, datatype=datatype, data=..., parameters={"binary_data_size": size})
    text = json.dumps(inference(described)).encode()
    headers = {"Inference_Header_Content_Length": str(len(text)) if length is None else length}
    return post(INFER, text + data, **headers)


@cache
def bomb(coding: str) -> bytes:
    """Make about 260 KB that decompress to 256 MiB of blanks."""
    if coding == "gzip":
        return gzip.compress(b" " * (256 * MIB), 9)
    return zlib.compress(b" " * (256 * MIB), 9)


def _times() -> list[Case]:
    def timeout(value: str, expected: str) -> Case:
        body = json.dumps(inference(parameters={"timeout": "@"})).replace('"@"', value)
        return case(f"timeout {value[:24]}", expected, post(INFER, body.encode()))

    batch = tensor(shape=[64, 32], data=[0.5] * 32 * 64)
    return [
        *(timeout(str(value), "200 400") for value in (2**63 - 1, 2**53, 10**15)),
        *(timeout(str(value), "400") for value in (2**63, 2**64, 2**200, -1, -(2**63), 1e300)),
        *(timeout(value, "400") for value in ("1e400", "-1e400", "NaN", "1.5", '"5"', "true", "[]", "{}")),
        *(timeout(value, "200") for value in ("0", "null")),
        timeout("1", "503 504"),
        case(
            "40 s after a timeout of 2^63-1",
            "works",
            later(post(INFER, inference(parameters={"timeout": 2**63 - 1}))),
            slow=True,
        ),
        case(
            "64 rows in little time, 8 at once",
            "200 503 504",
            many(8, post(INFER, inference(batch, parameters={"timeout": 1500}))),
        ),
    ]


def _tensors() -> list[Case]:
    shapes: list[Any] = [
        [0, 2**62], [2**31, 2**31], [2**32, 2**32, 0], [-1, 32], [-(2**63)], [1] * 33, [1.5, 32], ["1", 32],
        [2**70, 32], [], None, 5, "1,32", [[1], 32], [True, 32], {"0": 1}, [1, 32, 1], [0], [32],
    ]  # fmt: skip
    datatypes: list[Any] = ["FP64", "BYTES", "FP31", "fp32", "", 5, None, "FP32\0", "BOOL", "FP" + "3" * 1_000_000]
    data: list[tuple[str, str]] = [
        ("1e400", "1e400"), ("NaN", "NaN"), ("null", "null"), ("text", '"a"'), ("true", "true"), ("an object", "{}"),
        ("a list that is ragged", "[1], [2, 3]"), ("lists in lists", "[" * 5000 + "1" + "]" * 5000),
    ]  # fmt: skip
    return [
        *(case(f"shape {str(s)[:40]} in JSON", "400", post(INFER, inference(tensor(shape=s, data=[])))) for s in shapes),
        *(case(f"shape {s} in bytes", "400", binary(s, 0)) for s in shapes[:6]),
        *(case(f"datatype {str(d)[:12]!r}", "400", post(INFER, inference(tensor(datatype=d)))) for d in datatypes),
        *(
            case(f"data: {name}", "400", post(INFER, json.dumps(inference(tensor(data="@"))).replace('"@"', f"[{value}]").encode()))
            for name, value in data
        ),
        case("10 million numbers for shape [1]", "400", post(INFER, lambda: _numbers(10_000_000)), most_mib=200),
        case(
            "10 million numbers for shape [1], four at once", "400 503",
            many(4, post(INFER, lambda: _numbers(10_000_000))), most_mib=600,
        ),
        case("data nested 100,000 deep", "400", post(INFER, lambda: _deep_data())),
        case("1e39 for FP32", "200 400", post(INFER, inference(tensor(data=[1e39] * 32)))),
        case("a surrogate in a string", "400", post(STRINGS, inference({"name": "s", "shape": [1], "datatype": "BYTES", "data": ["\ud800"]}))),
        case("numbers for strings", "400", post(STRINGS, inference({"name": "s", "shape": [1], "datatype": "BYTES", "data": [1]}))),
        case("a zero in a string", "200 400", post(STRINGS, inference({"name": "s", "shape": [1], "datatype": "BYTES", "data": ["a\0b"]}))),
    ]  # fmt: skip


def _numbers(count: int) -> bytes:
    items = b"1.0," * (count - 1) + b"1.0"
    return b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[' + items + b"]}]}"


def _deep_data() -> bytes:
    nested = b"[" * 100_000 + b"1" + b"]" * 100_000
    return b'{"inputs":[{"name":"x","shape":[1,32],"datatype":"FP32","data":' + nested + b"}]}"


def _bytes() -> list[Case]:
    right = np.full(32, 0.5, np.float32).tobytes()
    two = [tensor(data=..., parameters={"binary_data_size": 2**62}), tensor(name="z", data=..., parameters={"binary_data_size": 2**63 - 2**62})]  # fmt: skip
    head = json.dumps(inference(*two)).encode()

    def strings(data: bytes, count: int = 1) -> Callable[[Target], str]:
        described = {"name": "s", "shape": [count], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        said = json.dumps(inference(described)).encode()
        return post(STRINGS, said + data, Inference_Header_Content_Length=str(len(said)))

    return [
        *(case(f"binary_data_size {str(s)[:24]}", "400", binary([1, 32], s, right)) for s in (-1, 2**63, 2**70, 127, 129, 0, "128", 1.5, True, [128])),
        case("binary_data_size in sums that overflow", "400", post(INFER, head, Inference_Header_Content_Length=str(len(head)))),
        *(
            case(f"Inference-Header-Content-Length {length}", "400", binary([1, 32], 128, right, length=length))
            for length in ("-1", "0", str(2**63), "9" * 5000, "abc", "1e3", "3", "99999", "+100", "1_0")
        ),
        case("bytes that no input claims", "400", post(INFER, json.dumps(inference()).encode() + right, Inference_Header_Content_Length=str(len(json.dumps(inference()))))),
        case("data and bytes both", "400", post(INFER, inference(tensor(parameters={"binary_data_size": 128})))),
        case("strings that are not UTF-8", "400", strings(struct.pack("<I", 2) + b"\xff\xfe")),
        case("strings longer than the data", "400", strings(struct.pack("<I", 2**32 - 1) + b"ab")),
        case("strings shorter than the data", "400", strings(struct.pack("<I", 1) + b"abc")),
        case("a billion empty strings", "400", strings(b"\0" * 8, 2**30)),
        case("one string of 60 MB", "200", strings(struct.pack("<I", 60_000_000) + b"x" * 60_000_000)),
    ]  # fmt: skip


def _texts() -> list[Case]:
    long = "n" * (8 * MIB)
    return [
        *(case(f"body {body[:20]!r}", "400", post(INFER, body)) for body in (b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe\x00", b'{"inputs": 5}', b'{"inputs": [5]}', b'{"inputs": [{}]}', b'{"inputs": {}}', b"\0" * 1000)),
        case("JSON cut off", "400", post(INFER, json.dumps(inference()).encode()[:-5])),
        case("JSON with trailing bytes", "400", post(INFER, json.dumps(inference()).encode() * 2)),
        case("JSON nested 100,000 deep", "400", post(INFER, b"[" * 100_000)),
        case("objects nested 100,000 deep", "400", post(INFER, b'{"a":' * 100_000)),
        case("parameters nested 100,000 deep", "400", post(INFER, b'{"inputs":[],"parameters":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}")),
        case("an input's name of 8 MB", "400", post(INFER, lambda: inference(tensor(name=long)))),
        case("an output's name of 8 MB", "400", post(INFER, lambda: inference(outputs=[{"name": long}]))),
        case("a datatype of 8 MB", "400", post(INFER, lambda: inference(tensor(datatype=long)))),
        case("an id of 8 MB", "200 400", post(INFER, lambda: inference(id=long))),
        case("a parameter of 8 MB", "200 400", post(INFER, lambda: inference(parameters={"unknown": long}))),
        case("a timeout of 8 MB", "400", post(INFER, lambda: inference(parameters={"timeout": long}))),
        case("a priority of 8 MB", "200 400", post(INFER, lambda: inference(parameters={"priority": long}))),
        case("a coding of 60 KB", "400", post(INFER, b"x", Content_Encoding="g" * 60_000)),
        case("100,000 inputs", "400", post(INFER, lambda: inference(*(tensor(name=f"x{n}", data=[]) for n in range(100_000))))),
        case("100,000 outputs, all the same", "400", post(INFER, lambda: inference(outputs=[{"name": "y"}] * 100_000))),
        case("100,000 outputs, all unknown", "400", post(INFER, lambda: inference(outputs=[{"name": f"y{n}"} for n in range(100_000)]))),
        case("100,000 parameters", "200 400", post(INFER, lambda: inference(parameters={f"p{n}": n for n in range(100_000)}))),
        case("an input twice", "400", post(INFER, inference(tensor(), tensor()))),
        case("an output twice", "200 400", post(INFER, inference(outputs=[{"name": "y"}, {"name": "y"}]))),
        *(case(f"outputs {o!r}", "400", post(INFER, inference(outputs=o))) for o in ("y", [["y"]], [5], {"y": 1}, [{"name": 5}], [{}])),
        *(case(f"classification {c!r}", e, post(INFER, inference(outputs=[{"name": "y", "parameters": {"classification": c}}]))) for c, e in ((-1, "400"), (2**62, "200 400"), (2**70, "200 400"), (True, "400"), ("3", "400"), (1.5, "400"))),
        case("classification of strings", "400", post(STRINGS, inference({"name": "s", "shape": [1], "datatype": "BYTES", "data": ["a"]}, outputs=[{"name": "same", "parameters": {"classification": 2}}]))),
        *(case(f"sequence_id {s!r}", "400", post(INFER, inference(parameters={"sequence_id": s}))) for s in (5, "x", 2**70)),
        *(case(f"priority {p!r}", "200 400", post(INFER, inference(parameters={"priority": p}))) for p in (-1, "x", 2**70, [], True)),
        *(case(f"binary_data_output {b!r}", "400", post(INFER, inference(parameters={"binary_data_output": b}))) for b in (5, "yes", [])),
        *(case(f"parameters {p!r}", "400", post(INFER, inference(parameters=p))) for p in (5, [], "x")),
    ]  # fmt: skip


def _codings() -> list[Case]:
    good = json.dumps(inference()).encode()
    packed = gzip.compress(good)
    coded = lambda coding, body: post(INFER, body, Content_Encoding=coding)  # noqa: E731
    return [
        case("gzip cut off", "400", coded("gzip", packed[:-6])),
        case("gzip that is not gzip", "400", coded("gzip", good)),
        case("gzip with a wrong checksum", "400", coded("gzip", packed[:-8] + b"\0" * 8)),
        case("gzip of gzip", "400", coded("gzip", gzip.compress(packed))),
        case("gzip with trailing bytes", "200 400", coded("gzip", packed + b"more")),
        case("deflate that is gzip", "400", coded("deflate", packed)),
        case("an empty gzip", "400", coded("gzip", b"")),
        case("gzip, gzip", "400", coded("gzip, gzip", packed)),
        case("an unknown coding", "400", coded("br", good)),
        case("a gzip bomb", "400 413", coded("gzip", lambda: bomb("gzip"))),
        case("a deflate bomb", "400 413", coded("deflate", lambda: bomb("deflate"))),
        case("8 gzip bombs at once", "400 413 503", many(8, coded("gzip", lambda: bomb("gzip")))),
        case("8 deflate bombs at once", "400 413 503", many(8, coded("deflate", lambda: bomb("deflate")))),
        case("4 gzip bombs at /load", "400 413 503", many(4, post("/v2/repository/models/chain/load", lambda: bomb("gzip"), Content_Encoding="gzip"))),
    ]  # fmt: skip


HEAD = b"POST /v2/models/chain/infer HTTP/1.1\r\nHost: HOST\r\n"


def guarded(token: str) -> list[Case]:
    """Return the cases for a server that requires a token."""
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: HOST\r\n"
    good, bad = (
        b"Authorization: Bearer " + token.encode() + b"\r\n",
        b"Authorization: Bearer wrong-wrong-wrong-wrong\r\n",
    )
    return [
        case("the right token", "200", raw(live + good + b"\r\n")),
        case("no token", "401", raw(live + b"\r\n")),
        case("two tokens, the right one first", "400 401 403", raw(live + good + bad + b"\r\n")),
        case("two tokens, the right one last", "400 401 403", raw(live + bad + good + b"\r\n")),
        case("a token of 60 KB", "401", raw(live + b"Authorization: Bearer " + b"a" * 60_000 + b"\r\n\r\n")),
        case("Basic that is not base64", "400 401", raw(live + b"Authorization: Basic !!!\r\n\r\n")),
        case("Basic that is not ASCII", "400 401", raw(live + b"Authorization: Basic \xff\xfe\r\n\r\n")),
        case("a token that is not ASCII", "400 401", raw(live + b"Authorization: Bearer \xff\xfe\r\n\r\n")),
        case("a body of 200 MB without a token", "401", raw(HEAD + b"Content-Length: 200000000\r\n\r\n{")),
    ]


def plain() -> list[Case]:
    """Return the cases for a server with default options."""
    return [
        *_times(), *_tensors(), *_bytes(), *_texts(), *_codings()
    ]  # fmt: skip
