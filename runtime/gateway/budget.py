"""The memory for requests, of HTTP and gRPC together.

    held       requests that are whole, from their arrival to their answers: at most ``all_bytes``; more are refused
    arriving   gRPC messages, whose size is unknown until they are whole: as many at once as would fit into another
               ``all_bytes`` at the largest size, and at least one

So clients cannot make the server hold more than twice ``all_bytes``. Bodies of HTTP requests are counted piece by piece
as they arrive or are decompressed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from onnxsplit.memory import return_freed_memory
from runtime.errors import Busy
from runtime.gateway.receive_limit import ReceiveLimit

_TRIM_BYTES = 64 << 20


class Budget:
    """Counts the bytes of requests that are held. Callable from any thread.

    Args:
        all_bytes: Most bytes of all requests together.
        most_bytes: Most bytes of one request.

    Attributes:
        held_bytes: Bytes that are held now.
        receive_limit: Limits the messages whose size is unknown until they are whole.
    """

    def __init__(self, all_bytes: int, most_bytes: int) -> None:
        self.all_bytes = max(all_bytes, most_bytes)
        self.held_bytes = 0
        self.receive_limit = ReceiveLimit(max(1, self.all_bytes // most_bytes))
        self._released_bytes = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more.

        Raises:
            Busy: That would exceed ``all_bytes``.
        """
        with self._lock:
            if self.held_bytes + size <= self.all_bytes:
                self.held_bytes += size
                return
        raise Busy(
            f"the server holds {self.held_bytes} bytes of requests, and {size} more would be more than the "
            f"{self.all_bytes} allowed (--max-queue-bytes, --max-body); try again later"
        )

    def give(self, size: int) -> None:
        """Hold ``size`` bytes less."""
        with self._lock:
            self.held_bytes -= size
            self._released_bytes += size

    def trim(self) -> None:
        """Return memory to the system once much was released."""
        with self._lock:
            if self._released_bytes < _TRIM_BYTES or self.held_bytes > _TRIM_BYTES:
                return
            self._released_bytes = 0
        return_freed_memory()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes within a ``with`` statement. Raises :class:`Busy` as :meth:`take` does."""
        self.take(size)
        try:
            yield
        finally:
            self.give(size)
