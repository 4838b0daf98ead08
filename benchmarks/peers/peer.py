"""The code that the peers share: plans, sessions of stages, tensors as bytes, and the measuring loop on stdin."""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import json
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

Tensors = dict[str, np.ndarray]

LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Stage:
    """One stage file, the inputs and outputs of its session, and the tensors that enter and leave it in a chain."""

    file: str
    level: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arrives: tuple[str, ...]
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The stages in order, and the tensors the caller sends and gets."""

    folder: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read plan.json; from back to front, each stage gets the tensors that it and all later stages need."""
        plan = json.loads((folder / "plan.json").read_text())
        outputs = leaves = tuple(plan["outputs"])
        stages: list[Stage] = []
        for spec in reversed(plan["stages"]):
            passing = [name for name in leaves if name not in spec["outputs"]]
            arrives = tuple(dict.fromkeys([*spec["inputs"], *passing]))
            file = str((folder / spec["file"]).resolve())
            level = spec["optimization_level"]
            stages.insert(0, Stage(file, level, tuple(spec["inputs"]), tuple(spec["outputs"]), arrives, leaves))
            leaves = arrives
        return cls(folder.resolve(), tuple(plan["inputs"]), outputs, tuple(stages))


class Runner:
    """One ONNX Runtime session on one thread, for one stage."""

    def __init__(self, stage: Stage) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = LEVELS[stage.level]
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.stage = stage
        self.session = ort.InferenceSession(stage.file, options, providers=["CPUExecutionProvider"])

    def made(self, tensors: Tensors) -> Tensors:
        """Run the session and return its outputs by name."""
        feeds = {name: tensors[name] for name in self.stage.inputs}
        names = self.stage.outputs
        return dict(zip(names, self.session.run(list(names), feeds), strict=True))

    def __call__(self, tensors: Tensors) -> Tensors:
        """Run the session, and return its outputs with the tensors that only later stages or the caller read."""
        known = tensors | self.made(tensors)
        return {name: known[name] for name in self.stage.leaves}


def raw(array: np.ndarray) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def pack(tensors: Tensors) -> list[bytes | memoryview]:
    """Return a header (names, types, shapes), then the bytes of each tensor."""
    header = [(name, array.dtype.str, array.shape) for name, array in tensors.items()]
    return [msgspec.msgpack.encode(header), *map(raw, tensors.values())]


def unpack(frames: Sequence[bytes | memoryview]) -> Tensors:
    """Return the tensors of packed frames; they share the frames' memory."""
    header = msgspec.msgpack.decode(frames[0], type=list[tuple[str, str, tuple[int, ...]]])
    rows = zip(header, frames[1:], strict=True)
    return {name: np.frombuffer(frame, dtype).reshape(shape) for (name, dtype, shape), frame in rows}


def join(tensors: Tensors) -> bytes:
    """Return packed tensors as one message: the header's length, the header, the data."""
    header, *data = pack(tensors)
    return b"".join([len(header).to_bytes(8, "little"), header, *data])


def split(message: bytes) -> Tensors:
    """Return the tensors of a joined message; they share its memory."""
    view = memoryview(message)
    end = 8 + int.from_bytes(view[:8], "little")
    frames = [view[8:end]]
    for _, dtype, shape in msgspec.msgpack.decode(frames[0], type=list[tuple[str, str, tuple[int, ...]]]):
        start, end = end, end + np.dtype(dtype).itemsize * int(np.prod(shape))
        frames.append(view[start:end])
    return unpack(frames)


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Peer(ABC):
    """A running pipeline, as its caller sees it."""

    @abstractmethod
    def submit(self, tensors: Tensors) -> None:
        """Send one request, and do not wait for its answer."""

    @abstractmethod
    def take(self) -> Tensors:
        """Wait for the next answer."""


# Starts a system for a plan; it's given every tensor of one example run and the number of requests in flight.
Start = Callable[[Plan, Tensors, int], AbstractContextManager[Peer]]


def drive(peer: Peer, request: Tensors, inflight: int, seconds: float) -> dict[str, float]:
    """Keep requests in flight; time starts when the first batch is answered, and ends with the last counted answer.

    All requests are equal, so each answer counts for the oldest unanswered one.
    """
    sent: deque[float] = deque()

    def submit() -> None:
        sent.append(time.perf_counter())
        peer.submit(request)

    for _ in range(inflight):
        submit()
    for _ in range(inflight):
        peer.take()
        sent.popleft()
        submit()
    times, spent, start = [], 0.0, time.perf_counter()
    while spent < seconds:
        peer.take()
        now = time.perf_counter()
        times.append(now - sent.popleft())
        spent = now - start
        submit()
    for _ in range(inflight):
        peer.take()
    times.sort()
    p99_ms = 1e3 * times[len(times) * 99 // 100]
    return {"requests": len(times), "seconds": spent, "p50_ms": 1e3 * times[len(times) // 2], "p99_ms": p99_ms}


def check(peer: Peer, plan: Plan, request: Tensors, known: Tensors) -> None:
    """Exit unless the pipeline's answer equals that of its stages run in turn in this process."""
    peer.submit(request)
    answer = peer.take()
    for name in plan.outputs:
        if name not in answer or answer[name].shape != known[name].shape:
            sys.exit(f"output {name} is missing or has another shape")
        if not np.allclose(answer[name], known[name], rtol=1e-3, atol=1e-5, equal_nan=True):
            sys.exit(f"output {name} differs from that of the stages run in turn")


def main(start: Start) -> None:
    """Run a peer by its command line: print `ready`, then an answer for every line of stdin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--inflight", type=int, default=4)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what any system prints, here or in its processes, goes to stderr

    plan = Plan.read(arguments.plan)
    with np.load(arguments.inputs) as stored:
        request = {name: stored[name] for name in plan.inputs}
    known = dict(request)
    for stage in plan.stages:
        known |= Runner(stage).made(known)
    with start(plan, known, arguments.inflight) as peer:
        check(peer, plan, request, known)
        print("ready", file=answers)
        for line in sys.stdin:
            print(json.dumps(drive(peer, request, arguments.inflight, float(line))), file=answers)
