"""The coordinator's record of all nodes: those that serve, join and leave. Pure.

The roster keeps one :class:`~runtime.coordinator.node_record.NodeRecord` for each slot, and one for each process that
was replaced and still has work. It decides which process fills which slot, when a lost one is started again, and which
processes read whose memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping

from onnxsplit.cluster import LOCAL
from runtime.balance.board import PEERS
from runtime.coordinator.counters import NodeCounters
from runtime.coordinator.events import StartNode
from runtime.coordinator.node_record import TRANSITIONS, Incident, NodeChange, NodeRecord, Phase
from runtime.coordinator.refusals import Refusal, Refusals
from runtime.timings import Timings
from runtime.topology import ReplicaKey
from runtime.transition_table import Machine
from runtime.wire.messages.control import PROTOCOL, Hello, Peer, Wire
from runtime.wire.messages.data import Visit

_SETTLED_REQUESTS = 20  # after this many answered requests, a node's earlier failures are forgotten
_INCIDENTS = 100
_NUMBER_WAIT_NS = 10**9  # time until a process that found no free number is due again
_SERVING = (Phase.READY, Phase.LEAVING)


class Roster:
    """All nodes of a pipeline.

    Args:
        replicas: the number of nodes of every stage.
        timings: when to start a lost node again.
        hosts: the host for which the plan has the node of a slot; a node that reports from there fills it first.
        elastic: a node that reports for a stage without a free slot gets a new one, which is removed when the node
            leaves.
        process_numbers: how many numbers there are for processes, the coordinator's own included.

    Attributes:
        nodes: the present process of every slot, by slot, in order.
        departing: the processes that were replaced or are no longer needed, and still have work.
        counters: the counters of every present and former slot.
        view: the number of changes that nodes were told about.
        mapped: the processes whose memory the coordinator has mapped.
        dead_ends: the numbers of nodes whose requests cannot get back to the caller; they take none while others do.
        incidents: the lost nodes and dead links, oldest first.
        losses: the number of nodes that were lost.
        planned: the number of nodes that every stage is to have.
    """

    def __init__(
        self,
        replicas: tuple[int, ...],
        timings: Timings,
        *,
        hosts: Mapping[ReplicaKey, str] | None = None,
        elastic: bool = False,
        process_numbers: int = PEERS,
    ) -> None:
        self.nodes: dict[ReplicaKey, NodeRecord] = {}
        self.departing: list[NodeRecord] = []
        self.counters: dict[ReplicaKey, NodeCounters] = {}
        self.view = 0
        self.mapped: frozenset[int] = frozenset()
        self.dead_ends: frozenset[int] = frozenset()
        self.incidents: deque[Incident] = deque(maxlen=_INCIDENTS)
        self.losses = 0
        self._timings = timings
        self._hosts = hosts or {}
        self._elastic = elastic
        self._process_numbers = process_numbers
        self.planned = list(replicas)
        self._last_number = 0
        self._own_readers: tuple[int, ...] = ()
        self._served: frozenset[int] | None = None  # computed again when a node joins or leaves
        self._refusals = Refusals()
        for stage, count in enumerate(replicas):
            for replica in range(count):
                self.nodes[stage, replica] = self._new((stage, replica))

    def __iter__(self) -> Iterator[NodeRecord]:
        yield from self.nodes.values()
        yield from self.departing

    def _new(self, slot: ReplicaKey) -> NodeRecord:
        counters = self.counters.setdefault(slot, NodeCounters())
        return NodeRecord(slot, counters, Machine(f"node {slot[0]}.{slot[1]}", TRANSITIONS, Phase.BACKOFF))

    def _add(self, slot: ReplicaKey) -> NodeRecord:
        self.nodes[slot] = self._new(slot)
        self.nodes = dict(sorted(self.nodes.items()))
        return self.nodes[slot]

    # Present nodes

    def by_identity(self, identity: bytes) -> NodeRecord | None:
        """The node with a control link of this identity."""
        return next((node for node in self if node.identity == identity), None)

    def by_number(self, number: int) -> NodeRecord | None:
        """The node with a number."""
        return next((node for node in self if node.number == number), None)

    def stage_of(self, number: int) -> int | None:
        """The stage of the node with a number."""
        node = self.by_number(number)
        return node.slot[0] if node is not None else None

    @property
    def linked(self) -> frozenset[int]:
        """The numbers of the processes that must reach each other: all except those that were told to end."""
        return frozenset({0, *(node.number for node in self if not node.released)})

    def missing(self) -> tuple[ReplicaKey, ...]:
        """The slots whose nodes are not ready."""
        return tuple(slot for slot, node in self.nodes.items() if node.phase is not Phase.READY)

    def name_of(self, number: int) -> str:
        """The name of a process in messages."""
        node = self.by_number(number)
        return f"node {node.slot[0]}.{node.slot[1]}" if node is not None else "the coordinator"

    def takers(self, stage: int) -> tuple[int, ...]:
        """The numbers of the nodes of a stage that take requests."""
        return tuple(n.number for slot, n in self.nodes.items() if slot[0] == stage and n.phase is Phase.READY)

    def numbers(self, stage: int) -> tuple[int, ...]:
        """The numbers of the nodes of a stage that take requests or still have some."""
        return tuple(node.number for node in self if node.slot[0] == stage and node.phase in _SERVING)

    @property
    def served(self) -> frozenset[int]:
        """The stages that have a node which takes requests."""
        if self._served is None:
            self._served = frozenset(slot[0] for slot, n in self.nodes.items() if n.phase is Phase.READY)
        return self._served

    def broken(self, stage: int) -> str | None:
        """Why a stage will have no node for some time; None when it has one, or will soon."""
        nodes = [node for slot, node in self.nodes.items() if slot[0] == stage]
        if any(node.phase is not Phase.OPEN for node in nodes):
            return None
        return f"{nodes[0].called} failed {nodes[0].failed_in_row} times in a row and {nodes[0].reason}"

    def peers(self, to: NodeRecord | None, *, everyone: bool) -> tuple[Peer, ...]:
        """All nodes as ``to`` sees them; with ``everyone``, also those that are loading."""
        known = {*_SERVING, Phase.LOADING} if everyone else set(_SERVING)
        nodes = [node for node in self if node.phase in known or node is to]
        takers = self._takers(nodes)
        return tuple(
            Peer(
                number=node.number,
                stage=node.slot[0],
                replica=node.slot[1],
                takes=node.number in takers,
                address=node.hello.address,
                shortcut=node.hello.shortcut,
                memory=node.hello.memory,
                key=node.hello.key,
            )
            for node in nodes
            if node.hello is not None
        )

    def _takers(self, nodes: Collection[NodeRecord]) -> frozenset[int]:
        """The nodes that take requests. If all nodes of a stage leave, the last of them: others may have ended."""
        takers: set[int] = set()
        for stage in {node.slot[0] for node in nodes}:
            members = [node for node in nodes if node.slot[0] == stage]
            staying = [node.number for node in members if node.phase is not Phase.LEAVING]
            good = [number for number in staying if number not in self.dead_ends]
            takers.update(good or staying or [members[-1].number])
        return frozenset(takers)

    def introduce(self, identities: tuple[bytes, ...], caller: Peer, *, everyone: bool) -> Iterator[tuple[bytes, Wire]]:
        """The message for each node with all processes, ``caller`` first; records that the nodes were told."""
        by_identity = {node.identity: node for node in self}
        shared = self.peers(None, everyone=everyone)
        for identity in identities:
            node = by_identity[identity]
            node.introduced = True
            peers = shared if everyone or node.phase in _SERVING else self.peers(node, everyone=False)
            yield identity, Wire(self.view, node.number, (caller, *peers))

    # Nodes that join

    def due(self, now_ns: int) -> list[StartNode]:
        """Start the processes that are due; returns the effects."""
        return [start for node in self.nodes.values() if node.is_absent for start in self._start_if_due(node, now_ns)]

    def _start(self, node: NodeRecord, now_ns: int) -> StartNode:
        node.machine.go(NodeChange.START)
        node.number = self._number()
        node.started_ns = now_ns
        node.hello, node.introduced, node.requests = None, False, 0
        node.mapped, node.readers = frozenset(), ()
        return StartNode(node.slot, node.number)

    def _number(self) -> int:
        """The next free number. Numbers are reused as late as possible, when no trace of their last owner is left."""
        free = set(range(1, self._process_numbers)) - {node.number for node in self}
        self._last_number = min(free, key=lambda number: (number <= self._last_number, number))  # callers leave one
        return self._last_number

    def late(self, now_ns: int, patience_s: float) -> list[tuple[int, str]]:
        """The numbers of nodes that were started and should be ready by now, with the reason why they count as lost."""
        return [
            (node.number, f"was not ready {patience_s:.0f} s after its start")
            for node in self.nodes.values()
            if node.phase in (Phase.STARTED, Phase.LOADING) and now_ns - node.started_ns > patience_s * 1e9
        ]

    def join(self, identity: bytes, hello: Hello, now_ns: int, *, is_open: bool) -> NodeRecord | Refusal | None:
        """Add a node that has reported. Returns its record, or why it gets no place, or None if it already has one."""
        if hello.protocol != PROTOCOL:
            return Refusal(
                f"the node speaks protocol {hello.protocol}, the coordinator {PROTOCOL}: install the same version",
                "refused",
            )
        if hello.stage >= len(self.planned):
            return Refusal(
                f"the node wants stage {hello.stage}, and the plan has the stages 0 to {len(self.planned) - 1}",
                "refused",
            )
        if self.by_identity(identity) is not None:
            return None
        free = [
            node
            for (stage, replica), node in self.nodes.items()
            if node.phase is Phase.STARTED
            and hello.number in (0, node.number)
            and hello.stage in (-1, stage)
            and hello.replica in (-1, replica)
        ]
        if is_open and not free and self._elastic and 0 <= hello.stage < len(self.planned):
            free = self._extended(hello.stage, now_ns)
        if not is_open or not free:
            wish = f"stage {hello.stage}" if hello.stage >= 0 else "any stage"
            reason = f"no node is wanted for {wish}: all {len(self.nodes)} places are taken"
            if self._elastic and hello.stage < 0:
                reason += "; started with --stage N it would get a place of its own"
            return Refusal(reason, "rejoin" if is_open else "end", again=self._refusals.note(hello, now_ns))
        self._refusals.forget(hello)
        node = min(free, key=lambda place: self._host_mismatch(place, hello))
        node.machine.go(NodeChange.JOIN)
        node.identity, node.hello, node.started_ns = identity, hello, now_ns
        return node

    def _extended(self, stage: int, now_ns: int) -> list[NodeRecord]:
        """One more slot of a stage, for a node that has reported; none when no numbers are left."""
        if sum(1 for _ in self) + 1 >= self._process_numbers:
            return []
        node = self._add((stage, self._free_replica(stage)))
        self._start(node, now_ns)
        return [node]

    def _free_replica(self, stage: int) -> int:
        taken = {node.slot for node in self}  # also by those that leave: their answers count for their slots
        return next(n for n in range(len(taken) + 1) if (stage, n) not in taken)

    def _host_mismatch(self, node: NodeRecord, hello: Hello) -> int:
        """0 when the plan has a slot on the host of a node that reports, 1 when on any host, 2 when on another."""
        host = self._hosts.get(node.slot, LOCAL)
        return 0 if host == hello.host else 1 if host == LOCAL else 2

    def _surplus(self, stage: int) -> bool:
        """True when a stage has more slots than the requested replicas, because additional nodes have joined."""
        return self._elastic and sum(slot[0] == stage for slot in self.nodes) > self.planned[stage]

    def introduced(self, *, everyone: bool) -> tuple[bytes, ...]:
        """Identities of the nodes to be told about a change; with ``everyone``, also of nodes told nothing yet."""
        return tuple(
            node.identity
            for node in self
            if node.phase in _SERVING or (node.phase is Phase.LOADING and (everyone or node.introduced))
        )

    def prepare(self, node: NodeRecord, mapped: tuple[int, ...], now_ns: int) -> bool:
        """Record that a node has opened its links. Returns True when the node is new."""
        is_new = node.phase is Phase.LOADING
        node.machine.go(NodeChange.PREPARE)
        node.mapped, node.is_tentative = frozenset(mapped), False
        if is_new:
            node.ready_ns = now_ns
            self._served = None
        return is_new

    def share(self) -> list[tuple[bytes | None, tuple[int, ...]]]:
        """The changes in lent memory. Of two processes, each reads the other's memory, or neither does.

        Returns:
            identities of nodes, None for the coordinator, with the numbers of the processes that read their memory.
        """
        serving = [node for node in self if node.phase in _SERVING]
        mapped = {0: self.mapped} | {node.number: node.mapped for node in serving}

        def readers(number: int) -> tuple[int, ...]:
            return tuple(other for other in sorted(mapped[number]) if number in mapped.get(other, ()))

        changed: list[tuple[bytes | None, tuple[int, ...]]] = []
        if (own := readers(0)) != self._own_readers:
            self._own_readers = own
            changed.append((None, own))
        for node in serving:
            if (now := readers(node.number)) != node.readers:
                node.readers = now
                changed.append((node.identity, now))
        return changed

    # Work of nodes

    def visited(self, visit: Visit, cost: int) -> None:
        """Count an answered request of this cost for a node that it passed."""
        counters = self.counters.get((visit.stage, visit.replica))
        if counters is None:
            return
        counters.add(visit, cost)
        if (node := self.nodes.get((visit.stage, visit.replica))) is not None:
            node.requests, node.running_ns = node.requests + 1, 0

    # Nodes that leave

    def lose(self, node: NodeRecord, reason: str, now_ns: int) -> list[StartNode]:
        """Remove a process that has ended. Its slot gets another one, now or later."""
        self._served = None
        node.sequences = node.state_bytes = 0
        if node in self.departing:
            self.departing.remove(node)
            node.machine.go(NodeChange.END)
            if not node.released:
                self._note(node, reason, now_ns)
            return []
        served = node.phase is Phase.READY and (
            now_ns - node.ready_ns > self._timings.settled_s * 1e9 or node.requests >= _SETTLED_REQUESTS
        )
        self._note(node, reason, now_ns)
        if self._surplus(node.slot[0]) or node.is_tentative:
            self.planned[node.slot[0]] -= node.is_tentative
            node.machine.go(NodeChange.END)
            node.number = -1
            del self.nodes[node.slot]
            return []
        node.fail(reason, now_ns, self._timings, served=served)
        return self._start_if_due(node, now_ns)

    def _note(self, node: NodeRecord, reason: str, now_ns: int) -> None:
        self.losses += 1
        self.incidents.append(Incident(now_ns, node.slot, f"{node.called} {reason}"))

    def note_link(self, sender: int, receiver: int, story: str, now_ns: int) -> None:
        """Record a dead link as an incident."""
        node = self.by_number(sender) or self.by_number(receiver)
        if node is not None:
            self.incidents.append(Incident(now_ns, node.slot, story))

    def _start_if_due(self, node: NodeRecord, now_ns: int) -> list[StartNode]:
        """Start the process of a slot if it is due. Where nodes that leave have all numbers, it waits for one."""
        if node.due_ns <= now_ns and sum(each.number >= 0 for each in self) >= self._process_numbers - 1:
            node.due_ns = now_ns + _NUMBER_WAIT_NS
        return [self._start(node, now_ns)] if node.due_ns <= now_ns else []

    def leave(self, node: NodeRecord) -> None:
        """Let a node take no more requests. It ends when it has no more work."""
        self._served = None
        node.machine.go(NodeChange.LEAVE)
        del self.nodes[node.slot]
        self.departing.append(node)

    def replace(self, node: NodeRecord, now_ns: int) -> list[StartNode]:
        """Start another process in the place of one that leaves, unless the stage has enough slots without it."""
        if self._elastic and sum(slot[0] == node.slot[0] for slot in self.nodes) >= self.planned[node.slot[0]]:
            return []
        return self._start_if_due(self._add(node.slot), now_ns)

    def scale(
        self, stage: int, replicas: int, now_ns: int, *, tentative: bool = False
    ) -> tuple[list[StartNode], list[NodeRecord]]:
        """Set a stage's number of slots. Returns the processes to start, and the nodes whose slots were removed.

        Nodes that are not ready are removed first, then the newest. See :class:`.Scaled` for ``tentative`` ones.
        """
        self.planned[stage] = replicas
        present = [node for slot, node in self.nodes.items() if slot[0] == stage]
        started: list[StartNode] = []
        for _ in range(replicas - len(present)):
            node = self._add((stage, self._free_replica(stage)))
            node.is_tentative = tentative
            started += self._start_if_due(node, now_ns)
        present.sort(key=lambda node: (node.phase is not Phase.READY, node.is_tentative, node.slot))
        kept, removed = present[:replicas], present[replicas:]
        for node in kept:
            node.is_tentative &= tentative  # what a caller asks for is not given up
        for node in removed:
            if node.phase is not Phase.READY:
                node.machine.go(NodeChange.END)
                del self.nodes[node.slot]
        return started, removed
