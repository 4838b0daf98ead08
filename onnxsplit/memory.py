"""The memory that is free on this host or in this container."""

from __future__ import annotations

from pathlib import Path


def free_memory_bytes() -> int:
    """Bytes of memory that this process can still use: the smaller of what the host and its control group have left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, _free_in_group_bytes(free))


def _free_in_group_bytes(unlimited: int) -> int:
    """Bytes that the control group of this process (cgroup v2) has left; ``unlimited`` if it has no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        group = Path("/sys/fs/cgroup") / own
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control groups of version 2, or the limit is "max"
        return unlimited
