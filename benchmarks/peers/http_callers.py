"""Callers of a server over HTTP, one per request in flight, each with a connection that stays open."""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPConnection
from queue import SimpleQueue
from threading import Thread

from peer import Peer, Tensors

Ask = Callable[[HTTPConnection, Tensors], Tensors]
"""One request on a connection, and its answer."""


def call(port: int, ask: Ask, requests: SimpleQueue[Tensors | None], answers: SimpleQueue[Tensors | Exception]) -> None:
    """Send requests one at a time."""
    connection = HTTPConnection("127.0.0.1", port)
    while (tensors := requests.get()) is not None:
        try:
            answers.put(ask(connection, tensors))
        except Exception as error:
            answers.put(error)
    connection.close()


class Callers(Peer):
    """All callers."""

    def __init__(self, port: int, inflight: int, ask: Ask) -> None:
        self.requests: SimpleQueue[Tensors | None] = SimpleQueue()
        self.answers: SimpleQueue[Tensors | Exception] = SimpleQueue()
        self.threads = [Thread(target=call, args=(port, ask, self.requests, self.answers)) for _ in range(inflight)]
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
        """End the callers."""
        for _ in self.threads:
            self.requests.put(None)
        for thread in self.threads:
            thread.join()
