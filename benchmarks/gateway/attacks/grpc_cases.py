"""Hostile requests over gRPC. Each case has a name, a request and the statuses that are right."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from benchmarks.gateway.attacks.http_cases import MIB
from benchmarks.gateway.attacks.target import (
    LONG_BYTES,
    Case,
    Target,
    case,
    later,
    together,
)

UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
RAW = np.full(32, 0.5, np.float32).tobytes()
_PREFIX = "/inference.GRPCInferenceService/"


def request(model: str = "chain", *, raw: tuple[bytes, ...] = (RAW,), **changes: Any) -> Any:
    """Make an inference request for the chain, with changes to its input."""
    made = pb.ModelInferRequest(model_name=model)
    given = {"name": "x", "datatype": "FP32", "shape": [1, 32], **changes}
    made.inputs.add(**given)
    made.raw_input_contents.extend(raw)
    return made


def strings(*, raw: tuple[bytes, ...] = (), count: int = 1) -> Any:
    """Make an inference request for the strings model."""
    return request("strings", raw=raw, name="s", datatype="BYTES", shape=[count])


def with_parameters(made: Any, **parameters: Any) -> Any:
    """Return the request with parameters: ``name=(kind, value)``."""
    for name, (kind, value) in parameters.items():
        setattr(made.parameters[name], f"{kind}_param", value)
    return made


def asking(made: Any, outputs: list[str], **parameters: Any) -> Any:
    """Return the request with outputs, all with the same parameters."""
    for name in outputs:
        output = made.outputs.add(name=name)
        for key, (kind, value) in parameters.items():
            setattr(output.parameters[key], f"{kind}_param", value)
    return made


def status(work: Callable[[], Any]) -> str:
    """Return the status of a call, and whether its message is too long or reports a bug."""
    try:
        work()
    except grpc.RpcError as error:
        words = error.details() or ""
        code: str = error.code().name
        return f"{code} in {len(words)} characters" if len(words) > LONG_BYTES else code
    return "OK"


def call(made: Any, method: str = "ModelInfer", *, timeout: float = 60.0, **options: Any) -> Callable[[Target], str]:
    """Make one call; a callable makes the request when it is needed."""

    def send(target: Target) -> str:
        with grpc.insecure_channel(target.grpc, options=UNLIMITED) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = made() if callable(made) else made
            return status(lambda: getattr(stub, method)(message, timeout=timeout, **options))

    return send


def message(data: bytes, method: str = "ModelInfer", **options: Any) -> Callable[[Target], str]:
    """Make one call whose message is arbitrary bytes."""

    def send(target: Target) -> str:
        with grpc.insecure_channel(target.grpc, options=UNLIMITED) as channel:
            ask = channel.unary_unary(_PREFIX + method)
            return status(lambda: ask(data, timeout=60, **options))

    return send


def many(count: int, send: Callable[[Target], str]) -> Callable[[Target], list[str]]:
    """Send the same request several times at once."""
    return lambda target: together(count, lambda _: send(target))


def _times() -> list[Case]:
    timed = lambda kind, value: call(with_parameters(request(), timeout=(kind, value)))  # noqa: E731
    return [
        case("deadline of 2^62 ns", "OK INVALID_ARGUMENT", call(request(), timeout=2**62 / 1e9)),
        case("deadline of 10^12 s", "OK INVALID_ARGUMENT DEADLINE_EXCEEDED", call(request(), timeout=1e12)),
        case("deadline of 1 us", "DEADLINE_EXCEEDED UNAVAILABLE", call(request(), timeout=1e-6)),
        case("64 rows in little time, 8 at once", "OK DEADLINE_EXCEEDED UNAVAILABLE", many(8, call(request(raw=(RAW * 64,), shape=[64, 32]), timeout=0.004))),
        case("timeout 2^63-1 us", "OK INVALID_ARGUMENT", timed("int64", 2**63 - 1)),
        case("timeout 2^62 us", "OK INVALID_ARGUMENT", timed("int64", 2**62)),
        case("timeout -2^63", "INVALID_ARGUMENT", timed("int64", -(2**63))),
        case("timeout -1", "INVALID_ARGUMENT", timed("int64", -1)),
        case("timeout 2^64-1, unsigned", "OK INVALID_ARGUMENT", timed("uint64", 2**64 - 1)),
        case("timeout inf", "INVALID_ARGUMENT", timed("double", float("inf"))),
        case("timeout nan", "INVALID_ARGUMENT", timed("double", float("nan"))),
        case("timeout '5'", "INVALID_ARGUMENT", timed("string", "5")),
        case("timeout true", "INVALID_ARGUMENT", timed("bool", True)),
        case("40 s after a deadline of 2^62 ns and a timeout of 2^63-1", "works", later(call(with_parameters(request(), timeout=("int64", 2**63 - 1)), timeout=2**62 / 1e9)), slow=True),
    ]  # fmt: skip


def _tensors() -> list[Case]:
    bad = "INVALID_ARGUMENT"
    shapes = [
        [0, 2**62],
        [2**31, 2**31],
        [2**32, 2**32],
        [-1, 32],
        [-(2**63)],
        [2**63 - 1, 2],
        [1] * 33,
        [],
        [1, 32, 1],
        [1] * 100_000,
    ]
    short = lambda shape: str(shape[:4]) + (f" of {len(shape)}" if len(shape) > 4 else "")  # noqa: E731

    def typed(field: str, values: Any, datatype: str = "FP32", model: str = "chain", **more: Any) -> Any:
        made = request(model, raw=(), datatype=datatype, **more)
        getattr(made.inputs[0].contents, field).extend(values)
        return made

    two_fields = typed("fp32_contents", [0.5] * 32)
    two_fields.inputs[0].contents.fp64_contents.extend([0.5] * 32)
    both = typed("fp32_contents", [0.5] * 32)
    both.raw_input_contents.append(RAW)
    text = {"name": "s", "shape": [1]}
    twice = request(raw=(RAW, RAW))
    twice.inputs.add(name="x", datatype="FP32", shape=[1, 32])
    return [
        *(case(f"shape {short(s)}, raw", bad, call(request(raw=(b"",), shape=s))) for s in shapes),
        *(case(f"shape {short(s)}, typed", bad, call(request(raw=(), shape=s))) for s in shapes[:4]),
        *(case(f"datatype {d[:8]!r}", bad, call(request(datatype=d))) for d in ("FP64", "BYTES", "FP31", "", "fp32", "D" * MIB)),
        *(case(f"{len(r)} raw contents of {[len(p) for p in r][:3]} bytes", bad, call(request(raw=r))) for r in ((RAW[:-1],), (RAW + b"x",), (b"",), (RAW, RAW), (RAW,) * 100)),
        case("raw and typed contents both", bad, call(both)),
        case("no contents", bad, call(request(raw=()))),
        case("contents in the wrong field", bad, call(typed("int_contents", [1] * 32))),
        case("contents in two fields", bad, call(two_fields)),
        case("too many typed contents", bad, call(lambda: typed("fp32_contents", [0.5] * 5_000_000))),
        case("a number too large for its type", bad, call(typed("int_contents", [2**31 - 1] * 32, "INT8"))),
        case("typed strings that are not UTF-8", bad, call(typed("bytes_contents", [b"\xff\xfe"], "BYTES", "strings", **text))),
        case("raw strings that are not UTF-8", bad, call(strings(raw=(struct.pack("<I", 2) + b"\xff\xfe",)))),
        case("raw strings longer than the data", bad, call(strings(raw=(struct.pack("<I", 2**32 - 1) + b"ab",)))),
        case("raw strings shorter than the data", bad, call(strings(raw=(struct.pack("<I", 1) + b"abc",)))),
        case("a billion empty strings", bad, call(strings(raw=(b"\0" * 8,), count=2**30))),
        case("an input twice", bad, call(twice)),
        case("an unknown input", bad, call(request(name="z"))),
    ]  # fmt: skip


def _texts() -> list[Case]:
    bad, long = "INVALID_ARGUMENT", "n" * (8 * MIB)
    parameters = lambda count: with_parameters(request(), **{f"p{n}": ("int64", n) for n in range(count)})  # noqa: E731

    def inputs(count: int) -> Any:
        made = pb.ModelInferRequest(model_name="chain")
        for number in range(count):
            made.inputs.add(name=f"x{number}", datatype="FP32", shape=[0])
        return made

    return [
        case("an input's name of 8 MB", bad, call(lambda: request(name=long))),
        case("a model's name of 8 MB", "NOT_FOUND INVALID_ARGUMENT", call(lambda: request(long))),
        case("a version of 8 MB", "NOT_FOUND INVALID_ARGUMENT", call(lambda: pb.ModelInferRequest(model_name="chain", model_version=long))),
        case("an output's name of 8 MB", bad, call(lambda: asking(request(), [long]))),
        case("an id of 8 MB", "OK INVALID_ARGUMENT", call(lambda: pb.ModelInferRequest(model_name="chain", id=long, inputs=request().inputs, raw_input_contents=[RAW]))),
        case("a parameter of 8 MB", "OK INVALID_ARGUMENT", call(lambda: with_parameters(request(), unknown=("string", long)))),
        case("a timeout of 8 MB", bad, call(lambda: with_parameters(request(), timeout=("string", long)))),
        case("100,000 parameters", "OK INVALID_ARGUMENT", call(lambda: parameters(100_000))),
        case("100,000 inputs", bad, call(lambda: inputs(100_000))),
        case("100,000 outputs, all the same", bad, call(lambda: asking(request(), ["y"] * 100_000))),
        case("100,000 outputs, all unknown", bad, call(lambda: asking(request(), [f"y{n}" for n in range(100_000)]))),
        case("an output twice", "OK INVALID_ARGUMENT", call(asking(request(), ["y", "y"]))),
        case("an output without a name", bad, call(asking(request(), [""]))),
        *(case(f"classification {v!r}", e, call(asking(request(), ["y"], classification=(k, v)))) for k, v, e in (("int64", -1, bad), ("int64", 2**62, "OK INVALID_ARGUMENT"), ("bool", True, bad), ("string", "3", bad), ("double", 1.5, bad))),
        *(case(f"sequence_id {v!r}", bad, call(with_parameters(request(), sequence_id=(k, v)))) for k, v in (("int64", 5), ("string", "x"))),
        *(case(f"priority {v!r}", "OK INVALID_ARGUMENT", call(with_parameters(request(), priority=(k, v)))) for k, v in (("int64", -1), ("uint64", 2**64 - 1), ("string", "x"))),
        case("an unknown model", "NOT_FOUND", call(request("none"))),
        case("no model", "NOT_FOUND INVALID_ARGUMENT", call(pb.ModelInferRequest())),
        case("a stage by itself", "UNIMPLEMENTED", call(request("chain.stage0"))),
        case("a stage of 2^70", "NOT_FOUND", call(request(f"chain.stage{2**70}"))),
        case("a stage of 5,000 digits", "NOT_FOUND", call(request("chain.stage" + "9" * 5000))),
    ]  # fmt: skip


def _sizes() -> list[Case]:
    def large(model: str, size: int) -> Callable[[Target], str]:
        return call(lambda: request(model, raw=(b"\0" * size,), shape=[1, 1]))

    def bomb(target: Target) -> str:
        return call(lambda: request("none", raw=(b"\0" * (250 * MIB),)), compression=grpc.Compression.Gzip)(target)

    busy = "RESOURCE_EXHAUSTED UNAVAILABLE"
    return [
        case("a message over the limit", "RESOURCE_EXHAUSTED", large("chain", 300 * MIB)),
        case("8 x 200 MB for an unknown model", f"NOT_FOUND {busy}", many(8, large("none", 200_000_000))),
        case("8 x 200 MB of a wrong shape", f"INVALID_ARGUMENT {busy}", many(8, large("chain", 200_000_000))),
        case("4 bombs of 250 MB in gzip", f"NOT_FOUND {busy}", many(4, bomb)),
        case("a message of random bytes", "INVALID_ARGUMENT", message(bytes(range(256)) * 10)),
        case("a message cut off", "INVALID_ARGUMENT", message(request().SerializeToString()[:-7])),
        case("an empty message", "NOT_FOUND INVALID_ARGUMENT", message(b"")),
        case("a name that is not UTF-8", "INVALID_ARGUMENT NOT_FOUND", message(b"\x0a\x02\xff\xfe")),
        case("groups nested 100,000 deep", "INVALID_ARGUMENT", message(b"\x0b" * 100_000)),
        case("an unknown method", "UNIMPLEMENTED", message(b"", "NoSuchMethod")),
    ]  # fmt: skip


def _metadata() -> list[Case]:
    return [
        case("metadata that is not UTF-8", "OK", call(request(), metadata=(("x-bin", b"\xff\xfe\x00"),))),
        case("an invalid traceparent", "OK", call(request(), metadata=(("traceparent", "garbage" * 1000),))),
        case("metadata of 100 KB", "RESOURCE_EXHAUSTED", call(request(), metadata=(("x", "a" * 100_000),))),
        case("1,000 pieces of metadata", "RESOURCE_EXHAUSTED OK", call(request(), metadata=tuple((f"x{n}", "a" * 100) for n in range(1000)))),
    ]  # fmt: skip


def _streams() -> list[Case]:
    def unread(target: Target) -> str:
        """Open eight streams that send 500 requests each and read nothing."""
        data = b"\0" * 128 * 2000
        with ExitStack() as stack:
            calls = []
            for _ in range(8):
                channel = stack.enter_context(grpc.insecure_channel(target.grpc, options=UNLIMITED))
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                sent = (request(raw=(data,), shape=[2000, 32]) for _ in range(500))
                calls.append(stub.ModelStreamInfer(sent, timeout=60))
            time.sleep(6)
            for one in calls:
                one.cancel()
        return "cancelled"

    def garbage(target: Target) -> list[str]:
        """Open a stream in which every other request is bad."""
        with grpc.insecure_channel(target.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            sent = [request() if n % 2 else request(shape=[0, 2**62]) for n in range(20)]
            try:
                return [
                    "error" if said.error_message else "answer"
                    for said in stub.ModelStreamInfer(iter(sent), timeout=30)
                ]
            except grpc.RpcError as error:
                return [error.code().name]

    def timed(target: Target) -> list[str]:
        """Open a stream with absurd timeouts."""
        with grpc.insecure_channel(target.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            sent = [with_parameters(request(), timeout=("int64", value)) for value in (2**63 - 1, -1, -(2**63))]
            try:
                return [
                    "error" if said.error_message else "answer"
                    for said in stub.ModelStreamInfer(iter(sent), timeout=30)
                ]
            except grpc.RpcError as error:
                return [error.code().name]

    def never_ends(target: Target) -> str:
        """A stream that says nothing; another that goes away."""
        ended = threading.Event()

        def nothing() -> Iterator[Any]:
            ended.wait(5)
            yield from ()

        with grpc.insecure_channel(target.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            found = [stub.ModelStreamInfer(nothing(), timeout=3) for _ in range(50)]
            codes = {status(lambda one=one: list(one)) for one in found}
            ended.set()
        return " ".join(sorted(codes))

    def cancelled(target: Target) -> str:
        with grpc.insecure_channel(target.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for number in range(100):
                one = stub.ModelInfer.future(request(raw=(RAW * 64,), shape=[64, 32]), timeout=30)
                time.sleep(number % 4 / 1000)
                one.cancel()
        return "cancelled"

    return [
        case("eight streams that do not read", "cancelled", unread),
        case("a stream of which half is bad", "error answer", garbage),
        case("a stream with absurd timeouts", "error answer", timed),
        case("50 silent streams", "DEADLINE_EXCEEDED", never_ends),
        case("100 calls cancelled midway", "cancelled", cancelled),
    ]  # fmt: skip


def _repository() -> list[Case]:
    def load(**parameters: Any) -> Any:
        made = pb.RepositoryModelLoadRequest(model_name="chain")
        for name, (kind, value) in parameters.items():
            setattr(made.parameters[name], f"{kind}_param", value)
        return made

    return [
        case("load with a config", "INVALID_ARGUMENT", call(load(config=("string", "{}")), "RepositoryModelLoad")),
        case("load with a file of 8 MB", "INVALID_ARGUMENT", call(lambda: load(**{"file:1/model.onnx": ("bytes", b"x" * 8 * MIB)}), "RepositoryModelLoad")),
        case("load with a parameter's name of 8 MB", "INVALID_ARGUMENT", call(lambda: load(**{"n" * 8 * MIB: ("bool", True)}), "RepositoryModelLoad")),
        case("load of an unknown model", "NOT_FOUND", call(pb.RepositoryModelLoadRequest(model_name="../../etc"), "RepositoryModelLoad")),
        case("unload of an unknown model", "NOT_FOUND", call(pb.RepositoryModelUnloadRequest(model_name="none"), "RepositoryModelUnload")),
        case("statistics of an unknown model", "NOT_FOUND", call(pb.ModelStatisticsRequest(name="none"), "ModelStatistics")),
        case("trace settings", "UNIMPLEMENTED", call(pb.TraceSettingRequest(), "TraceSetting")),
    ]  # fmt: skip


def guarded(token: str) -> list[Case]:
    """Return the cases for a server that requires a token."""
    good, bad = ("authorization", f"Bearer {token}"), ("authorization", "Bearer wrong-wrong-wrong-wrong")
    refused = "UNAUTHENTICATED INVALID_ARGUMENT PERMISSION_DENIED"
    return [
        case("the right token", "OK", call(request(), metadata=(good,))),
        case("no token", "UNAUTHENTICATED", call(request())),
        case("two tokens, the right one first", refused, call(request(), metadata=(good, bad))),
        case("two tokens, the right one last", refused, call(request(), metadata=(bad, good))),
        case("200 MB without a token", "UNAUTHENTICATED RESOURCE_EXHAUSTED", call(lambda: request(raw=(b"\0" * 200_000_000,)))),
        case("a message of random bytes without a token", "UNAUTHENTICATED INVALID_ARGUMENT", message(bytes(range(256)) * 10)),
        case("a stream without a token", "UNAUTHENTICATED", lambda target: _stream(target)),
    ]  # fmt: skip


def _stream(target: Target) -> str:
    with grpc.insecure_channel(target.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return status(lambda: list(stub.ModelStreamInfer(iter([request()]), timeout=20)))


def plain() -> list[Case]:
    """Return the cases for a server with default options."""
    return [
        *_times(), *_tensors(), *_texts(), *_sizes(), *_metadata(), *_streams(), *_repository()
    ]  # fmt: skip
