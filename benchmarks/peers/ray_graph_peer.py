"""Stages as Ray actors in one compiled graph, with shared-memory channels between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from peer import Peer, Plan, Runner, Stage, Tensors, main
from ray.dag import DAGContext, InputNode
from ray.dag.compiled_dag_node import CompiledDAG
from ray.experimental.compiled_dag_ref import CompiledDAGRef
from ray_serve_peer import cluster  # first: it sets Ray's environment


@ray.remote(num_cpus=0)
class Actor:
    """A stage."""

    def __init__(self, stage: Stage) -> None:
        self.runner = Runner(stage)

    def run(self, tensors: Tensors) -> Tensors:
        """Run the stage."""
        return self.runner(tensors)


class Graph(Peer):
    """The compiled graph and the executions whose results have not been taken yet."""

    def __init__(self, graph: CompiledDAG) -> None:
        self.graph = graph
        self.waiting: deque[CompiledDAGRef] = deque()

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        self.waiting.append(self.graph.execute(tensors))

    def take(self) -> Tensors:
        """Wait for the next answer."""
        return ray.get(self.waiting.popleft(), timeout=60)


@contextmanager
def semaphores_removed() -> Iterator[None]:
    """Remove the named semaphores of channels, which Ray leaves behind."""
    folder = Path("/dev/shm")
    before = {*folder.glob("sem.hdr*"), *folder.glob("sem.obj*")}
    yield
    for file in {*folder.glob("sem.hdr*"), *folder.glob("sem.obj*")} - before:
        file.unlink(missing_ok=True)


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Graph]:
    """Start an actor per stage and compile their chain, with a buffer for every request in flight."""
    DAGContext.get_current().teardown_timeout = 1  # its actors do not always leave their loop; then they are killed
    with semaphores_removed(), cluster(len(plan.stages)):
        actors = [Actor.remote(stage) for stage in plan.stages]
        with InputNode() as passed:
            for actor in actors:
                passed = actor.run.bind(passed)
        largest = max(sum(known[name].nbytes for name in (*stage.arrives, *stage.leaves)) for stage in plan.stages)
        graph = passed.experimental_compile(_max_inflight_executions=inflight, _buffer_size_bytes=largest + (1 << 16))
        try:
            yield Graph(graph)
        finally:
            graph.teardown(kill_actors=True)


if __name__ == "__main__":
    main(start)
