"""The nodes of a pipeline as its coordinator sees them: who serves, who comes, who goes. Pure.

A *slot* is a replica of a stage that there is to be; a :class:`NodeRecord` is one process in it, an incarnation, with a
number that no other process of the pipeline has. :data:`TRANSITIONS` is what an incarnation goes through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from msgspec import Struct

from onnxsplit.cluster import LOCAL
from runtime.balance.board import PEERS
from runtime.coordinator.counters import NodeCounters
from runtime.timings import Timings
from runtime.topology import ReplicaKey
from runtime.transition_table import Machine
from runtime.wire.messages.control import PROTOCOL, Fate, Hello, Peer
from runtime.wire.messages.data import Visit

_SETTLED_REQUESTS = 20
_INCIDENTS = 100
_ASKED_AGAIN_NS = 60 * 10**9  # a node that was refused a place and asks within this time has kept asking


class Phase(Enum):
    """Of a process in a slot. The values are what users read."""

    BACKOFF = "restarts soon"
    OPEN = "circuit open"
    STARTED = "starting"
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    GONE = "gone"


class NodeChange(Enum):
    """What happens to it."""

    START = "start"
    JOIN = "reports"
    PREPARE = "has its links"
    LEAVE = "is to leave"
    LOSE = "is lost"
    TRIP = "is lost once too often"
    END = "is not needed"


_ALIVE = (Phase.STARTED, Phase.LOADING, Phase.READY)

TRANSITIONS: Mapping[tuple[Phase, NodeChange], Phase] = {
    (Phase.BACKOFF, NodeChange.START): Phase.STARTED,
    (Phase.OPEN, NodeChange.START): Phase.STARTED,
    (Phase.STARTED, NodeChange.JOIN): Phase.LOADING,
    (Phase.LOADING, NodeChange.PREPARE): Phase.READY,
    (Phase.READY, NodeChange.PREPARE): Phase.READY,
    (Phase.LEAVING, NodeChange.PREPARE): Phase.LEAVING,
    (Phase.READY, NodeChange.LEAVE): Phase.LEAVING,
    **{(phase, NodeChange.LOSE): Phase.BACKOFF for phase in _ALIVE},
    **{(phase, NodeChange.TRIP): Phase.OPEN for phase in _ALIVE},
    **{(phase, NodeChange.END): Phase.GONE for phase in Phase if phase is not Phase.GONE},
}


class StartNode(Struct, frozen=True):
    """Start a process for a slot; it will have this number."""

    slot: ReplicaKey
    number: int


class KillNode(Struct, frozen=True):
    """The process with this number is to be ended at once."""

    number: int


@dataclass(eq=False)
class NodeRecord:
    """One process in a slot."""

    slot: ReplicaKey
    counters: NodeCounters
    machine: Machine[Phase, NodeChange]
    number: int = -1
    identity: bytes = b""
    hello: Hello | None = None
    introduced: bool = False
    mapped: frozenset[int] = frozenset()
    readers: tuple[int, ...] = ()
    started_ns: int = 0
    ready_ns: int = 0
    requests: int = 0
    failed_in_row: int = 0
    due_ns: int = 0
    reason: str = ""
    leaves_at: int = 0
    released: bool = False

    @property
    def phase(self) -> Phase:
        """Where it is in its life."""
        return self.machine.state

    @property
    def failures(self) -> int:
        """Requests that could not be executed."""
        return self.counters.failures

    @failures.setter
    def failures(self, count: int) -> None:
        self.counters.failures = count

    @property
    def called(self) -> str:
        """As messages name it."""
        stage, replica = self.slot
        where = f", pid {self.hello.pid} on {self.hello.host}" if self.hello is not None else ""
        return f"stage {stage} (node {stage}.{replica}{where})"


class Incident(Struct, frozen=True):
    """A node that was lost, or cannot reach another: when, by the host's monotonic clock, which, and why."""

    at_ns: int
    slot: ReplicaKey
    story: str


class Refusal(Struct, frozen=True):
    """Why a node gets no place, what is to become of it, and whether it was refused before and keeps asking."""

    reason: str
    fate: Fate
    again: bool = False


class Roster:
    """All nodes.

    Args:
        replicas: number of nodes of every stage.
        timings: when to start a lost one again.
        hosts: where the plan has the node of a slot; a node that reports from there fills it first.
        elastic: a node that reports for a stage without a free slot gets one of its own, which goes with it.

    Attributes:
        nodes: the present process of every slot.
        departing: processes that were replaced, or are not needed, and still have work.
        counters: of every slot there ever was.
        view: counts the changes that nodes were told.
        mapped: peers whose memory the coordinator has mapped.
        dead_ends: numbers of nodes from which a request cannot go on; they take none while others do.
        incidents: the nodes that were lost, first ones first.
    """

    def __init__(
        self,
        replicas: tuple[int, ...],
        timings: Timings,
        *,
        hosts: Mapping[ReplicaKey, str] | None = None,
        elastic: bool = False,
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
        self._planned = list(replicas)
        self._last = 0
        self._own_readers: tuple[int, ...] = ()
        self._served: frozenset[int] | None = None  # worked out again when a node comes or goes
        self._refused: dict[tuple[str, int], int] = {}  # when processes, by host and pid, were refused a place last
        for stage, count in enumerate(replicas):
            for replica in range(count):
                self.nodes[stage, replica] = self._record((stage, replica))

    def __iter__(self) -> Iterator[NodeRecord]:
        yield from self.nodes.values()
        yield from self.departing

    def _record(self, slot: ReplicaKey) -> NodeRecord:
        counters = self.counters.setdefault(slot, NodeCounters())
        return NodeRecord(slot, counters, Machine(f"node {slot[0]}.{slot[1]}", TRANSITIONS, Phase.BACKOFF))

    def _add(self, slot: ReplicaKey) -> NodeRecord:
        self.nodes[slot] = self._record(slot)
        self.nodes = dict(sorted(self.nodes.items()))
        return self.nodes[slot]

    # Who is there

    def by_identity(self, identity: bytes) -> NodeRecord | None:
        """The node that reported under an identity."""
        return next((record for record in self if record.identity == identity), None)

    def by_number(self, number: int) -> NodeRecord | None:
        """The node with a number."""
        return next((record for record in self if record.number == number), None)

    def stage_of(self, number: int) -> int | None:
        """The stage of the node with a number."""
        record = self.by_number(number)
        return record.slot[0] if record is not None else None

    @property
    def linked(self) -> frozenset[int]:
        """Numbers of the processes that are to reach each other: all but those that were told to end."""
        return frozenset({0, *(record.number for record in self if not record.released)})

    def missing(self) -> tuple[ReplicaKey, ...]:
        """The slots whose nodes are not ready."""
        return tuple(slot for slot, record in self.nodes.items() if record.phase is not Phase.READY)

    def name_of(self, number: int) -> str:
        """What messages call a process."""
        record = self.by_number(number)
        return f"node {record.slot[0]}.{record.slot[1]}" if record is not None else "the coordinator"

    def takers(self, stage: int) -> tuple[int, ...]:
        """Of the nodes of a stage that take requests."""
        return tuple(r.number for slot, r in self.nodes.items() if slot[0] == stage and r.phase is Phase.READY)

    def numbers(self, stage: int) -> tuple[int, ...]:
        """Of the nodes of a stage that have work or take it."""
        return tuple(r.number for r in self if r.slot[0] == stage and r.phase in (Phase.READY, Phase.LEAVING))

    @property
    def served(self) -> frozenset[int]:
        """The stages of which a node takes requests."""
        if self._served is None:
            self._served = frozenset(slot[0] for slot, r in self.nodes.items() if r.phase is Phase.READY)
        return self._served

    def broken(self, stage: int) -> str | None:
        """Why a stage will have no node for a while; None when it has one, or will soon."""
        records = [record for slot, record in self.nodes.items() if slot[0] == stage]
        if any(record.phase is not Phase.OPEN for record in records):
            return None
        last = records[0]
        return f"{last.called} failed {last.failed_in_row} times in a row and {last.reason}"

    def peers(self, to: NodeRecord | None, *, everyone: bool) -> tuple[Peer, ...]:
        """All nodes, as ``to`` is told; ``everyone``: also those that are loading."""
        known = {Phase.READY, Phase.LEAVING} | ({Phase.LOADING} if everyone else set())
        return tuple(
            Peer(
                number=record.number,
                stage=record.slot[0],
                replica=record.slot[1],
                takes=record.phase is not Phase.LEAVING and record.number not in self.dead_ends,
                address=record.hello.address,
                shortcut=record.hello.shortcut,
                memory=record.hello.memory,
                key=record.hello.key,
            )
            for record in self
            if record.hello is not None and (record.phase in known or record is to)
        )

    # Who comes

    def due(self, now_ns: int) -> list[StartNode]:
        """Start what is to be started by now."""
        found = [
            record
            for record in self.nodes.values()
            if record.phase in (Phase.BACKOFF, Phase.OPEN) and record.due_ns <= now_ns
        ]
        return [self._start(record, now_ns) for record in found]

    def _start(self, record: NodeRecord, now_ns: int) -> StartNode:
        record.machine.go(NodeChange.START)
        record.number = self._number()
        record.started_ns = now_ns
        record.hello, record.introduced, record.requests = None, False, 0
        record.mapped, record.readers = frozenset(), ()
        return StartNode(record.slot, record.number)

    def _number(self) -> int:
        """The next one that is free; numbers come back late, when nothing of their last owner is under way."""
        taken = {record.number for record in self}
        while True:
            self._last = self._last % (PEERS - 1) + 1
            if self._last not in taken:
                return self._last

    def late(self, now_ns: int, patience_s: float) -> list[tuple[int, str]]:
        """Numbers of nodes that were started and should be ready by now, and what is wrong with them."""
        return [
            (record.number, f"was not ready {patience_s:.0f} s after its start")
            for record in self.nodes.values()
            if record.phase in (Phase.STARTED, Phase.LOADING) and now_ns - record.started_ns > patience_s * 1e9
        ]

    def join(self, identity: bytes, hello: Hello, now_ns: int, *, open_: bool) -> NodeRecord | Refusal | None:
        """A node reports: the record it fills, why it cannot, or None when it is known already."""
        if hello.protocol != PROTOCOL:
            return Refusal(
                f"the node speaks protocol {hello.protocol}, the coordinator {PROTOCOL}: install the same version",
                "refused",
            )
        if hello.stage >= len(self._planned):
            return Refusal(
                f"the node wants stage {hello.stage}, and the plan has the stages 0 to {len(self._planned) - 1}",
                "refused",
            )
        if self.by_identity(identity) is not None:
            return None
        free = [
            record
            for (stage, replica), record in self.nodes.items()
            if record.phase is Phase.STARTED
            and hello.number in (0, record.number)
            and hello.stage in (-1, stage)
            and hello.replica in (-1, replica)
        ]
        if open_ and not free and self._elastic and 0 <= hello.stage < len(self._planned):
            free = self._extended(hello.stage, now_ns)
        if not open_ or not free:
            wish = f"stage {hello.stage}" if hello.stage >= 0 else "any stage"
            reason = f"no node is wanted for {wish}: all {len(self.nodes)} places are taken"
            if self._elastic and hello.stage < 0:
                reason += "; started with --stage N it would get a place of its own"
            return Refusal(reason, "rejoin" if open_ else "end", again=self._asks_again(hello, now_ns))
        self._refused.pop((hello.host, hello.pid), None)
        record = min(free, key=lambda record: self._strangeness(record, hello))
        record.machine.go(NodeChange.JOIN)
        record.identity, record.hello, record.started_ns = identity, hello, now_ns
        return record

    def _asks_again(self, hello: Hello, now_ns: int) -> bool:
        """True when a process that gets no place was refused one before, not long ago."""
        process = hello.host, hello.pid
        self._refused = {p: at for p, at in self._refused.items() if now_ns - at < _ASKED_AGAIN_NS}
        again = process in self._refused
        self._refused[process] = now_ns
        return again

    def _extended(self, stage: int, now_ns: int) -> list[NodeRecord]:
        """One more slot of a stage, for a node that is there already; none when there are no numbers left."""
        if sum(1 for _ in self) + 1 >= PEERS:
            return []
        record = self._add((stage, next(n for n in range(PEERS) if (stage, n) not in self.nodes)))
        self._start(record, now_ns)
        return [record]

    def _strangeness(self, record: NodeRecord, hello: Hello) -> int:
        """How little a node is the one the plan has in a slot; the first of equals is taken."""
        host = self._hosts.get(record.slot, LOCAL)
        return 0 if host == hello.host else 1 if host == LOCAL else 2

    def _surplus(self, stage: int) -> bool:
        """True when a stage has more slots than there are to be, for nodes that came by themselves."""
        return self._elastic and sum(slot[0] == stage for slot in self.nodes) > self._planned[stage]

    def introduced(self, *, everyone: bool) -> tuple[bytes, ...]:
        """Identities of the nodes to be told of a change; ``everyone``: those too that were told nothing yet."""
        found = [
            record
            for record in self
            if record.phase in (Phase.READY, Phase.LEAVING)
            or (record.phase is Phase.LOADING and (everyone or record.introduced))
        ]
        return tuple(record.identity for record in found)

    def prepare(self, record: NodeRecord, mapped: tuple[int, ...], now_ns: int) -> bool:
        """A node's links are as it was told last; True when it is a new one."""
        is_new = record.phase is Phase.LOADING
        record.machine.go(NodeChange.PREPARE)
        record.mapped = frozenset(mapped)
        if is_new:
            record.ready_ns = now_ns
            self._served = None
        return is_new

    def share(self) -> list[tuple[bytes | None, tuple[int, ...]]]:
        """Who from now on reads whose memory, where that changed: lent to those who can read it and be read."""
        serving = [record for record in self if record.phase in (Phase.READY, Phase.LEAVING)]
        mapped = {0: self.mapped} | {record.number: record.mapped for record in serving}

        def readers(number: int) -> tuple[int, ...]:
            return tuple(other for other in sorted(mapped[number]) if number in mapped.get(other, ()))

        changed: list[tuple[bytes | None, tuple[int, ...]]] = []
        if (own := readers(0)) != self._own_readers:
            self._own_readers = own
            changed.append((None, own))
        for record in serving:
            if (found := readers(record.number)) != record.readers:
                record.readers = found
                changed.append((record.identity, found))
        return changed

    # What they do

    def visited(self, visit: Visit) -> None:
        """A request that was answered passed a node."""
        counters = self.counters.get((visit.stage, visit.replica))
        if counters is None:
            return
        counters.add(visit)
        record = self.nodes.get((visit.stage, visit.replica))
        if record is not None:
            record.requests += 1

    # Who goes

    def lose(self, record: NodeRecord, reason: str, now_ns: int) -> list[StartNode]:
        """A process is gone. Its slot gets another one, now or when it is due."""
        self._served = None
        if record in self.departing:
            self.departing.remove(record)
            record.machine.go(NodeChange.END)
            if not record.released:
                self._note(record, reason, now_ns)
            return []
        served = record.phase is Phase.READY and (
            now_ns - record.ready_ns > self._timings.settled_s * 1e9 or record.requests >= _SETTLED_REQUESTS
        )
        self._note(record, reason, now_ns)
        if self._surplus(record.slot[0]):
            record.machine.go(NodeChange.END)
            record.number = -1
            del self.nodes[record.slot]
            return []
        record.counters.restarts += 1
        record.failed_in_row = 1 if served else record.failed_in_row + 1
        record.reason = reason
        record.number = -1
        if record.failed_in_row >= self._timings.circuit_failures:
            record.machine.go(NodeChange.TRIP)
            record.due_ns = now_ns + int(self._timings.circuit_s * 1e9)
            return []
        record.machine.go(NodeChange.LOSE)
        wait_s = 0.0
        if record.failed_in_row > 1:
            wait_s = min(self._timings.backoff_s * 2 ** (record.failed_in_row - 2), self._timings.backoff_most_s)
        record.due_ns = now_ns + int(wait_s * 1e9)
        return self._due_at_once(record, now_ns)

    def _note(self, record: NodeRecord, reason: str, now_ns: int) -> None:
        self.losses += 1
        self.incidents.append(Incident(now_ns, record.slot, f"{record.called} {reason}"))

    def note_link(self, sender: int, receiver: int, story: str, now_ns: int) -> None:
        """Remember that a link is dead."""
        record = self.by_number(sender) or self.by_number(receiver)
        if record is not None:
            self.incidents.append(Incident(now_ns, record.slot, story))

    def _due_at_once(self, record: NodeRecord, now_ns: int) -> list[StartNode]:
        """Start the process of a slot, when it is due."""
        return [self._start(record, now_ns)] if record.due_ns <= now_ns else []

    def leave(self, record: NodeRecord) -> None:
        """A node takes no more requests; it ends when it has no more work."""
        self._served = None
        record.machine.go(NodeChange.LEAVE)
        del self.nodes[record.slot]
        self.departing.append(record)

    def replace(self, record: NodeRecord, now_ns: int) -> list[StartNode]:
        """Another process takes the place of one that leaves, unless it had come by itself."""
        if self._elastic and sum(slot[0] == record.slot[0] for slot in self.nodes) >= self._planned[record.slot[0]]:
            return []
        return self._due_at_once(self._add(record.slot), now_ns)

    def scale(self, stage: int, replicas: int, now_ns: int) -> tuple[list[StartNode], list[NodeRecord]]:
        """Make it so many slots; returns what is to be started, and the records whose slots are gone."""
        self._planned[stage] = replicas
        present = sorted(slot for slot in self.nodes if slot[0] == stage)
        started: list[StartNode] = []
        free = (number for number in range(PEERS) if (stage, number) not in self.nodes)
        for _ in range(replicas - len(present)):
            started += self._due_at_once(self._add((stage, next(free))), now_ns)
        removed = [self.nodes[slot] for slot in present[replicas:]]
        for record in removed:
            if record.phase is not Phase.READY:
                record.machine.go(NodeChange.END)
                del self.nodes[record.slot]
        return started, removed
