"""What a tensor's way from one stage to the next adds, by size.

    python benchmarks/data_path/hop.py [--repeats 200] [--python PYTHON] [--json]

Ours: from the end of a stage's session to the start of the next one's, by the nodes' own clocks, one request at a
time; the tensor is written by the first session where the second reads it. Beside it, in turns of the same run: a bare
ZeroMQ message over ipc and over tcp (one way, zero-copy, from the send to the receive), a copy of as many bytes in
one process, a Unix datagram as large as a header, and, where the interpreter named by ``--python`` has them (the extra
``peers``), iceoryx2 (loan, send, notify; wait, receive) and a Ray actor call with the tensor as its argument.
Microseconds, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT / "benchmarks")]

import numpy as np
from environment import ended, environment, environment_line
from onnx import TensorProto, helper, numpy_helper, save_model

from onnxsplit.planning.planner import partition
from onnxsplit.session import quiet_environment
from runtime import Pipeline

SIZES = {"64 B": 64, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "8 MiB": 8 << 20, "64 MiB": 64 << 20}
ROUNDS = 5


def plan_of(size: int, folder: Path) -> Path:
    """A stage that makes a tensor of so many bytes of a number, and one that reads a little of it."""
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("Slice", ["wide", "zero", "one"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("shape", [size // 4]), ("zero", [0]), ("one", [1]))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "hop", ends[:1], ends[1:], constants)
    save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(folder / "m.onnx")
    )
    partition(folder / "m.onnx", out=folder / "m.plan", cut_at=["wide"], costs="analytic")
    return folder / "m.plan"


def ours(pipeline: Pipeline, repeats: int) -> list[float]:
    """Microseconds from session to session, a request at a time."""
    given = {"x": np.ones(1, np.float32)}
    before = len(pipeline.traced)
    for _ in range(repeats):
        pipeline.run(given)
    found = []
    for traced in pipeline.traced[before:]:
        first, second = sorted(traced.visits, key=lambda visit: visit.stage)
        found.append((second.started_ns - first.ended_ns) / 1e3)
    return found


def memcpy(size: int, repeats: int) -> list[float]:
    """Microseconds of a copy from one private memory to another."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    found = []
    for _ in range(repeats):
        begun = time.perf_counter_ns()
        np.copyto(target, source)
        found.append((time.perf_counter_ns() - begun) / 1e3)
    return found


class Unavailable(Exception):
    """What is to be compared with is not installed."""


@contextmanager
def peer(kind: str, size: int, python: str) -> Iterator[Callable[[int], list[float]]]:
    """A sender in a process of its own, which has a receiver in another."""
    command = [python, str(PEERS / "senders.py"), kind, str(size)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet_environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def answer() -> bytes:
        line = process.stdout.readline()
        if not line:
            words = process.stderr.read().decode(errors="replace").strip().splitlines()
            raise Unavailable(words[-1] if words else "it ended without a word")
        return line

    def ask(repeats: int) -> list[float]:
        process.stdin.write(b"%d\n" % repeats)
        process.stdin.flush()
        return json.loads(answer())

    try:
        answer()
        yield ask
    finally:
        ended(process, 20)
        process.stdout.close()
        process.stderr.close()


def measure(size: int, repeats: int, python: str) -> dict[str, float | str]:
    """Medians of all contenders, in turns."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch, ExitStack() as stack:
        pipeline = stack.enter_context(
            Pipeline.launch(plan_of(size, Path(scratch)), trace=True, threads=1, mode="sync")
        )
        contenders: dict[str, Callable[[int], list[float]]] = {
            "ours": lambda count: ours(pipeline, count),
            "memcpy": lambda count: memcpy(size, count),
        }
        found: dict[str, float | str] = {}
        for kind, interpreter in (
            ("zmq-ipc", sys.executable), ("zmq-tcp", sys.executable), ("datagram", sys.executable),
            ("iceoryx2", python), ("ray", python),
        ):  # fmt: skip
            try:
                contenders[kind] = stack.enter_context(peer(kind, size, interpreter))
            except Unavailable as error:
                found[kind] = f"skipped: {error}"
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(ROUNDS + 1):
            for name, run in contenders.items():
                took = run(max(5, repeats // ROUNDS))
                if number:  # the first warms up
                    times[name] += took
    return found | {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--python", default=sys.executable, help="an interpreter with the extra peers")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = ["ours", "zmq-ipc", "zmq-tcp", "memcpy", "datagram", "iceoryx2", "ray"]
    if not given.json:
        print(environment_line())
        print(f"{'us':8}" + "".join(f"{name:>10}" for name in names) + f"{'ours / zmq-ipc':>16}")
    for label, size in SIZES.items():
        row = measure(size, given.repeats if size < 8 << 20 else given.repeats // 4, given.python)
        if given.json:
            print(json.dumps({"size_bytes": size, "us": row, "environment": environment()}), flush=True)
            continue
        cells = "".join(f"{row[n]:10.1f}" if isinstance(row.get(n), float) else f"{'-':>10}" for n in names)
        print(f"{label:8}{cells}{row['ours'] / row['zmq-ipc']:16.2f}", flush=True)
        for name, value in row.items():
            if isinstance(value, str):
                print(f"  {name}: {value}", file=sys.stderr)


if __name__ == "__main__":
    main()
