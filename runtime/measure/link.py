"""Measures the cost of passing a tensor between two processes on this host, over the data link that nodes use."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxsplit.cluster import Link
from onnxsplit.session import quiet_environment, without_interrupts
from runtime.errors import PipelineError
from runtime.home import private_folder
from runtime.memory.arena import Arena
from runtime.wire.links import Inlet
from runtime.wire.sockets import Sockets

_COPIED_BYTES = 8 << 20
_REPEATS = 100
_DEADLINE_S = 20.0


def measure_link() -> Link:
    """Measure the link between two processes on this host.

    Starts a second process and times round trips of messages, and times copies into shared memory.

    The time of a message is shared equally by its sender and its receiver, as :class:`~onnxsplit.cluster.Link` defines
    it. Tensors are read in place, so their bytes cost at most a copy into shared memory, which is needed only for
    inputs and for outputs whose shapes are not known before the run.

    Raises:
        PipelineError: the other process did not answer.
    """
    home = private_folder()
    process = None
    try:
        with Sockets() as sockets:
            answers = sockets.inlet(f"ipc://{home / 'here'}", shortcut=home / "here.fragments")
            command = [sys.executable, "-P", "-m", "runtime.measure.link", str(home)]
            with without_interrupts():
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=quiet_environment())
            _receive(sockets, answers)  # the other process is ready
            outlet = sockets.connect(f"ipc://{home / 'there'}", shortcut=str(home / "there.fragments"))

            def ask() -> None:
                outlet.send(bytes(200))
                _receive(sockets, answers)

            crossing_ns = _median_ns(ask) / 2
    finally:
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        shutil.rmtree(home, ignore_errors=True)
    return Link(latency_ns=round(crossing_ns / 2), bytes_per_s=round(2 * _COPIED_BYTES / _copy_ns() * 1e9))


def _receive(sockets: Sockets, inlet: Inlet) -> None:
    while inlet.receive(ready := sockets.wait(_DEADLINE_S)) is None:
        if not ready:
            raise PipelineError(f"no answer to a message within {_DEADLINE_S:g} s on this host")


def _copy_ns() -> float:
    arena = Arena(_COPIED_BYTES)
    block = arena.reserve(_COPIED_BYTES)
    assert block is not None
    shared = arena.array(block, 0, "uint8", (_COPIED_BYTES,))
    private = np.ones(_COPIED_BYTES, np.uint8)
    copy_ns = _median_ns(lambda: np.copyto(shared, private))
    arena.close()
    return copy_ns


def _median_ns(what: Callable[[], None]) -> float:
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter_ns()
        what()
        times.append(time.perf_counter_ns() - begun)
    return statistics.median(times)


def _answer(home: Path) -> None:
    """The other process: answers every message with a short one, until it is killed or its parent has ended."""
    with Sockets() as sockets:
        inlet = sockets.inlet(f"ipc://{home / 'there'}", shortcut=home / "there.fragments")
        outlet = sockets.connect(f"ipc://{home / 'here'}", shortcut=str(home / "here.fragments"))
        sockets.watch(sys.stdin.fileno())
        outlet.send(b"up")
        while sys.stdin.fileno() not in (ready := sockets.wait(_DEADLINE_S)):
            if inlet.receive(ready) is not None:
                outlet.send(b"done")


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
