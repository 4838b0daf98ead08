"""Places, threads, descriptors and memory, which must be unchanged once no request is in flight.

Only this file uses the pipeline's private attributes.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import zmq

from runtime import Pipeline

_SLACK_BYTES = 64 << 20
_SLACK_DESCRIPTORS = 4


def places_taken(pipeline: Pipeline) -> tuple[int, int, int]:
    """Return the places and bytes that admission has given to requests, and the number of waiting requests."""
    admission: Any = pipeline.admission
    return admission.inside, sum(admission._places.values()), len(admission._waiting)


def unanswered(pipeline: Pipeline) -> tuple[int, int]:
    """Return the numbers of unanswered requests in the request I/O and in the coordinator's state machine."""
    coordinator: Any = pipeline._coordinator
    return len(coordinator.requests._pending), len(coordinator._machine.requests)


def start_collector() -> None:
    """Make pyzmq open the context and the thread that it keeps after its first zero-copy message."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://chaos")
        other.connect("inproc://chaos")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


@dataclass(frozen=True)
class State:
    """The resources of a pipeline without requests, and of this process."""

    places: tuple[int, int, int]
    unanswered: tuple[int, int]
    lent_bytes: int
    threads: tuple[str, ...]
    native_threads: int
    descriptors: int

    def text(self) -> str:
        """Describe it in one line."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def state(pipeline: Pipeline) -> State:
    """Return the present state."""
    own = psutil.Process()
    return State(
        places=places_taken(pipeline),
        unanswered=unanswered(pipeline),
        lent_bytes=pipeline.lent_bytes,
        threads=tuple(sorted(thread.name for thread in threading.enumerate() if not _of_chaos(thread))),
        native_threads=own.num_threads() - sum(map(_of_chaos, threading.enumerate())),
        descriptors=own.num_fds(),
    )


def _of_chaos(thread: threading.Thread) -> bool:
    return thread.name.startswith(("caller", "harm", "memory", "Thread-", "closing"))


def quiet(pipeline: Pipeline, before: State | None, patience_s: float) -> list[str]:
    """Wait until a pipeline without requests is as it was before; return the differences that remain after a limit."""
    end = time.monotonic() + patience_s
    while True:
        found = _not_as_it_was(pipeline, before)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


def _not_as_it_was(pipeline: Pipeline, before: State | None) -> list[str]:
    found = [f"node {n.stage}.{n.replica} is {n.state}" for n in pipeline.nodes if n.state != "ready"]
    now = state(pipeline)
    if any(now.places):
        found.append(f"places: {now.places[0]} taken with {now.places[1]} bytes, {now.places[2]} wait")
    if any(now.unanswered):
        found.append(f"unanswered: {now.unanswered[0]} in the request I/O, {now.unanswered[1]} in the state machine")
    if now.lent_bytes:
        found.append(f"{now.lent_bytes} bytes of shared memory are lent")
    if before is not None:
        if now.threads != before.threads:
            found.append(f"threads are {now.threads}, were {before.threads}")
        if now.native_threads > before.native_threads:
            found.append(f"{now.native_threads} threads of the system, were {before.native_threads}")
        if now.descriptors > before.descriptors + _SLACK_DESCRIPTORS:
            found.append(f"{now.descriptors} descriptors, were {before.descriptors}")
    return found


class Memory:
    """Samples the memory of this process and of a pipeline's nodes; a context manager."""

    def __init__(self, pipeline: Pipeline, every_s: float = 0.25) -> None:
        self.caller: list[int] = []
        self.largest_node: list[int] = []
        self._pipeline, self._every_s = pipeline, every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        own = psutil.Process()
        while not self._end.wait(self._every_s):
            sizes = []
            for node in self._pipeline.nodes:
                try:
                    sizes.append(psutil.Process(node.pid).memory_info().rss if node.pid else 0)
                except psutil.Error:
                    continue
            self.caller.append(own.memory_info().rss)
            self.largest_node.append(max(sizes, default=0))

    def problems(self) -> list[str]:
        """Describe the sizes that have grown."""
        return grown("caller", self.caller) + grown("largest node", self.largest_node)

    def growth_mib(self) -> dict[str, tuple[int, int]]:
        """Return the growth from the median of the first third to that of the last third, in MiB."""
        samples = {"caller": self.caller, "largest node": self.largest_node}
        return {name: (ends[0] >> 20, ends[1] >> 20) for name, sizes in samples.items() if (ends := _ends(sizes))}


def grown(name: str, sizes: list[int]) -> list[str]:
    """Return a message if the last third of the sizes is far above the first."""
    first, last = _ends(sizes) or (0, 0)
    if last <= 1.25 * first + _SLACK_BYTES:
        return []
    return [f"memory of the {name} grew from {first >> 20} to {last >> 20} MiB"]


def _ends(sizes: list[int]) -> tuple[int, int] | None:
    third = max(1, len(sizes) // 3)
    return (int(statistics.median(sizes[:third])), int(statistics.median(sizes[-third:]))) if sizes else None
