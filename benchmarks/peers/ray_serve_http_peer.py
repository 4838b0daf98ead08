"""Stages as Ray Serve deployments behind its HTTP proxy; an ingress passes each response to the next handle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

from http_callers import Callers
from peer import Plan, Tensors, free_port, join, main, split
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray_serve_peer import Replica, cluster
from starlette.requests import Request
from starlette.responses import Response


class Ingress:
    """The ingress that the proxy calls."""

    def __init__(self, *handles: DeploymentHandle) -> None:
        self.handles = handles

    async def __call__(self, request: Request) -> Response:
        """Run the stages in order."""
        passed = split(await request.body())
        for handle in self.handles:
            passed = handle.remote(passed)
        return Response(join(await passed), media_type="application/octet-stream")


def ask(connection: HTTPConnection, tensors: Tensors) -> Tensors:
    """Send one request."""
    connection.request("POST", "/", join(tensors))
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(body.decode(errors="replace"))
    return split(body)


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Callers]:
    """Deploy the stages and the ingress."""
    with cluster(len(plan.stages) + 1):
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"num_replicas": 1, "max_ongoing_requests": 1 << 16, "ray_actor_options": {"num_cpus": 0}}
        options["logging_config"] = {"enable_access_log": False}
        stages = [
            serve.deployment(Replica, name=f"stage{index}", **options).bind(stage)
            for index, stage in enumerate(plan.stages)
        ]
        serve.run(serve.deployment(Ingress, **options).bind(*stages), route_prefix="/")
        callers = Callers(port, inflight, ask)
        try:
            yield callers
        finally:
            callers.close()
            serve.shutdown()


if __name__ == "__main__":
    main(start)
