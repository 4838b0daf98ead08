"""Gives :class:`~runtime.balance.autoscale.Autoscaler` its figures, and carries out what it decides.

It runs in the coordinator's thread, at each heartbeat. What a node did is taken from the answers that have arrived and
from its own heartbeat, so it costs no messages.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence

from onnxsplit.machine_load import CpuTimes, cpu_times, process_needed_s
from onnxsplit.memory import free_memory_bytes
from onnxsplit.plan import Stage
from onnxsplit.session import host_cores
from runtime.balance.autoscale import Autoscaler, HostLoad, StageLoad, StageTerms
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import CoordinatorEvent, Declined, Lost, Scaled
from runtime.coordinator.node_record import NodeRecord, Phase
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.setup import Setup
from runtime.coordinator.state import CoordinatorState
from runtime.launcher import PROCESS_BYTES, Handle
from runtime.logs import log_event

_LONG_START_S = 60.0  # a node that has been starting for longer does not hold up others
_log = logging.getLogger("runtime.coordinator")


class LoadScaling:
    """Starts and ends nodes by load. Only the coordinator's thread uses it.

    Args:
        setup: how to run the plan.
        machine: the coordinator's state machine, which is only read here.
        links: the data links to the nodes.
        lock: the lock of the requests.
        handles: the processes of the nodes, by number.
    """

    def __init__(
        self,
        setup: Setup,
        machine: CoordinatorState,
        links: DataLinks,
        lock: threading.Lock,
        handles: Mapping[int, Handle],
    ) -> None:
        terms = [
            StageTerms(
                replicas=setup.ranges[stage.index],
                threads=setup.threads or stage.threads,
                replica_bytes=_replica_bytes(setup, stage),
            )
            for stage in setup.plan.stages
        ]
        self._rule = Autoscaler(terms, up_after_s=setup.scale_up_after_s, down_after_s=setup.scale_down_after_s)
        self._machine = machine
        self._links = links
        self._lock = lock
        self._handles = handles
        self._processors = host_cores()
        self._rows = setup.sequences.rows if setup.sequences is not None else 1
        self._looked_ns: int | None = None
        self._cores = os.sched_getaffinity(0)
        self._host: CpuTimes = cpu_times(self._cores)
        self._threads = [each.threads for each in terms]
        self._ran_ns: dict[int, int] = {}  # by the number of the node, also the run that is under way
        self._needed_s: dict[int, float | None] = {}

    def look(self, now_ns: int) -> list[CoordinatorEvent]:
        """Look at the load; returns the events that change the number of nodes."""
        if self._machine.state is not PipelinePhase.READY:
            return []
        passed_s = (now_ns - self._looked_ns) / 1e9 if self._looked_ns is not None else 0.0
        try:
            host = self._host_load(now_ns)
        except OSError:  # this process has no descriptors left, for example; requests must go on
            return []
        events: list[CoordinatorEvent] = []
        for decision in self._rule.look(now_ns, self._loads(now_ns, passed_s), host):
            _log.info("%s", decision)
            if decision.after != decision.before:
                events.append(Scaled(decision.stage, decision.after, now_ns, tentative=True))
        return events

    def note(self, event: CoordinatorEvent) -> None:
        """Take note of an event that is about to be handled: a node that was added may not start."""
        roster = self._machine.roster
        node: NodeRecord | None = None
        if isinstance(event, Lost):
            node = roster.by_number(event.number)
        elif isinstance(event, Declined):
            node = roster.by_identity(event.identity)
        if isinstance(event, Lost | Declined) and node is not None and node.is_tentative:
            stage, replica = node.slot
            wait_s = self._rule.failed(stage, event.now_ns)
            log_event(
                _log,
                logging.WARNING,
                "replica given up: it did not start",
                stage=stage,
                replica=replica,
                reason=event.reason,
                next_try_s=f"{wait_s:g}",
            )

    def _loads(self, now_ns: int, passed_s: float) -> list[StageLoad]:
        """What happened at every stage since the last look, ``passed_s`` ago."""
        stages = range(len(self._machine.roster.planned))
        with self._lock:
            nodes = list(self._machine.roster.nodes.values())
            ran_ns = {node.number: self._ran(node) for node in nodes if node.phase is Phase.READY}
            ready = [[n.number for n in nodes if n.slot[0] == stage and n.number in ran_ns] for stage in stages]
            rooms = [self._room(stage, numbers) for stage, numbers in enumerate(ready)]
            waiting, queued = self._links.waiting(), self._queued
        needed_s = {n: process_needed_s(self._handles[n].pid) if n in self._handles else None for n in ran_ns}
        ran_s = {number: (ran_ns[number] - self._ran_ns.get(number, ran_ns[number])) / 1e9 for number in ran_ns}
        loads = []
        for stage, numbers, (share, kept) in zip(stages, ready, rooms, strict=True):
            others = [node for node in nodes if node.slot[0] == stage and node.number not in ran_ns]
            run_s = sum(ran_s[n] for n in numbers)
            busy_s = max(share * run_s, kept * passed_s * len(numbers))
            own_s = sum(self._since(n, needed_s[n], ran_s[n] * self._threads[stage]) for n in numbers)
            loads.append(
                StageLoad(
                    ready=len(numbers),
                    pending=len(others),
                    starting=sum(_will_be_ready(node, now_ns) for node in others),
                    busy_s=busy_s,
                    needed_s=own_s * busy_s / run_s if run_s else 0.0,
                    waiting=queued + sum(waiting.get(n, 0.0) for n in numbers),
                )
            )
        self._ran_ns, self._needed_s = ran_ns, needed_s
        return loads

    @property
    def _queued(self) -> int:
        """The sequences that wait, because no nodes have room for them."""
        return self._machine.sequences.waiting if self._machine.sequences is not None else 0

    def _room(self, stage: int, numbers: Sequence[int]) -> tuple[float, float]:
        """What sequences take of a stage's nodes: the share of the rows, and of the bytes for states.

        A node that continues a single text runs all the time, and has room for more in the same runs. So its time
        counts by the share of its rows, which is 1 where nothing but requests runs. A node without bytes for another
        sequence is busy, whether it runs or not.
        """
        sequences = self._machine.sequences
        running = len(sequences) - sequences.waiting if sequences is not None else 0
        if sequences is None or not running or not numbers:
            return 1.0, 0.0
        return min(1.0, running / (self._rows * len(numbers))), sequences.scheduler.taken(stage, numbers)

    def _since(self, number: int, needed_s: float | None, assumed_s: float) -> float:
        """The processor time that a node needed since the last look; what is assumed where the system does not say."""
        if needed_s is None:
            return assumed_s
        before_s = self._needed_s.get(number)
        return max(0.0, needed_s - before_s) if before_s is not None else 0.0

    def _ran(self, node: NodeRecord) -> int:
        """How long the sessions of a slot have run, the present run included. It never falls.

        A run that has ended counts once its request is answered. Until then it counts as what was last heard of it.
        """
        return max(node.counters.run_ns + node.running_ns, self._ran_ns.get(node.number, 0))

    def _host_load(self, now_ns: int) -> HostLoad:
        before_ns, before, now = self._looked_ns, self._host, cpu_times(self._cores)
        self._looked_ns, self._host = now_ns, now
        seconds = (now_ns - before_ns) / 1e9 if before_ns is not None else 0.0
        idle = now.idle_s_since(before) / seconds if seconds > 0 else 0.0
        return HostLoad(
            processors=self._processors,
            idle_processors=min(idle, float(self._processors)),
            free_bytes=free_memory_bytes(),
        )


def _will_be_ready(node: NodeRecord, now_ns: int) -> bool:
    """Whether a node is starting, and has not been for so long that it may never be ready."""
    return node.phase in (Phase.STARTED, Phase.LOADING) and now_ns - node.started_ns < _LONG_START_S * 1e9


def _replica_bytes(setup: Setup, stage: Stage) -> int:
    """The memory that one more node of a stage takes, at most.

    Nodes that share weights map the copy that is there. The plan does not say how much of a stage's memory packed
    copies are, so these count nevertheless.
    """
    own = stage.peak_memory_bytes - (stage.weight_bytes if setup.share_weights[stage.index] else 0)
    caches = setup.sequences.cache_bytes if setup.sequences is not None else 0
    return max(0, own) + caches + PROCESS_BYTES
