"""How much memory this host, or this container, has free."""

from __future__ import annotations

from pathlib import Path


def free_memory_bytes() -> int:
    """Memory that this process could still use: what the host has available, or what its control group has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    return min(free, _free_in_group_bytes(free))


def _free_in_group_bytes(unlimited: int) -> int:
    """Memory that the control group of this process (cgroup v2) has left; ``unlimited`` when it has no limit."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        group = Path("/sys/fs/cgroup") / own
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such groups, or "max"
        return unlimited
