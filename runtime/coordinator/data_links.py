"""The coordinator's data links to the nodes, and the nodes' state as their shared memory shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from onnxsplit.plan import Plan
from runtime.balance.router import Router
from runtime.coordinator.events import Steps
from runtime.coordinator.state import CoordinatorState
from runtime.errors import PipelineError
from runtime.memory.payloads import Payloads
from runtime.memory.sender import Sender
from runtime.topology import sources
from runtime.wire.links import Outlet
from runtime.wire.messages.control import Memory, Peer
from runtime.wire.messages.data import AttemptKey, Step
from runtime.wire.sockets import Sockets


class DataLinks:
    """Data links to all nodes. Callers of its methods hold the lock of the requests.

    Args:
        plan: the plan that the nodes execute.
        machine: the coordinator's state machine, which is only read here.
        payloads: the caller's side of shared memory.
        router: chooses among replicas.

    Attributes:
        outlets: a link to each node, by number.
        started: the attempt that each node on another host began last, by the node's number.
        sender: sends the inputs of requests to the nodes.
    """

    def __init__(self, plan: Plan, machine: CoordinatorState, payloads: Payloads, router: Router) -> None:
        self.outlets: dict[int, Outlet] = {}
        self.started: dict[int, AttemptKey] = {}
        self._machine = machine
        self._payloads = payloads
        self._router = router
        self._sources = {stage.index: sorted(sources(plan, stage.index)) for stage in plan.stages}
        self.sender = Sender(payloads, router, self.outlets, self._sources)

    def choose(self, stage: int, cost: int) -> int | None:
        """The node that is to execute a stage that joins several inputs; None when there is none."""
        links = self._machine.links
        avoid = links.avoided(stage) if links.stories else frozenset()
        return self._router.choose(stage, self._sources[stage], cost, 0, time.monotonic_ns(), avoid=avoid)

    @property
    def memory(self) -> Memory | None:
        """What nodes need to map the caller's shared memory."""
        return self._payloads.memory

    def lend_memory(self, readers: Sequence[int]) -> None:
        """Lend the caller's memory to these nodes."""
        self._payloads.share(readers, self.outlets)

    def meet(self, caller: Peer, peers: Sequence[Peer], sockets: Sockets) -> tuple[tuple[int, ...], dict[int, str]]:
        """Connect to the present nodes: map their memory, open and close links.

        Returns:
            the numbers of the nodes whose memory is mapped, and why some nodes cannot be reached, by number.
        """
        nodes = {peer.number: peer for peer in peers}
        mapped = self._payloads.meet(0, nodes)
        self._router.learn(0, (caller, *peers), self._payloads.boards())
        for number in self.outlets.keys() - nodes.keys():
            self.outlets.pop(number).close()
            self.started.pop(number, None)
        failures = {}
        for number in nodes.keys() - self.outlets.keys():
            peer = nodes[number]
            shortcut = peer.shortcut if number in mapped else ""
            try:
                self.outlets[number] = sockets.connect(peer.address, shortcut=shortcut, key=peer.key)
            except PipelineError as error:
                failures[number] = f"cannot be reached: {error}"
        return mapped, failures

    def look_at_links(self) -> frozenset[int]:
        """The unreachable nodes among those to which the coordinator sends inputs.

        Nothing is sent to them while other replicas of their stages can be reached.
        """
        roster, outlets = self._machine.roster, self.outlets
        entrances = {number for stage in self._machine.entrances for number in roster.numbers(stage)}
        unreachable = frozenset(number for number in entrances & outlets.keys() if not outlets[number].connected)
        self._router.unreachable = unreachable
        return unreachable

    def steps(self) -> Steps:
        """The progress of all nodes with all attempts in flight, from their shared memory or their messages."""
        numbers = [node.number for node in self._machine.roster if node.number >= 0]
        steps: dict[AttemptKey, dict[int, Step]] = {}
        for key in self._machine.work.in_flight:
            steps[key] = {n: step for n in numbers if (step := self._payloads.step(n, *key)) is not Step.UNKNOWN}
        for number, key in self.started.items():
            if key in steps:
                steps[key].setdefault(number, Step.RUNNING)
        return steps

    def waiting(self) -> dict[int, float]:
        """The number of requests that wait before each node, without the one that runs, by number.

        What is known is the cost of the work that was sent there, so this is a number of requests of mean cost.
        """
        requests, queues = self._machine.requests, self.queues()
        mean = max(1.0, requests.cost / max(1, len(requests)))
        return {number: max(0, cost - self._router.running(number)) / mean for number, cost in queues.items()}

    def queues(self) -> dict[int, int]:
        """The cost of the outstanding work of each node, by number."""
        most = self._machine.requests.cost  # a single replica on another host reports only twice a second
        return {number: min(most, self._router.outstanding(number)) for number in self._router.known - {0}}
