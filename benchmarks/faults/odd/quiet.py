"""What must be as it was when all is quiet: places, threads, descriptors, memory. The only code that looks inside."""

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
    """Places and bytes that requests hold at the entrance, and how many wait there."""
    entrance: Any = pipeline._admission
    return entrance.inside, sum(entrance._places.values()), len(entrance._waiting)


def unanswered(pipeline: Pipeline) -> tuple[int, int]:
    """Requests that the flow, and that the coordinator's machine, take for unanswered."""
    coordinator: Any = pipeline._coordinator
    return len(coordinator.requests._pending), len(coordinator._machine.requests)


def start_collector() -> None:
    """Have pyzmq open what it keeps for the process from its first message without a copy on: a context, a thread."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://chaos")
        other.connect("inproc://chaos")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


@dataclass(frozen=True)
class State:
    """A pipeline that is quiet, and this process."""

    places: tuple[int, int, int]
    unanswered: tuple[int, int]
    lent_bytes: int
    threads: tuple[str, ...]
    native_threads: int
    descriptors: int

    def text(self) -> str:
        """In words."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def state(pipeline: Pipeline) -> State:
    """Now."""
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
    """Wait until a pipeline that nobody asks is as it was; what is not, when it takes too long."""
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
        found.append(f"unanswered: {now.unanswered[0]} in the flow, {now.unanswered[1]} in the machine")
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
        """What has grown."""
        return grown("caller", self.caller) + grown("largest node", self.largest_node)

    def growth_mib(self) -> dict[str, tuple[int, int]]:
        """Medians of the first and the last third."""
        samples = {"caller": self.caller, "largest node": self.largest_node}
        return {name: (ends[0] >> 20, ends[1] >> 20) for name, sizes in samples.items() if (ends := _ends(sizes))}


def grown(name: str, sizes: list[int]) -> list[str]:
    """What is wrong when the last third of some sizes is far above the first."""
    first, last = _ends(sizes) or (0, 0)
    if last <= 1.25 * first + _SLACK_BYTES:
        return []
    return [f"memory of the {name} grew from {first >> 20} to {last >> 20} MiB"]


def _ends(sizes: list[int]) -> tuple[int, int] | None:
    third = max(1, len(sizes) // 3)
    return (int(statistics.median(sizes[:third])), int(statistics.median(sizes[-third:]))) if sizes else None
