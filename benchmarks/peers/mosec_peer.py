"""Stages as workers of a mosec server, which its callers reach over HTTP with binary bodies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mosec
from http_callers import Callers
from peer import Plan, Runner, Tensors, free_port, join, main, split

LARGEST = 1 << 30


class StageWorker(mosec.Worker):
    """The worker of the stage that its environment names; tensors are packed the same way between all processes."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.run = Runner(Plan.read(Path(os.environ["PEER_PLAN"])).stages[int(os.environ["PEER_STAGE"])])

    def deserialize(self, data: bytes) -> Tensors:
        """Unpack the tensors that a stage receives."""
        return split(data)

    def serialize(self, data: Tensors) -> bytes:
        """Pack the tensors that a stage sends."""
        return join(data)

    deserialize_ipc, serialize_ipc = deserialize, serialize

    def forward(self, data: Any) -> Any:  # mosec makes a schema of these types, and has none for arrays
        """Run the stage."""
        return self.run(data)


def serve() -> None:
    """Run the server in a separate process."""
    server = mosec.Server()
    for index in range(len(Plan.read(Path(os.environ["PEER_PLAN"])).stages)):
        server.append_worker(StageWorker, env=[{"PEER_STAGE": str(index)}])
    server.run()


def ask(connection: HTTPConnection, tensors: Tensors) -> Tensors:
    """Send one request."""
    connection.request("POST", "/inference", join(tensors))
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(body.decode(errors="replace"))
    return split(body)


def wait_until_up(server: subprocess.Popen[bytes], port: int) -> None:
    """Return once the server answers a request."""
    while server.poll() is None:
        try:
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/")
            connection.getresponse().read()
            connection.close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit("mosec ended during its start")


@contextmanager
def start(plan: Plan, known: Tensors, inflight: int) -> Iterator[Callers]:
    """Start the server and its callers."""
    port = free_port()
    settings = {"ADDRESS": "127.0.0.1", "PORT": port, "TIMEOUT": 60_000, "MAX_REQUEST_SIZE": LARGEST}
    environment = {f"MOSEC_{name}": str(value) for name, value in settings.items()}
    environment |= {"MOSEC_LOG_LEVEL": "warning", "PEER_PLAN": str(plan.folder)}
    command = [sys.executable, "-c", "import mosec_peer; mosec_peer.serve()"]
    server = subprocess.Popen(command, cwd=Path(__file__).parent, env=os.environ | environment)
    try:
        wait_until_up(server, port)
        callers = Callers(port, inflight, ask)
        try:
            yield callers
        finally:
            callers.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(start)
