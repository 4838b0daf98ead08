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
from queue import SimpleQueue
from threading import Thread
from typing import Any

import mosec
from peer import Peer, Plan, Runner, Tensors, free_port, join, main, split

LARGEST = 1 << 30


class StageWorker(mosec.Worker):
    """The worker of the stage that its environment names; tensors are packed the same way on every leg."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.run = Runner(Plan.read(Path(os.environ["PEER_PLAN"])).stages[int(os.environ["PEER_STAGE"])])

    def deserialize(self, data: bytes) -> Tensors:
        """What any stage is sent."""
        return split(data)

    def serialize(self, data: Tensors) -> bytes:
        """What any stage sends."""
        return join(data)

    deserialize_ipc, serialize_ipc = deserialize, serialize

    def forward(self, data: Any) -> Any:  # mosec makes a schema of what is written here, and has none for arrays
        """Run the stage."""
        return self.run(data)


def serve() -> None:
    """Run the server, in a process of its own."""
    server = mosec.Server()
    for index in range(len(Plan.read(Path(os.environ["PEER_PLAN"])).stages)):
        server.append_worker(StageWorker, env=[{"PEER_STAGE": str(index)}])
    server.run()


def call(port: int, requests: SimpleQueue[Tensors | None], answers: SimpleQueue[Tensors | Exception]) -> None:
    """One caller: a connection that is kept, one request at a time."""
    connection = HTTPConnection("127.0.0.1", port)
    while (tensors := requests.get()) is not None:
        try:
            connection.request("POST", "/inference", join(tensors))
            response = connection.getresponse()
            body = response.read()
            answers.put(split(body) if response.status == 200 else RuntimeError(body.decode(errors="replace")))
        except Exception as error:
            answers.put(error)
    connection.close()


class Callers(Peer):
    """As many callers as there are requests in flight."""

    def __init__(self, port: int, inflight: int) -> None:
        self.requests: SimpleQueue[Tensors | None] = SimpleQueue()
        self.answers: SimpleQueue[Tensors | Exception] = SimpleQueue()
        self.threads = [Thread(target=call, args=(port, self.requests, self.answers)) for _ in range(inflight)]
        for thread in self.threads:
            thread.start()

    def submit(self, tensors: Tensors) -> None:
        """Send one request."""
        self.requests.put(tensors)

    def take(self) -> Tensors:
        """Wait for the next answer."""
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Let the callers go."""
        for _ in self.threads:
            self.requests.put(None)
        for thread in self.threads:
            thread.join()


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
    sys.exit("mosec ended as it started")


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
        callers = Callers(port, inflight)
        try:
            yield callers
        finally:
            callers.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(start)
