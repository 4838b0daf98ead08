"""How busy this host is: the work of all processes together."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
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


def process_needed_s(pid: int, proc: Path = Path("/proc")) -> float | None:
    """The processor time that a process has used so far or waited for, ready to run, in seconds, over all its threads.

    Returns:
        None where the system does not tell it, and when the process has ended.
    """
    tasks = proc / str(pid) / "task"
    total_ns, is_told = 0, False
    with suppress(OSError):
        for thread in tasks.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):  # the thread has ended
                ran_ns, waited_ns, _ = (thread / "schedstat").read_text().split()
                total_ns, is_told = total_ns + int(ran_ns) + int(waited_ns), True
    return total_ns / 1e9 if is_told else None


def cpu_times(cores: Collection[int] | None = None, stat: Path = Path("/proc/stat")) -> CpuTimes:
    """The times until now; all are 0 where the system does not tell them.

    Args:
        cores: the numbers of the cores that count; all of them when None.
        stat: where the system tells the times.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return CpuTimes(0.0, 0.0, 0.0)
    names = {"cpu"} if cores is None else {f"cpu{core}" for core in cores}
    counted = [line.split()[1:9] for line in lines if line.partition(" ")[0] in names]
    user, nice, system, idle, waiting, irq, soft_irq, stolen = (
        sum(int(fields[index]) for fields in counted) / os.sysconf("SC_CLK_TCK") for index in range(8)
    )
    busy_s = user + nice + system + irq + soft_irq
    return CpuTimes(busy_s, stolen, busy_s + idle + waiting + stolen)
