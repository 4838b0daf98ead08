"""A way to wake a thread that waits for messages."""

from __future__ import annotations

import os
from contextlib import suppress


class Wakeup:
    """Wakes a thread that waits in :meth:`~runtime.wire.sockets.Sockets.wait`, from any other thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor for :meth:`~runtime.wire.sockets.Sockets.watch`."""
        return self._read

    def ring(self) -> None:
        """Wake the waiting thread; ringing twice has the same effect as ringing once."""
        with suppress(BlockingIOError, OSError):
            os.write(self._write, b"!")

    def clear(self) -> None:
        """Consume all rings so far."""
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        write, self._write = self._write, -1  # a late ring must not write to a file that reuses the number
        os.close(write)
