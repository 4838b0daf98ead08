"""One session in this process as the target of a load: what a program has that calls ONNX Runtime itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue

from onnxsplit.errors import one_line
from onnxsplit.session import Session
from onnxsplit.tensors import Array
from runtime.load.target import EndDetail, Ended, LoadTarget


class SessionTarget(LoadTarget):
    """Runs requests one after the other in a thread; those that come meanwhile wait in a queue.

    Args:
        session: the session.
        inputs: the inputs of requests, by name; several are sent in turn.
    """

    def __init__(self, session: Session, inputs: Sequence[Mapping[str, Array]]) -> None:
        self._session = session
        self._inputs = [{name: entry[name] for name, _ in session.inputs} for entry in inputs]
        self._queue: SimpleQueue[tuple[int, Ended] | None] = SimpleQueue()
        self._closing = False
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        """Start the thread."""
        self._queue, self._closing = SimpleQueue(), False
        self._thread = threading.Thread(target=self._serve, args=(self._queue,), name="session", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Drop the requests that wait, and end the thread."""
        self._closing = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def start(self, number: int, ended: Ended) -> None:
        """Put a request into the queue."""
        self._queue.put((number, ended))

    def _serve(self, queue: SimpleQueue[tuple[int, Ended] | None]) -> None:
        while (item := queue.get()) is not None and not self._closing:
            number, ended = item
            try:
                self._session.run(self._inputs[number % len(self._inputs)])
            except Exception as error:  # whatever the model raises
                ended(type(error).__name__, EndDetail(message=one_line(error)))
            else:
                ended()
