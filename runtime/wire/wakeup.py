"""Waking a thread that waits for messages."""

from __future__ import annotations

import os
from contextlib import suppress


class Wakeup:
    """Wakes a thread that waits in :meth:`Sockets.wait`, from any other thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._read

    def ring(self) -> None:
        """Wake the waiting thread; ringing twice is as good as once."""
        with suppress(BlockingIOError, OSError):
            os.write(self._write, b"!")

    def clear(self) -> None:
        """Take note of all rings so far."""
        with suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        write, self._write = self._write, -1  # ringing late must not reach whatever has the number next
        os.close(write)
