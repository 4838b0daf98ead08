"""A function of this process as the target of a load, such as the run of one session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from onnxsplit.errors import one_line
from runtime.load.target import EndDetail, Ended, LoadTarget


class CallTarget(LoadTarget):
    """Calls a function for each request, one after the other, in a thread of its own.

    Requests that come meanwhile wait here, and that time is part of their latency.

    Args:
        call: the function; an exception is a failure of its type.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._waiting: SimpleQueue[Ended | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        """Start the thread."""
        self._waiting = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(self._waiting,), daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Forget the requests that wait, and wait for the one that runs."""
        while not self._waiting.empty():
            self._waiting.get()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def start(self, number: int, ended: Ended) -> None:  # noqa: ARG002  all requests are the same
        """Let a request wait for its turn."""
        self._waiting.put(ended)

    def _work(self, waiting: SimpleQueue[Ended | None]) -> None:
        while (ended := waiting.get()) is not None:
            try:
                self._call()
            except Exception as error:
                ended(type(error).__name__, EndDetail(message=one_line(error)))
            else:
                ended()
