"""Stages as Ray Serve deployments of one replica; the caller passes each response to the next handle."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux, too: only so does it stay on 127.0.0.1
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else it writes one to the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}

import ray
from peer import Peer, Plan, Runner, Stage, Tensors, main
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse


@contextmanager
def cluster(cores: int) -> Iterator[None]:
    """A separate Ray on 127.0.0.1 with only the necessary components; its workers have their caller's niceness."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            address="local",
            num_cpus=cores,
            num_gpus=0,
            include_dashboard=False,
            _temp_dir=folder,
            object_store_memory=1 << 30,
        )
        try:
            yield
        finally:
            ray.shutdown()


class Replica:
    """A stage; Serve calls it on several threads, and one thread at a time runs the session."""

    def __init__(self, stage: Stage) -> None:
        self.run, self.alone = Runner(stage), Lock()

    def __call__(self, tensors: Tensors) -> Tensors:
        """Run the stage when its turn comes."""
        with self.alone:
            return self.run(tensors)


class Handles(Peer):
    """The stages' handles, in order."""

    def __init__(self, handles: list[DeploymentHandle]) -> None:
        self.handles = handles
        self.waiting: deque[DeploymentResponse] = deque()

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        passed: Tensors | DeploymentResponse = tensors
        for handle in self.handles:
            passed = handle.remote(passed)
        self.waiting.append(passed)

    def take(self) -> Tensors:
        """Wait for the next answer."""
        return self.waiting.popleft().result()


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Handles]:
    """Deploy the stages, without Serve's HTTP proxy."""
    with cluster(len(plan.stages)):
        serve.start(proxy_location="Disabled")
        handles = []
        for index, stage in enumerate(plan.stages):
            deployment = serve.deployment(
                Replica,
                num_replicas=1,
                max_ongoing_requests=1 << 16,  # at its limit, Serve would wait in growing steps
                ray_actor_options={"num_cpus": 0},
                logging_config={"enable_access_log": False},
            )
            handles.append(serve.run(deployment.bind(stage), name=f"stage{index}", route_prefix=None))
        try:
            yield Handles(handles)
        finally:
            serve.shutdown()


if __name__ == "__main__":
    main(start)
