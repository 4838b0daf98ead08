"""The line of progress on a terminal, and the output that is printed above it.

    2026-11-30 12:00:00 WARNING node 1.0 was lost     other output: the line is removed, the output is printed,
    2 of 3 nodes ready                                and the line is drawn again below it

Both standard streams write through :data:`PROGRESS` if they are this terminal, so nothing that prints needs to know of
the line.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

_REMOVE = b"\r\x1b[2K"


class ProgressLine:
    """One line of progress. Any thread may show it, and any thread may print above it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may print while its own thread draws
        self._descriptor = -1
        self._text = ""
        self._drawn = False
        self._begun = False  # whether other output has begun a line and not ended it: the text waits until then

    def show(self, text: str, descriptor: int) -> None:
        """Show a text in place of the one before, on the terminal of a descriptor."""
        with self._lock:
            self._descriptor, self._text = descriptor, text
            self._draw()

    def remove(self) -> None:
        """Remove the line."""
        with self._lock:
            self._erase()
            self._text = ""

    def above(self, write: Callable[[], int | None], data: bytes) -> int | None:
        """Write other output to the terminal, and draw the line again once that output ends a line.

        Args:
            write: writes the data, and returns the number of bytes that it has written.
            data: the data.
        """
        with self._lock:
            self._erase()
            written = write()
            if written:
                self._begun = data[written - 1] != ord("\n")
            self._draw()
            return written

    def _draw(self) -> None:
        if self._begun or not self._text:
            return
        with suppress(OSError):  # the terminal is gone
            width = os.get_terminal_size(self._descriptor).columns
            os.write(self._descriptor, _REMOVE + self._text[: max(1, width - 1)].encode(errors="replace"))
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            with suppress(OSError):
                os.write(self._descriptor, _REMOVE)
            self._drawn = False


PROGRESS = ProgressLine()
"""The line of progress of this process."""
