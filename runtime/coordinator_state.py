"""What a coordinator decides, without doing it: an event in, effects out. Knows no socket, no process and no clock.

The pipeline goes through these states:

    STARTING --every node Prepared--> READY            CloseAsked leads to CLOSED from everywhere
        |                               |
        +--Declined, Lost--> BROKEN <---+--Lost

and a request through these: admitted with a route (one replica of every stage it needs), then answered once: with all
tensors it asked for, or with the first error. A pipeline that lost a node is BROKEN: what is in it fails with the
node's story, and so does what comes after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush

from msgspec import Struct

from onnxsplit.plan import Plan
from runtime.balance import least_outstanding
from runtime.errors import (
    DeadlineExceeded,
    LaunchFailed,
    NodeFailed,
    PipelineClosed,
    PipelineError,
    StageFailed,
)
from runtime.messages import NOT_NEEDED, PROTOCOL, Failed, Hello, Visit

Slot = tuple[int, int]
"""A stage and a replica of it."""


class State(Enum):
    """See the drawing above."""

    STARTING = auto()
    READY = auto()
    BROKEN = auto()
    CLOSED = auto()


class NodeState(Enum):
    """Of one node, as the coordinator sees it."""

    EXPECTED = "expected"
    LOADING = "loading"
    READY = "ready"
    LOST = "lost"


@dataclass
class NodeRecord:
    """One node, and what it has done so far. Times are sums in nanoseconds."""

    slot: Slot
    state: NodeState = NodeState.EXPECTED
    identity: bytes = b""
    hello: Hello | None = None
    mapped: frozenset[int] = frozenset()
    outstanding: int = 0
    requests: int = 0
    failures: int = 0
    wait_ns: int = 0
    run_ns: int = 0
    output_bytes: int = 0
    shared_bytes: int = 0


class Joined(Struct, frozen=True):
    """A node reported."""

    identity: bytes
    hello: Hello


class Prepared(Struct, frozen=True):
    """A node has loaded its stage and set up its links; it has mapped the memory of these peers."""

    identity: bytes
    mapped: tuple[int, ...]


class Met(Struct, frozen=True):
    """The coordinator itself has mapped the memory of these nodes."""

    mapped: tuple[int, ...]


class Declined(Struct, frozen=True):
    """A node cannot do what it was assigned."""

    identity: bytes
    reason: str


class Lost(Struct, frozen=True):
    """A node is gone; the reason is its story."""

    slot: Slot
    reason: str


class Submitted(Struct, frozen=True):
    """A caller asks for tensors. ``deadline_ns`` is None for none."""

    request: int
    wanted: tuple[str, ...]
    deadline_ns: int | None


class Returned(Struct, frozen=True):
    """Tensors of a request came back, from a stage with this history."""

    request: int
    names: tuple[str, ...]
    history: tuple[Visit, ...]


class Reported(Struct, frozen=True):
    """A node says that a request failed at its stage."""

    message: Failed


class Expired(Struct, frozen=True):
    """A request's time ran out; these stages are known to have finished it."""

    request: int
    finished: frozenset[int]


class TimedOut(Struct, frozen=True):
    """The nodes did not all come up in time."""

    reason: str


class CloseAsked(Struct, frozen=True):
    """The pipeline is to end."""


Event = Joined | Met | Prepared | Declined | Lost | Submitted | Returned | Reported | Expired | TimedOut | CloseAsked


class GiveStage(Struct, frozen=True):
    """Assign a slot to a node."""

    identity: bytes
    slot: Slot


class WireAll(Struct, frozen=True):
    """Tell every node who all processes are; answer with :class:`Met`."""


class ShareMemory(Struct, frozen=True):
    """These peers read a node's memory (the coordinator's own when ``identity`` is None)."""

    identity: bytes | None
    readers: tuple[int, ...]


class SendAway(Struct, frozen=True):
    """Tell a node to end."""

    identity: bytes
    reason: str


class Announce(Struct, frozen=True):
    """The pipeline is ready, or will never be."""

    error: PipelineError | None


class Enter(Struct, frozen=True):
    """Send a request's inputs to the stages on its route that read them."""

    request: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]


class Resolve(Struct, frozen=True):
    """Give the caller its tensors; they passed these stages."""

    request: int
    visits: tuple[Visit, ...]


class Reject(Struct, frozen=True):
    """Give the caller an error."""

    request: int
    error: PipelineError


class Forget(Struct, frozen=True):
    """Tell nodes that nobody waits for a request any more."""

    request: int
    identities: tuple[bytes, ...]


Effect = GiveStage | WireAll | ShareMemory | SendAway | Announce | Enter | Resolve | Reject | Forget


@dataclass
class _Request:
    wanted: tuple[str, ...]
    route: tuple[int, ...]
    deadline_ns: int | None
    missing: set[str]
    visits: dict[int, Visit] = field(default_factory=dict)


class CoordinatorState:
    """The state machine of one coordinator.

    Args:
        plan: what the pipeline runs.
        replicas: number of nodes of every stage.
    """

    def __init__(self, plan: Plan, replicas: tuple[int, ...]) -> None:
        self.state = State.STARTING
        self.error: PipelineError | None = None
        self.nodes = {
            (stage, replica): NodeRecord((stage, replica))
            for stage, count in enumerate(replicas)
            for replica in range(count)
        }
        self._numbers = {slot: position + 1 for position, slot in enumerate(self.nodes)}
        self._plan = plan
        self._replicas = replicas
        self._requests: dict[int, _Request] = {}
        self._needed: dict[tuple[str, ...], frozenset[int]] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._mapped: frozenset[int] = frozenset()

    def handle(self, event: Event) -> list[Effect]:
        """Take an event; returns what is to be done, in order."""
        match event:
            case Submitted():
                return self._submitted(event)
            case Returned():
                return self._returned(event)
            case Joined(identity, hello):
                return self._joined(identity, hello)
            case Met(mapped):
                self._mapped = frozenset(mapped)
                return []
            case Prepared():
                return self._prepared(event)
            case Declined(identity, reason):
                record = self._by_identity(identity)
                return self._break(LaunchFailed(f"{self._called(record)}: {reason}")) if record else []
            case Lost(slot, reason):
                return self._lost(self.nodes[slot], reason)
            case Reported(message):
                return self._reported(message)
            case Expired(request, finished):
                return self._expired(request, finished)
            case TimedOut(reason):
                return self._break(LaunchFailed(reason)) if self.state is State.STARTING else []
            case CloseAsked():
                return self._close()

    def next_deadline_ns(self) -> int | None:
        """When a request's time runs out next."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expired(self, now_ns: int) -> Mapping[int, tuple[int, ...]]:
        """The requests whose time has run out, and their routes."""
        late = {}
        while (first := self.next_deadline_ns()) is not None and first <= now_ns:
            number = heappop(self._deadlines)[1]
            late[number] = self._requests[number].route
        return late

    def number(self, slot: Slot) -> int:
        """The number under which all processes know a node; 0 is the coordinator's own."""
        return self._numbers[slot]

    def missing_nodes(self) -> tuple[Slot, ...]:
        """The slots whose nodes are not ready."""
        return tuple(slot for slot, record in self.nodes.items() if record.state is not NodeState.READY)

    # Nodes

    def _joined(self, identity: bytes, hello: Hello) -> list[Effect]:
        if hello.protocol != PROTOCOL:
            reason = f"the node speaks protocol {hello.protocol}, the coordinator {PROTOCOL}: install the same version"
            return [SendAway(identity, reason)]
        if self._by_identity(identity) is not None:
            return []
        free = [
            record
            for (stage, replica), record in self.nodes.items()
            if record.state is NodeState.EXPECTED and hello.stage in (-1, stage) and hello.replica in (-1, replica)
        ]
        if self.state is not State.STARTING or not free:
            wish = f"stage {hello.stage}" if hello.stage >= 0 else "any stage"
            return [SendAway(identity, f"no node is wanted for {wish}: all {len(self.nodes)} places are taken")]
        record = free[0]
        record.identity, record.hello, record.state = identity, hello, NodeState.LOADING
        effects: list[Effect] = [GiveStage(identity, record.slot)]
        if all(node.hello is not None for node in self.nodes.values()):
            effects.append(WireAll())
        return effects

    def _prepared(self, event: Prepared) -> list[Effect]:
        record = self._by_identity(event.identity)
        if record is None or record.state is not NodeState.LOADING:
            return []
        record.state, record.mapped = NodeState.READY, frozenset(event.mapped)
        if self.state is State.STARTING and not self.missing_nodes():
            self.state = State.READY
            return [*self._shared(), Announce(None)]
        return []

    def _shared(self) -> list[Effect]:
        """Memory is lent to those who can read it and whose returns can be read."""
        mapped = {0: self._mapped} | {self._numbers[slot]: node.mapped for slot, node in self.nodes.items()}
        identities = {0: None} | {self._numbers[slot]: node.identity for slot, node in self.nodes.items()}
        return [
            ShareMemory(identity, tuple(other for other in sorted(mapped[number]) if number in mapped.get(other, ())))
            for number, identity in identities.items()
        ]

    def _lost(self, record: NodeRecord, reason: str) -> list[Effect]:
        if record.state is NodeState.LOST or self.state is State.CLOSED:
            return []
        record.state = NodeState.LOST
        kind = LaunchFailed if self.state is State.STARTING else NodeFailed
        return self._break(kind(f"{self._called(record)} {reason}"))

    def _by_identity(self, identity: bytes) -> NodeRecord | None:
        return next((node for node in self.nodes.values() if node.identity == identity), None)

    def _called(self, record: NodeRecord) -> str:
        stage, replica = record.slot
        where = f", pid {record.hello.pid} on {record.hello.host}" if record.hello is not None else ""
        return f"stage {stage} (node {stage}.{replica}{where})"

    # Requests

    def _submitted(self, event: Submitted) -> list[Effect]:
        if self.error is not None:
            return [Reject(event.request, self.error)]
        if self.state is not State.READY:
            return [Reject(event.request, PipelineClosed("the pipeline is not ready"))]
        needed = self._needed.get(event.wanted)
        if needed is None:
            needed = self._needed[event.wanted] = self._plan.stages_for(event.wanted)
        stages = range(len(self._replicas))
        route = tuple([self._choose(stage) if stage in needed else NOT_NEEDED for stage in stages])
        for stage, replica in enumerate(route):
            if replica != NOT_NEEDED:
                self.nodes[stage, replica].outstanding += 1
        self._requests[event.request] = _Request(event.wanted, route, event.deadline_ns, set(event.wanted))
        if event.deadline_ns is not None:
            heappush(self._deadlines, (event.deadline_ns, event.request))
        return [Enter(event.request, route, event.wanted)]

    def _choose(self, stage: int) -> int:
        if self._replicas[stage] == 1:
            return 0
        return least_outstanding([self.nodes[stage, r].outstanding for r in range(self._replicas[stage])])

    def _returned(self, event: Returned) -> list[Effect]:
        request = self._requests.get(event.request)
        if request is None:
            return []
        request.missing.difference_update(event.names)
        request.visits.update((visit.stage, visit) for visit in event.history)
        if request.missing:
            return []
        self._end(event.request)
        for visit in request.visits.values():
            record = self.nodes.get((visit.stage, visit.replica))
            if record is not None:
                record.requests += 1
                record.wait_ns += visit.started_ns - visit.arrived_ns
                record.run_ns += visit.ended_ns - visit.started_ns
                record.output_bytes += visit.output_bytes
                record.shared_bytes += visit.shared_bytes
        return [Resolve(event.request, tuple(request.visits.values()))]

    def _reported(self, message: Failed) -> list[Effect]:
        record = self.nodes.get((message.stage, message.replica))
        if record is None:
            return []
        record.failures += 1
        error = StageFailed(f"{self._called(record)} could not execute the request: {message.reason}")
        return self._refuse(message.request, error)

    def _expired(self, number: int, finished: frozenset[int]) -> list[Effect]:
        request = self._requests.get(number)
        if request is None:
            return []
        behind = [str(stage) for stage, r in enumerate(request.route) if r != NOT_NEEDED and stage not in finished]
        where = f"stage {', '.join(behind)} had not finished" if behind else "its outputs were on their way"
        return self._refuse(number, DeadlineExceeded(f"the request's time ran out: {where}"))

    def _refuse(self, number: int, error: PipelineError) -> list[Effect]:
        request = self._requests.get(number)
        if request is None:
            return []
        self._end(number)
        nodes = [self.nodes[stage, replica] for stage, replica in enumerate(request.route) if replica != NOT_NEEDED]
        return [Reject(number, error), Forget(number, tuple(node.identity for node in nodes))]

    def _end(self, number: int) -> None:
        for stage, replica in enumerate(self._requests.pop(number).route):
            if replica != NOT_NEEDED:
                self.nodes[stage, replica].outstanding -= 1

    # The end

    def _break(self, error: PipelineError) -> list[Effect]:
        if self.state in (State.BROKEN, State.CLOSED):
            return []
        effects: list[Effect] = [Announce(error)] if self.state is State.STARTING else []
        self.state, self.error = State.BROKEN, error
        for number in list(self._requests):
            effects += self._refuse(number, error)
        return effects

    def _close(self) -> list[Effect]:
        if self.state is State.CLOSED:
            return []
        error = PipelineClosed("the pipeline was closed")
        effects: list[Effect] = [Announce(error)] if self.state is State.STARTING else []
        self.state, self.error = State.CLOSED, self.error or error
        for number in list(self._requests):
            effects += self._refuse(number, error)
        known = [node.identity for node in self.nodes.values() if node.identity and node.state is not NodeState.LOST]
        return [*effects, *(SendAway(identity, "the pipeline was closed") for identity in known)]
