"""Gives :class:`~runtime.balance.autoscale.Autoscaler` its figures, and carries out what it decides.

It runs in the coordinator's thread, at each heartbeat. What a node did is taken from the answers that have arrived and
from its own heartbeat, so it costs no messages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from onnxsplit.machine_load import CpuTimes, cpu_times, process_cpu_s
from onnxsplit.memory import free_memory_bytes
from onnxsplit.plan import Stage
from onnxsplit.session import host_cores
from runtime.balance.autoscale import Autoscaler, HostLoad, StageLoad, StageTerms
from runtime.balance.policies import UNIT_COST
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import CoordinatorEvent, Declined, Lost, Scaled
from runtime.coordinator.node_record import NodeRecord, Phase
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.setup import Setup
from runtime.coordinator.state import CoordinatorState
from runtime.launcher import PROCESS_BYTES, Handle
from runtime.logs import log_event

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
        self._host: CpuTimes = cpu_times()
        self._ran_ns: dict[int, int] = {}  # by the number of the node, also the run that is under way
        self._cpu_s: dict[int, float] = {}

    def look(self, now_ns: int) -> list[CoordinatorEvent]:
        """Look at the load; returns the events that change the number of nodes."""
        if self._machine.state is not PipelinePhase.READY:
            return []
        try:
            host = self._host_load(now_ns)
        except OSError:  # this process has no descriptors left, for example; requests must go on
            return []
        events: list[CoordinatorEvent] = []
        for decision in self._rule.look(now_ns, self._loads(), host):
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

    def _loads(self) -> list[StageLoad]:
        """What happened at every stage since the last look."""
        with self._lock:
            queues, sequences = self._links.queues(), self._machine.sequences
            nodes = list(self._machine.roster.nodes.values())
            ran_ns = {node.number: self._ran(node) for node in nodes if node.phase is Phase.READY}
            waiting = sequences.waiting if sequences is not None else 0
            running = len(sequences) - waiting if sequences is not None else 0
        cpu_s = {number: process_cpu_s(self._handles[number].pid) for number in ran_ns if number in self._handles}
        loads = []
        for stage in range(len(self._machine.roster.planned)):
            ready = [node.number for node in nodes if node.slot[0] == stage and node.number in ran_ns]
            taken = self._taken(running, len(ready))
            loads.append(
                StageLoad(
                    ready=len(ready),
                    pending=sum(node.slot[0] == stage for node in nodes) - len(ready),
                    busy_s=taken * sum(ran_ns[n] - self._ran_ns.get(n, ran_ns[n]) for n in ready) / 1e9,
                    cpu_s=taken * sum(max(0.0, cpu_s[n] - self._cpu_s.get(n, cpu_s[n])) for n in ready if n in cpu_s),
                    waiting=sum(max(0.0, queues.get(n, 0) / UNIT_COST - 1) for n in ready) + waiting,
                )
            )
        self._ran_ns, self._cpu_s = ran_ns, cpu_s
        return loads

    def _taken(self, running: int, nodes: int) -> float:
        """The share of the rows of a stage that sequences take, by which its time counts; 1 where there are none.

        A node that continues a single text runs all the time, and has room for more in the same runs.
        """
        return min(1.0, running / (self._rows * nodes)) if running and nodes else 1.0

    def _ran(self, node: NodeRecord) -> int:
        """How long the sessions of a slot have run, the present run included. It never falls.

        A run that has ended counts once its request is answered. Until then it counts as what was last heard of it.
        """
        return max(node.counters.run_ns + node.running_ns, self._ran_ns.get(node.number, 0))

    def _host_load(self, now_ns: int) -> HostLoad:
        before_ns, before, now = self._looked_ns, self._host, cpu_times()
        self._looked_ns, self._host = now_ns, now
        seconds = (now_ns - before_ns) / 1e9 if before_ns is not None else 0.0
        idle = now.idle_s_since(before) / seconds if seconds > 0 else 0.0
        return HostLoad(
            processors=self._processors,
            idle_processors=min(idle, float(self._processors)),
            free_bytes=free_memory_bytes(),
        )


def _replica_bytes(setup: Setup, stage: Stage) -> int:
    """The memory that one more node of a stage takes, at most.

    Nodes that share weights map the copy that is there. The plan does not say how much of a stage's memory packed
    copies are, so these count nevertheless.
    """
    own = stage.peak_memory_bytes - (stage.weight_bytes if setup.share_weights[stage.index] else 0)
    caches = setup.sequences.cache_bytes if setup.sequences is not None else 0
    return max(0, own) + caches + PROCESS_BYTES
