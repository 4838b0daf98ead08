"""How much time does a hop between two stages add, by the size of the tensor?

Our time is from the end of a session's run to the start of the next session's, by the clocks of the nodes, one request
at a time; the first session writes the tensor where the second reads it. It is compared, in turns of the same run, with
a bare ZeroMQ message over ipc and over tcp (one way, zero-copy, from the send to the receive), a copy of as many bytes
in one process, a Unix datagram as large as a header, and, if the interpreter named by --python has them (the extra
``peers``), iceoryx2 (loan, send, notify; wait, receive) and a Ray actor call with the tensor as its argument. The
figures are medians in microseconds.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np

from benchmarks import harness
from benchmarks.example_models import one_tensor
from benchmarks.peers.started import Unavailable, process
from runtime import Pipeline

TAKES = "3 min"

SIZES = {"64 B": 64, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "8 MiB": 8 << 20, "64 MiB": 64 << 20}
ROUNDS = 5


def ours(pipeline: Pipeline, repeats: int) -> list[float]:
    """Measure the microseconds from one session to the next, one request at a time."""
    given = {"x": np.ones(1, np.float32)}
    before = len(pipeline.traced)
    for _ in range(repeats):
        pipeline.run(given)
    times = []
    for traced in pipeline.traced[before:]:
        first, second = sorted(traced.visits, key=lambda visit: visit.stage)
        times.append((second.started_ns - first.ended_ns) / 1e3)
    return times


def memcpy(size: int, repeats: int) -> list[float]:
    """Measure the microseconds of a copy between two private memories."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter_ns()
        np.copyto(target, source)
        times.append((time.perf_counter_ns() - begun) / 1e3)
    return times


def measure(size: int, repeats: int, python: str) -> dict[str, float | str]:
    """Return the median of each contender in microseconds, taken in turns, and why contenders were skipped."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch, ExitStack() as stack:
        pipeline = stack.enter_context(
            Pipeline.launch(one_tensor(size, Path(scratch)), trace=True, threads=1, mode="sync")
        )
        contenders: dict[str, Callable[[], list[float]]] = {
            "ours": lambda: ours(pipeline, repeats),
            "memcpy": lambda: memcpy(size, repeats),
        }
        skipped: dict[str, float | str] = {}
        for kind, interpreter in (
            ("zmq-ipc", sys.executable), ("zmq-tcp", sys.executable), ("datagram", sys.executable),
            ("iceoryx2", python), ("ray", python),
        ):  # fmt: skip
            try:
                peer = stack.enter_context(process("senders.py", interpreter, kind, size))
                contenders[kind] = lambda peer=peer: peer.ask(repeats)
            except Unavailable as error:
                skipped[kind] = f"skipped: {error}"
        times = harness.in_turns(contenders, ROUNDS)
    return skipped | {name: statistics.median(itertools.chain(*taken)) for name, taken in times.items()}


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--repeats", type=int, default=200, help="transfers of each contender; a quarter from 8 MiB on")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the extra peers")
    given = parser.parse_args()
    names = ["ours", "zmq-ipc", "zmq-tcp", "memcpy", "datagram", "iceoryx2", "ray"]
    report = harness.Report(given, size="6", **dict.fromkeys(names, "9.1f"), **{"ours / zmq-ipc": "13.2f"})
    for label, size in SIZES.items():
        repeats = given.repeats if size < 8 << 20 else given.repeats // 4
        times = measure(size, max(5, repeats // ROUNDS), given.python)
        shown = {name: time if isinstance(time, float) else None for name, time in times.items()}
        report.row({"size": label, "bytes": size, **shown, "ours / zmq-ipc": times["ours"] / times["zmq-ipc"]})
        for name, value in times.items():
            if isinstance(value, str):
                report.note(f"  {name}: {value}")


if __name__ == "__main__":
    main()
