"""What a request costs beside the runs of its stages and the bytes of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_CROWDED_PERCENT = 120
"""How much more processor time stages take that share fewer cores than they have threads.

They wake each other at every request, so each finds less of its data in the caches. With three stages on two cores, 17
networks took 1.0 to 1.3 times as much (``benchmarks/cutting/verdicts.py``).
"""


@dataclass(frozen=True)
class Overhead:
    """The overhead of requests on some devices.

    The nodes on the caller's host and the caller share its cores. So requests follow each other in no less than the sum
    of what one costs there, divided by the cores.

    With one device for each stage, the overhead of the nodes is the same for every cut into as many stages. So a search
    leaves it out, and charges it to the figures of its result.

    Attributes:
        node_ns: time that a request takes at a node beside its run and its tensors, in nanoseconds.
        caller_ns: processor time that a request takes at the caller, in nanoseconds.
        threads: for each device, the threads of a session there, times the share of a core that each gets; 0 for a
            device that is on another host than the caller, or that computes elsewhere than on the CPU.
        cores: the cores of the caller's host.
    """

    node_ns: int
    caller_ns: int
    threads: tuple[float, ...]
    cores: int

    def host_ns(self, stage_ns: Sequence[int], devices: Sequence[Sequence[int]]) -> int:
        """The least time between two requests that the caller's host allows, in nanoseconds.

        Args:
            stage_ns: for each stage, its time divided by its replicas, with the overhead of the node.
            devices: for each stage, the devices of its replicas.
        """
        work_ns: float = self.caller_ns
        for time_ns, homes in zip(stage_ns, devices, strict=True):
            work_ns += time_ns * self._threads(homes)
        return max(self.caller_ns, self._on_cores_ns(work_ns, len(devices), sum(map(self._threads, devices))))

    def _on_cores_ns(self, work_ns: float, stages: int, threads: float) -> int:
        """The time that work takes if all cores share it."""
        percent = _CROWDED_PERCENT if stages > 1 and threads > self.cores else 100
        return -(-round(work_ns) * percent // (100 * self.cores))

    def _threads(self, homes: Sequence[int]) -> float:
        return sum(self.threads[device] for device in homes)

    def least_ns(self, bound_ns: int, work_ns: int, stages: int, replicas: int) -> int:
        """A lower bound on the bottleneck with the overhead, in nanoseconds.

        Args:
            bound_ns: a lower bound without it.
            work_ns: the least time of all atoms and transfers together.
            stages: the fewest stages.
            replicas: the most replicas of a stage.
        """
        bound_ns = max(bound_ns + -(-self.node_ns // replicas), self.caller_ns)
        if not all(self.threads):
            return bound_ns
        shared = (work_ns + stages * self.node_ns) * min(self.threads) + self.caller_ns
        return max(bound_ns, self._on_cores_ns(shared, stages, stages * min(self.threads)))
