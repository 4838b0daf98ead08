"""What breaks when garbage arrives on every link of a pipeline, and how much memory does it take?

First, the decoders alone get random bytes, and real messages with bytes changed, removed, doubled or spliced. An
exception other than that of the protocol is a crash. Then the nodes and the coordinator of a pipeline on tcp without
keys get the same over ZeroMQ, raw bytes over TCP, and headers that claim 1 GB. In between, the pipeline's answers are
compared.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import build
import numpy as np
import psutil
import zmq

from benchmarks import harness
from onnxsplit.planning.planner import partition
from onnxsplit.session import quiet_environment
from runtime import Pipeline
from runtime.errors import ProtocolError
from runtime.wire import codec
from runtime.wire.messages.control import (
    Assign,
    Beat,
    Cancel,
    Hello,
    NodeBeat,
    Peer,
    Ready,
    Refused,
    Share,
    Stop,
    Trust,
    Wire,
)
from runtime.wire.messages.data import Failed, Fragment, Receipt, Started, TensorHead, TensorPlace, Visit

TAKES = "3 min"

GIB = 1 << 30
FAR = 1 << 40  # numbers of requests that do not exist


def samples() -> list[tuple[bytes, list[bytes]]]:
    """Return one encoded message of each kind, with its frames."""
    arrays = {"x": np.ones((4, 32), np.float32), "s": np.array([["a", "größer"]], dtype=object)}
    heads, frames = codec.encode_tensors(arrays)
    large, large_frames = codec.encode_tensors({"x": np.ones((1000, 32), np.float32)})
    visit = Visit(0, 0, 1, 2, 3, 4, 5, 6)
    place = TensorHead("x", "float32", (4, 32), TensorPlace(3, 5, 1 << 22))
    peer = Peer(1, 0, 0, True, "tcp://127.0.0.1:1", "", None, "")
    messages: list[tuple[Any, list[Any]]] = [
        (Fragment(FAR, 1, 0, 1000, 0, 0, -1, (0, 0), ("y",), heads, (visit,)), frames),
        (Fragment(FAR + 1, 1, 0, 1000, 5, 0, -1, (0, 0), ("y",), large, ()), large_frames),
        (Fragment(FAR + 2, 1, 0, 1000, 0, 1, 0, (0, 0), ("y",), (place,), (visit, visit)), []),
        (Failed(3, 1, 0, 0, "why"), []),
        (Started(3, 1, 1), []),
        (Receipt(1, 1000, 2000, 0, 5, 6), []),
        (Hello(3, 0, 1, "host", "tcp://127.0.0.1:1", 0, 0, "", None, ""), []),
        (Ready((1, 2)), []),
        (Refused("no"), []),
        (NodeBeat(1, 2, 3, 4), []),
        (Assign("id", "/nowhere", "", 0, 0, "cpu", 1, False, False, 1, 1, "task"), []),
        (Wire(1, 1, (peer,)), []),
        (Share((1,)), []),
        (Trust(("k" * 40,)), []),
        (Cancel(1, 1), []),
        (Beat(5), []),
        (Stop("so"), []),
    ]
    return [(codec.encode(message), [bytes(frame) for frame in frames]) for message, frames in messages]


def mutated(source: random.Random, whole: list[bytes]) -> bytes:
    """Return a message that is nearly right, or random bytes."""
    data = bytearray(source.choice(whole))
    for _ in range(source.choice((1, 1, 2, 5))):
        kind, at = source.randrange(6), source.randrange(len(data) + 1)
        if kind == 0 and data:
            data[at % len(data)] = source.randrange(256)
        elif kind == 1:
            del data[at : at + source.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = source.randbytes(source.randrange(1, 9))
        elif kind == 3:
            other = source.choice(whole)
            data[at:] = other[source.randrange(len(other)) :]
        elif kind == 4:  # sizes and counts that claim a lot
            data[at : at + 5] = b"\xdd\x40\x00\x00\x00" if source.random() < 0.5 else b"\xce\x40\x00\x00\x00"
        else:
            data = bytearray(source.randbytes(source.randrange(200)))
    return bytes(data)


def no_memory(_place: TensorPlace, _dtype: str, _shape: Any) -> Any:
    """Refuse every position in shared memory: no arena is mapped here."""
    raise ProtocolError("not mapped")


def decode(header: bytes, frames: list[bytes]) -> str:
    """Return whether any decoder accepts a message."""
    outcomes = []
    for decoder in (codec.decode_data, codec.decode_node_control, codec.decode_coordinator_control):
        try:
            said = decoder(header)
            if isinstance(said, Fragment):
                codec.decode_tensors(said.tensors, frames, no_memory)
            outcomes.append("taken")
        except ProtocolError:
            outcomes.append("refused")
    return "taken" if "taken" in outcomes else "refused"


def decoders(cases: int, source: random.Random) -> dict[str, Any]:
    """Count how many of the cases the decoders accept, refuse, or crash on."""
    whole = [header for header, _ in samples()]
    frames = [frame for _, own in samples() for frame in own] + [b"", bytes(100)]
    seen: dict[str, int] = {"taken": 0, "refused": 0, "crashed": 0}
    before = psutil.Process().memory_info().rss
    for number in range(cases):
        header = mutated(source, whole)
        attached = source.choices(frames, k=source.randrange(3))
        try:
            seen[decode(header, attached)] += 1
        except Exception as error:  # the benchmark looks for exactly such errors
            seen["crashed"] += 1
            if seen["crashed"] <= 5:
                print(f"case {number}: {type(error).__name__}: {error}", file=sys.stderr)
    return {**seen, "memory_mib": (psutil.Process().memory_info().rss - before) / 2**20}


def live(sent: int, source: random.Random) -> dict[str, Any]:
    """Send a number of messages to real processes."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = Path(scratch) / "m.plan"
        partition(build.save(build.chain(4), Path(scratch)), stages=2, out=plan, costs="analytic")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
        with (Path(scratch) / "log").open("wb") as log:
            nodes = [subprocess.Popen(command, stderr=log, env=quiet_environment()) for _ in range(2)]
            with Pipeline.listen(plan, bind=address, start_timeout=60) as pipeline:
                figures = attack(pipeline, nodes, address, sent, source)
                figures["incidents"] = [incident.story[:200] for incident in pipeline.incidents]
            figures["node_exit_codes"] = [node.wait(20) for node in nodes]
        figures["dropped_by_nodes"] = (Path(scratch) / "log").read_text(errors="replace").count("dropped")
    return figures


def attack(
    pipeline: Pipeline, nodes: list[subprocess.Popen[bytes]], control: str, sent: int, source: random.Random
) -> dict[str, Any]:
    """Send garbage on all links, and check in between that the pipeline still answers correctly."""
    one = {"x": np.ones((2, 32), np.float32)}
    wanted = pipeline.run(one)["y"]
    processes = [psutil.Process(node.pid) for node in nodes] + [psutil.Process()]
    before = [process.memory_info().rss for process in processes]
    peak = list(before)
    addresses = [control, *(node.address or "" for node in pipeline.nodes)]
    whole, frames = [header for header, _ in samples()], [b"", bytes(100), bytes(512)]
    wrong = 0

    def look() -> None:
        nonlocal wrong
        peak[:] = [max(p, process.memory_info().rss) for p, process in zip(peak, processes, strict=True)]
        wrong += not np.array_equal(pipeline.run(one, timeout=60)["y"], wanted)

    context = zmq.Context()
    dealers = [context.socket(zmq.DEALER) for _ in addresses]
    for dealer, address in zip(dealers, addresses, strict=True):
        dealer.linger = 0
        dealer.connect(address)
    for number in range(sent):
        header = mutated(source, [message for message in whole if message[2:6] != b"stop"])
        attached = source.choices(frames, k=source.randrange(3))
        source.choice(dealers).send_multipart([header, *attached])
        if number % 500 == 0:
            look()
    for address in addresses:  # frames and headers that claim 1 GB
        for claim in (b"\x02" + GIB.to_bytes(8, "big"), b"\x03" + GIB.to_bytes(8, "big")):
            raw(address, greeting() + claim + bytes(1 << 20))
        for _ in range(200):
            raw(address, source.randbytes(source.randrange(300)))
    shape = TensorHead("x", "float32", (GIB // 4,), None)
    strings = TensorHead("x", "string", (GIB // 4,), None)
    empty = TensorHead("x", "float32", (0, 1 << 62, 1 << 62), None)
    for head in (shape, strings, empty):
        lie = codec.encode(Fragment(FAR + 9, 1, 0, 1000, 0, 0, -1, (0, 0), ("y",), (head,), ()))
        for dealer in dealers:
            dealer.send_multipart([lie, bytes(64)])
    time.sleep(1)
    look()
    for dealer in dealers:
        dealer.close()
    context.term()
    return {
        "messages": sent,
        "raw connections": len(addresses) * 202,
        "wrong or missing answers": wrong,
        "alive": [node.poll() is None for node in nodes],
        "memory grew by MiB at most (nodes, caller)": [
            round((p - b) / 2**20, 1) for p, b in zip(peak, before, strict=True)
        ],
    }


def greeting() -> bytes:
    """Return the first bytes of a ZeroMQ peer without keys, up to its first message."""
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    return (
        b"\xff"
        + bytes(8)
        + b"\x7f\x03\x00"
        + b"NULL".ljust(20, b"\x00")
        + bytes(32)
        + b"\x04"
        + bytes([len(ready)])
        + ready
    )


def raw(address: str, data: bytes) -> None:
    """Send bytes over TCP."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(data)
    except OSError:
        pass  # the peer closed the connection, as it should


def main() -> None:
    """Print the figures; exit with 1 if there was a crash."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--cases", type=int, default=200_000, help="number of messages for the decoders")
    parser.add_argument("--sent", type=int, default=20_000, help="number of messages to a running pipeline")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = random.Random(given.seed)
    report = harness.Report(given)
    alone, running = decoders(given.cases, source), live(given.sent, source)
    figures = {"decoders": alone, "live": running}
    report.row(figures, json.dumps(figures, indent=2))
    crashed = alone["crashed"] or not all(running["alive"]) or running["wrong or missing answers"]
    sys.stdout.flush()
    os._exit(1 if crashed else 0)


if __name__ == "__main__":
    main()
