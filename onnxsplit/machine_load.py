"""How busy this host is: the work of all processes together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuTimes:
    """Times since the host's start, summed over its cores, in seconds.

    Attributes:
        busy_s: time in which a core worked for a process.
        stolen_s: time in which a core of a virtual machine was ready to work, and its host did not let it.
        total_s: all time of all cores.
    """

    busy_s: float
    stolen_s: float
    total_s: float

    def busy_share_since(self, before: CpuTimes, own_s: float = 0.0) -> float:
        """The share of the cores that was used since then, by others if this program used ``own_s`` seconds."""
        return self._share(self.busy_s + self.stolen_s - before.busy_s - before.stolen_s - own_s, before)

    def idle_s_since(self, before: CpuTimes) -> float:
        """The time since then in which cores had nothing to do, summed over the cores, in seconds."""
        return max(
            0.0, (self.total_s - before.total_s) - (self.busy_s + self.stolen_s - before.busy_s - before.stolen_s)
        )

    def stolen_share_since(self, before: CpuTimes) -> float:
        """The share of the cores that was stolen since then."""
        return self._share(self.stolen_s - before.stolen_s, before)

    def _share(self, part_s: float, before: CpuTimes) -> float:
        total_s = self.total_s - before.total_s
        return min(1.0, max(0.0, part_s / total_s)) if total_s > 0 else 0.0


def process_cpu_s(pid: int) -> float:
    """The processor time that a process has used so far, in seconds; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may have spaces
    except OSError:
        return 0.0
    user, system = fields[11:13]  # of fields that are counted from 3
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def cpu_times() -> CpuTimes:
    """The times until now; all are 0 where the system does not tell them."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return CpuTimes(0.0, 0.0, 0.0)
    user, nice, system, idle, waiting, irq, soft_irq, stolen = (
        int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in first
    )
    busy_s = user + nice + system + irq + soft_irq
    return CpuTimes(busy_s, stolen, busy_s + idle + waiting + stolen)
