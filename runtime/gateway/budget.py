"""The bytes of requests that are in memory, all together, whatever carries them.

    held       whole, from their arrival until they are answered: at most ``all_bytes``; more are refused
    arriving   gRPC's messages on their way in, whose size is not known before they are whole: as many at once as
               could be of the largest size within ``all_bytes`` once more, and one at least

So clients cannot make the server hold more than twice ``all_bytes`` of what they sent. HTTP's bodies are counted as
they come, piece by piece, and so is what is decompressed.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from runtime.errors import Busy
from runtime.gateway.errors import TooSlow

PATIENCE_S = 10.0
"""How long a message may keep others waiting that want to arrive."""


_TRIM_BYTES = 64 << 20


class Gate:
    """Lets so many messages of unknown size arrive at once; others wait, and then none may take its time.

    Args:
        places: messages that may be arriving at once.
    """

    def __init__(self, places: int) -> None:
        self._room = asyncio.Semaphore(places)
        self._arriving: set[asyncio.Timeout] = set()
        self._waiting = 0

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """A message comes in; waits until there is room for it.

        Raises:
            TooSlow: it took longer than :data:`PATIENCE_S` while others waited.
        """
        if self._room.locked():
            self._hurry()
            self._waiting += 1
            try:
                await self._room.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._room.acquire()
        try:
            async with asyncio.timeout(PATIENCE_S if self._waiting else None) as limit:
                self._arriving.add(limit)
                try:
                    yield
                finally:
                    self._arriving.discard(limit)
        except TimeoutError as error:
            raise TooSlow(f"the message was not whole after {PATIENCE_S:g} s, and others waited") from error
        finally:
            self._room.release()

    def _hurry(self) -> None:
        """Somebody waits: those who are arriving have from now on so long."""
        end = asyncio.get_running_loop().time() + PATIENCE_S
        for limit in self._arriving:
            if limit.when() is None:
                limit.reschedule(end)


class Budget:
    """What may be held, and what is.

    Args:
        all_bytes: of all requests together.
        most_bytes: of one.

    Attributes:
        gate: for messages whose size is not known before they are whole.
    """

    def __init__(self, all_bytes: int, most_bytes: int) -> None:
        self.all_bytes = max(all_bytes, most_bytes)
        self.held_bytes = 0
        self.gate = Gate(max(1, self.all_bytes // most_bytes))
        self._given_bytes = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            Busy: that would be more than all that may be held.
        """
        with self._lock:
            if self.held_bytes + size <= self.all_bytes:
                self.held_bytes += size
                return
        raise Busy(
            f"the server holds {self.held_bytes} bytes of requests, and with {size} more there would be more than the "
            f"{self.all_bytes} that may be (--max-queue-bytes, --max-body); try again later"
        )

    def give(self, size: int) -> None:
        """Hold so many bytes less."""
        with self._lock:
            self.held_bytes -= size
            self._given_bytes += size

    def trim(self) -> None:
        """Give memory back to the system after much was held; the C library would keep it for what comes next."""
        with self._lock:
            if self._given_bytes < _TRIM_BYTES or self.held_bytes > _TRIM_BYTES:
                return
            self._given_bytes = 0
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold so many bytes for a while. Raises :class:`Busy` as :meth:`take` does."""
        self.take(size)
        try:
            yield
        finally:
            self.give(size)
