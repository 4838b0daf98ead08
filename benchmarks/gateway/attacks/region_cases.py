"""Hostile use of shared memory, on a server that lets clients register names that begin with ``hostile-``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from benchmarks.gateway.attacks.grpc_cases import MIB, call
from benchmarks.gateway.attacks.http_cases import INFER, inference, post, tensor
from benchmarks.gateway.attacks.target import Case, Target, case, own_region

REGISTER = "/v2/systemsharedmemory/region/{}/register"


def http() -> list[Case]:
    """Return the cases over HTTP."""

    def register(key: Any, size: Any = 4096, offset: Any = 0, name: str = "r") -> Callable[[Target], str]:
        def send(target: Target) -> str:
            found = post(REGISTER.format(name), {"key": key, "byte_size": size, "offset": offset})(target)
            post(f"/v2/systemsharedmemory/region/{name}/unregister", {})(target)
            return found

        return send

    def foreign(name: str) -> Callable[[Target], str]:
        """A file of this user that does not belong to a client."""

        def send(target: Target) -> str:
            file = f"/dev/shm/{name}"
            with open(file, "wb") as opened:  # noqa: PTH123
                opened.write(b"secret" * 1000)
            try:
                return register("/" + name, 100)(target)
            finally:
                os.unlink(file)  # noqa: PTH108

        return send

    def own(size: int, offset: int, byte_size: int) -> Callable[[Target], str]:
        def send(target: Target) -> str:
            key, file = own_region(size)
            try:
                return register(key, byte_size, offset)(target)
            finally:
                file.unlink()

        return send

    def used(parameters: dict[str, Any], *, shrink: bool = False, output: bool = False) -> Callable[[Target], str]:
        """Send an inference request that reads or writes a region of 4,096 bytes."""

        def send(target: Target) -> str:
            key, file = own_region(4096)
            try:
                done = post(REGISTER.format("own"), {"key": key, "byte_size": 4096, "offset": 0})(target)
                if done != "200":
                    return f"register: {done}"
                if shrink:
                    os.truncate(file, 10)
                place = {"shared_memory_region": "own", **parameters}
                if output:
                    return post(INFER, inference(outputs=[{"name": "y", "parameters": place}]))(target)
                return post(INFER, inference(tensor(data=..., parameters=place)))(target)
            finally:
                post("/v2/systemsharedmemory/region/own/unregister", {})(target)
                file.unlink()

        return send

    keys: list[Any] = ["/etc/passwd", "../etc/passwd", "/../etc/passwd", "..", ".", "/", "", "a\0b", "a/b", "x" * 1000, 5, None, ["a"], "/proc/self/mem", "\ud800"]  # fmt: skip
    size, offset = "shared_memory_byte_size", "shared_memory_offset"
    return [
        *(case(f"register key {str(key)[:20]!r}", "400 403 404", register(key)) for key in keys),
        case("register a file of the user's", "403", foreign("someone-else-0")),
        case("register a name of the runtime", "403", foreign("onnxsplit-0")),
        *(case(f"register offset {o!r}", "400", own(4096, o, 10)) for o in (-1, 2**63, 2**70)),
        *(case(f"register {s!r} bytes", "400", own(4096, 0, s)) for s in (-1, 0, 4097, 2**63, 2**70)),
        case("register a sum that overflows", "400", own(4096, 2**62, 2**62 + 2**61)),
        case("register true bytes", "400", register("/hostile-none", True)),
        case("register a name of 50 KB", "400 403 404", register("/hostile-none", name="n" * 50_000)),
        case("an input at it", "200", used({size: 128})),
        *(case(f"an input at it, {p}", "400", used(p)) for p in ({size: 4097}, {size: 128, offset: 4000}, {size: 2**63}, {size: 128, offset: 2**63}, {size: -1}, {size: 128, offset: -1}, {size: "128"}, {size: 2**62, offset: 2**62}, {})),
        case("an input in a region that shrank", "400", used({size: 128}, shrink=True)),
        case("an output in a region that shrank", "400", used({size: 128}, shrink=True, output=True)),
        case("an output that is larger than its region", "400", used({size: 12}, output=True)),
        case("a region that is not registered", "400 404", post(INFER, inference(tensor(data=..., parameters={"shared_memory_region": "none", size: 128})))),
        case("a region that is a number", "400", post(INFER, inference(tensor(data=..., parameters={"shared_memory_region": 5, size: 128})))),
        case("CUDA shared memory", "501", post("/v2/cudasharedmemory/region/r/register", {"raw_handle": {"b64": "AA=="}, "device_id": 0, "byte_size": 8})),
    ]  # fmt: skip


def over_grpc() -> list[Case]:
    """Return the cases over gRPC."""

    def register(key: str, size: int, offset: int = 0) -> Callable[[Target], str]:
        made = pb.SystemSharedMemoryRegisterRequest(name="g", key=key, offset=offset, byte_size=size)
        return call(made, "SystemSharedMemoryRegister")

    def own(size: int, offset: int) -> Callable[[Target], str]:
        def send(target: Target) -> str:
            key, file = own_region(4096)
            try:
                return register(key, size, offset)(target)
            finally:
                call(pb.SystemSharedMemoryUnregisterRequest(name="g"), "SystemSharedMemoryUnregister")(target)
                file.unlink()

        return send

    bad = "INVALID_ARGUMENT"
    return [
        *(case(f"register key {key[:20]!r}", "INVALID_ARGUMENT NOT_FOUND PERMISSION_DENIED", register(key, 10)) for key in ("/etc/passwd", "../x", "", "/", "a\0b", "k" * MIB)),
        case("register offset 2^63", bad, own(10, 2**63)),
        case("register 2^64-1 bytes", bad, own(2**64 - 1, 0)),
        case("register a sum that overflows", bad, own(2**63, 2**63)),
        case("status of a region of 8 MB", "NOT_FOUND", call(lambda: pb.SystemSharedMemoryStatusRequest(name="n" * 8 * MIB), "SystemSharedMemoryStatus")),
        case("CUDA shared memory", "UNIMPLEMENTED", call(pb.CudaSharedMemoryRegisterRequest(name="c", byte_size=8), "CudaSharedMemoryRegister")),
    ]  # fmt: skip
