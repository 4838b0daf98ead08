"""The memory that is free on this host or in this container."""

from __future__ import annotations

from pathlib import Path

from onnxsplit.control_group import free_in_group_bytes


def free_memory_bytes() -> int:
    """Bytes of memory that this process can still use: the smaller of what the host and its control group have left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, free_in_group_bytes(free))
