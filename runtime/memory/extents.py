"""Allocation of the bytes of a memory. Pure: numbers in, numbers out.

First fit at the lowest offset, so that recently used memory, which is still in a cache, is used again first. Adjacent
free extents are merged.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

ALIGNMENT = 64
"""Bytes of a cache line. The offset and the size of every extent are multiples of it."""


class Extents:
    """The free extents of a memory.

    Args:
        size: bytes of the memory.

    Attributes:
        size: bytes of the memory.
        used: bytes that are allocated.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, bytes), sorted by offset, none adjacent

    def keep_only(self, used: Iterable[tuple[int, int]]) -> None:
        """Free everything but these extents, given as offset and bytes."""
        self._free, self.used, at = [], 0, 0
        for offset, size in sorted(used):
            if offset > at:
                self._free.append((at, offset - at))
            at = offset + aligned(size)
            self.used += aligned(size)
        if at < self.size:
            self._free.append((at, self.size - at))

    def take(self, size: int) -> int | None:
        """Allocate ``size`` bytes in O(number of free extents).

        Returns:
            Their offset; None when no extent is large enough.
        """
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
        """Free the ``size`` bytes that :meth:`take` has allocated at ``offset``."""
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
    """``size`` rounded up to a multiple of :data:`ALIGNMENT`, at least one."""
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
