"""Our own gateway, which its caller reaches over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gateway import served
from grpc_caller import Caller
from peer import Plan, Tensors, main
from tritonclient.grpc import InferenceServerClient


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Caller]:
    """Start the server and a client."""
    with served(plan) as server, InferenceServerClient(server["grpc"]) as client:
        yield Caller(client, server["model"], plan, known, {name: name for name in known})


if __name__ == "__main__":
    main(start)
