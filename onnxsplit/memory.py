"""The memory that is free on this host or in this container, and memory that this process does not need any more."""

from __future__ import annotations

import ctypes
from pathlib import Path

from onnxsplit.control_group import free_in_group_bytes


def free_memory_bytes() -> int:
    """Bytes of memory that this process can still use: the smaller of what the host and its control group have left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, free_in_group_bytes(free))


def return_freed_memory() -> None:
    """Return freed memory to the system, which the C library would keep. Only glibc can; else nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
