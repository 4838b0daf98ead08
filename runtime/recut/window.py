"""What a running pipeline did in a time: session times of its nodes by the cost of requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.coordinator.node_record import Phase
from runtime.topology import ReplicaKey

if TYPE_CHECKING:
    from runtime.coordinator.status import NodeStats

Runs = Mapping[int, tuple[int, int]]
"""Number of requests and the sum of their session times in nanoseconds, by the rounded cost of the request."""

_READY = Phase.READY.value


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """When figures count.

    Attributes:
        window_s: shortest time of a window.
        requests: least number of requests of every stage in a window.
        longest_s: a window that has not got these requests in this time is dropped.
        baseline_windows: windows that make the first baseline. The window before them is warm-up, and is dropped.
        most_baseline_windows: windows without a drift refine the baseline up to this number.
        least_noise: ratios are never taken to be more exact than this.
    """

    window_s: float = 3.0
    requests: int = 10
    longest_s: float = 60.0
    baseline_windows: int = 3
    most_baseline_windows: int = 10
    least_noise: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a pipeline has done since it started.

    Attributes:
        now_ns: when this was read, by the host's monotonic clock.
        answered: number of answered requests; of steps, if the pipeline continues sequences.
        nodes: the statistics of every node.
    """

    now_ns: int
    answered: int
    nodes: tuple[NodeStats, ...]


@dataclass(frozen=True, kw_only=True)
class NodeWindow:
    """What one node did in a window.

    Attributes:
        device: name of its device.
        runs: its requests and session times by cost.
        trouble: why these figures do not count; empty if they do.
    """

    device: str
    runs: Runs
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a pipeline did between two looks.

    Attributes:
        seconds: time between them.
        answered: number of requests (or steps) that were answered.
        full_s: time in which the pipeline was full: further requests would have had to wait.
        nodes: the figures of every node, by stage and replica.
        absent: the first node that does not take requests, and its state, in words; empty if all do.
    """

    seconds: float
    answered: int
    full_s: float
    nodes: Mapping[ReplicaKey, NodeWindow]
    absent: str = ""

    def __add__(self, later: Window) -> Window:
        """This window and the one that follows it, as one. Nodes that are in one of them only do not count."""
        nodes = {**self.nodes, **later.nodes}
        for key, node in nodes.items():
            before = self.nodes.get(key)
            if before is not None and key in later.nodes and before.device == node.device:
                nodes[key] = replace(node, runs=added(before.runs, node.runs), trouble=before.trouble or node.trouble)
            else:
                nodes[key] = replace(node, trouble=node.trouble or "is new or gone")
        return Window(
            seconds=self.seconds + later.seconds,
            answered=self.answered + later.answered,
            full_s=self.full_s + later.full_s,
            nodes=nodes,
            absent=self.absent or later.absent,
        )

    @property
    def trouble(self) -> str:
        """Why the figures of one of its nodes do not count, in words; empty if all do."""
        if self.absent:
            return self.absent
        return next((f"node {s}.{r} {n.trouble}" for (s, r), n in self.nodes.items() if n.trouble), "")

    @property
    def stages(self) -> Mapping[int, Sequence[NodeWindow]]:
        """The nodes of every stage whose figures count."""
        stages: dict[int, list[NodeWindow]] = {stage: [] for stage, _ in self.nodes}
        for (stage, _), node in self.nodes.items():
            if not node.trouble:
                stages[stage].append(node)
        return stages

    def bottleneck(self) -> tuple[int, float]:
        """The slowest stage, and its session time per request in ns, divided by its nodes.

        The balance policy sends more requests to faster nodes, so the mean over all nodes is that of the faster ones
        more than of the slower ones. Every stage must have requests.
        """
        times = {
            stage: node_ns / requests / len(self.stages[stage])
            for stage, (requests, node_ns) in ((s, total(runs)) for s, runs in self.pooled().items())
        }
        slowest = max(times, key=lambda stage: (times[stage], -stage))
        return slowest, times[slowest]

    def pooled(self) -> dict[int, Runs]:
        """The figures of every stage that count, over all its nodes."""
        stages: dict[int, Runs] = {}
        for stage, nodes in self.stages.items():
            stages[stage] = {}
            for node in nodes:
                stages[stage] = added(stages[stage], node.runs)
        return stages

    def fewest(self) -> tuple[int, int]:
        """The stage with the fewest requests that count, and their number."""
        counts = {stage: total(runs)[0] for stage, runs in self.pooled().items()}
        stage = min(counts, key=lambda each: (counts[each], each))
        return stage, counts[stage]

    def is_enough(self, settings: DriftSettings) -> bool:
        """Whether its figures can be compared."""
        return self.seconds >= settings.window_s and self.fewest()[1] >= settings.requests


def window_between(before: Look, after: Look, devices: Mapping[ReplicaKey, str], *, full: float) -> Window:
    """What happened between two looks at the same pipeline.

    Args:
        before: the earlier look.
        after: the later look.
        devices: name of the device of every node.
        full: share of the time in which the pipeline was full, 0 to 1.
    """
    earlier = {(node.stage, node.replica): node for node in before.nodes}
    nodes = {}
    absent = ""
    for node in after.nodes:
        key = node.stage, node.replica
        known = earlier.get(key)
        nodes[key] = NodeWindow(
            device=devices[key],
            runs=_subtracted(node.by_cost, known.by_cost if known is not None else {}),
            trouble=_trouble(known, node),
        )
        if node.state != _READY and not absent:
            absent = f"node {node.stage}.{node.replica} is not ready: {node.state}"
    seconds = (after.now_ns - before.now_ns) / 1e9
    answered = after.answered - before.answered
    return Window(seconds=seconds, answered=answered, full_s=full * seconds, nodes=nodes, absent=absent)


def _trouble(before: NodeStats | None, after: NodeStats) -> str:
    """Why the figures of a node between two looks do not count."""
    if before is None:
        return "is new"
    if after.restarts != before.restarts or after.pid != before.pid:
        return "was lost"
    if after.failures != before.failures:
        return "could not execute a request"
    if after.state != _READY:
        return f"is not ready: {after.state}"
    return "" if before.state == _READY else f"was not ready: {before.state}"


def added(one: Runs, other: Runs) -> dict[int, tuple[int, int]]:
    """The requests and session times of both, by cost."""
    sums = dict(one)
    for cost, (requests, ran_ns) in other.items():
        before = sums.get(cost, (0, 0))
        sums[cost] = before[0] + requests, before[1] + ran_ns
    return sums


def _subtracted(later: Runs, earlier: Runs) -> dict[int, tuple[int, int]]:
    negative = {cost: (-requests, -ran_ns) for cost, (requests, ran_ns) in earlier.items()}
    return {cost: runs for cost, runs in added(later, negative).items() if runs[0] > 0}


def total(runs: Runs) -> tuple[int, int]:
    """The number of requests of all costs, and the sum of their session times in nanoseconds."""
    return sum(requests for requests, _ in runs.values()), sum(ran_ns for _, ran_ns in runs.values())
