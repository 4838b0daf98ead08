"""What moving a tensor between two processes of this host costs, by real transfers over the transport of the nodes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from onnxsplit.cluster import Link
from onnxsplit.session import quiet_environment
from runtime.errors import PipelineError
from runtime.transport import Outlet, Sockets

_SIZES = (64, 1 << 20, 8 << 20)
_REPEATS = 60
_DEADLINE_S = 20.0


def measure_link() -> Link:
    """Start a process, send it messages, and time its answers.

    A crossing costs both ends; each is charged with half of it, which is what a :class:`~onnxsplit.cluster.Link` means.

    Raises:
        PipelineError: the other process did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder, Sockets() as sockets:
        address = f"ipc://{Path(folder) / 'link'}"
        command = [sys.executable, "-P", "-m", "runtime.link", address]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=quiet_environment())
        try:
            outlet = sockets.connect(address, receive=True)
            times = [_round_trip_ns(sockets, outlet, size) for size in _SIZES]
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
    one_way = times[0] / 2
    carried = max(1.0, times[-1] - times[0])
    return Link(latency_ns=round(one_way / 2), bytes_per_s=round(2 * (_SIZES[-1] - _SIZES[0]) / carried * 1e9))


def _round_trip_ns(sockets: Sockets, outlet: Outlet, size: int) -> float:
    payload = bytes(size)
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter_ns()
        outlet.send(b"tensor", [payload])
        while outlet.receive() is None:
            if not sockets.wait(_DEADLINE_S):
                raise PipelineError(f"no answer to a message of {size} bytes within {_DEADLINE_S:g} s on this host")
        times.append(time.perf_counter_ns() - begun)
    return statistics.median(times)


def _answer(address: str) -> None:
    """The other end: answers every message with a short one, until it is killed or its parent is gone."""
    with Sockets() as sockets:
        inlet = sockets.bind(address)
        sockets.watch(sys.stdin.fileno())
        while sys.stdin.fileno() not in sockets.wait(_DEADLINE_S):
            while (message := inlet.receive()) is not None:
                inlet.send(message[0], b"done")


if __name__ == "__main__":
    _answer(sys.argv[1])
