"""Which bytes of a memory are free. Pure: numbers in, numbers out.

First fit at the lowest offset, so that what is used again is what was used last and lies in a cache; neighbours that
become free are joined.
"""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT = 64
"""Every extent begins at a multiple of this, a cache line, and takes a multiple of it."""


class Extents:
    """The free extents of a memory of ``size`` bytes.

    Attributes:
        used: bytes taken.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, bytes), by offset, no two touching

    def take(self, size: int) -> int | None:
        """The offset of ``size`` bytes; None when no extent is large enough. O(number of free extents)."""
        size = aligned(size)
        for position, (offset, free) in enumerate(self._free):
            if free >= size:
                if free == size:
                    del self._free[position]
                else:
                    self._free[position] = (offset + size, free - size)
                self.used += size
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        """Free what :meth:`take` gave for ``size`` bytes."""
        size = aligned(size)
        self.used -= size
        position = bisect_left(self._free, (offset, 0))
        if position < len(self._free) and self._free[position][0] == offset + size:
            size += self._free.pop(position)[1]
        if position and sum(self._free[position - 1]) == offset:
            before = self._free.pop(position - 1)
            offset, size = before[0], before[1] + size
        insort(self._free, (offset, size))


def aligned(size: int) -> int:
    """``size`` rounded up to the alignment; at least one unit."""
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
