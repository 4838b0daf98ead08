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

from dataclasses import dataclass, field
from enum import Enum, auto

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
from runtime.messages import NOT_NEEDED, PROTOCOL, Failed, Finished, Hello

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
    outstanding: int = 0
    requests: int = 0
    failures: int = 0
    wait_ns: int = 0
    run_ns: int = 0


@dataclass(frozen=True)
class Joined:
    """A node reported."""

    identity: bytes
    hello: Hello


@dataclass(frozen=True)
class Prepared:
    """A node has loaded its stage and set up its links."""

    identity: bytes


@dataclass(frozen=True)
class Declined:
    """A node cannot do what it was assigned."""

    identity: bytes
    reason: str


@dataclass(frozen=True)
class Lost:
    """A node is gone; the reason is its story."""

    slot: Slot
    reason: str


@dataclass(frozen=True)
class Submitted:
    """A caller asks for tensors. ``deadline_ns`` is None for none."""

    request: int
    wanted: tuple[str, ...]
    deadline_ns: int | None


@dataclass(frozen=True)
class Returned:
    """Tensors of a request came back."""

    request: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Reported:
    """A node says how a request fared at its stage."""

    message: Finished | Failed


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""

    now_ns: int


@dataclass(frozen=True)
class TimedOut:
    """The nodes did not all come up in time."""

    reason: str


@dataclass(frozen=True)
class CloseAsked:
    """The pipeline is to end."""


Event = Joined | Prepared | Declined | Lost | Submitted | Returned | Reported | Ticked | TimedOut | CloseAsked


@dataclass(frozen=True)
class GiveStage:
    """Assign a slot to a node."""

    identity: bytes
    slot: Slot


@dataclass(frozen=True)
class WireAll:
    """Tell every node where all nodes are, by stage, then replica."""

    identities: tuple[bytes, ...]
    addresses: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SendAway:
    """Tell a node to end."""

    identity: bytes
    reason: str


@dataclass(frozen=True)
class Announce:
    """The pipeline is ready, or will never be."""

    error: PipelineError | None


@dataclass(frozen=True)
class Enter:
    """Send a request's inputs to the stages on its route that read them."""

    request: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Resolve:
    """Give the caller its tensors."""

    request: int


@dataclass(frozen=True)
class Reject:
    """Give the caller an error."""

    request: int
    error: PipelineError


@dataclass(frozen=True)
class Forget:
    """Tell nodes that nobody waits for a request any more."""

    request: int
    identities: tuple[bytes, ...]


Effect = GiveStage | WireAll | SendAway | Announce | Enter | Resolve | Reject | Forget


@dataclass
class _Request:
    wanted: tuple[str, ...]
    route: tuple[int, ...]
    deadline_ns: int | None
    missing: set[str] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)


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
        self._plan = plan
        self._replicas = replicas
        self._requests: dict[int, _Request] = {}

    def handle(self, event: Event) -> list[Effect]:
        """Take an event; returns what is to be done, in order."""
        match event:
            case Joined(identity, hello):
                return self._joined(identity, hello)
            case Prepared(identity):
                return self._prepared(identity)
            case Declined(identity, reason):
                record = self._by_identity(identity)
                return self._break(LaunchFailed(f"{self._called(record)}: {reason}")) if record else []
            case Lost(slot, reason):
                return self._lost(self.nodes[slot], reason)
            case Submitted():
                return self._submitted(event)
            case Returned(request, names):
                return self._returned(request, names)
            case Reported(message):
                return self._reported(message)
            case Ticked(now_ns):
                return self._ticked(now_ns)
            case TimedOut(reason):
                return self._break(LaunchFailed(reason)) if self.state is State.STARTING else []
            case CloseAsked():
                return self._close()

    def next_deadline_ns(self) -> int | None:
        """When :class:`Ticked` is needed next."""
        return min((r.deadline_ns for r in self._requests.values() if r.deadline_ns is not None), default=None)

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
            addresses = tuple(
                tuple(self._address((stage, replica)) for replica in range(count))
                for stage, count in enumerate(self._replicas)
            )
            effects.append(WireAll(tuple(node.identity for node in self.nodes.values()), addresses))
        return effects

    def _prepared(self, identity: bytes) -> list[Effect]:
        record = self._by_identity(identity)
        if record is None or record.state is not NodeState.LOADING:
            return []
        record.state = NodeState.READY
        if self.state is State.STARTING and not self.missing_nodes():
            self.state = State.READY
            return [Announce(None)]
        return []

    def _lost(self, record: NodeRecord, reason: str) -> list[Effect]:
        if record.state is NodeState.LOST or self.state is State.CLOSED:
            return []
        record.state = NodeState.LOST
        kind = LaunchFailed if self.state is State.STARTING else NodeFailed
        return self._break(kind(f"{self._called(record)} {reason}"))

    def _address(self, slot: Slot) -> str:
        hello = self.nodes[slot].hello
        assert hello is not None
        return hello.address

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
        needed = self._plan.stages_for(event.wanted)
        route = tuple(self._choose(stage.index) if stage.index in needed else NOT_NEEDED for stage in self._plan.stages)
        for stage, replica in enumerate(route):
            if replica != NOT_NEEDED:
                self.nodes[stage, replica].outstanding += 1
        self._requests[event.request] = _Request(event.wanted, route, event.deadline_ns, set(event.wanted))
        return [Enter(event.request, route, event.wanted)]

    def _choose(self, stage: int) -> int:
        return least_outstanding([self.nodes[stage, r].outstanding for r in range(self._replicas[stage])])

    def _returned(self, number: int, names: tuple[str, ...]) -> list[Effect]:
        request = self._requests.get(number)
        if request is None:
            return []
        request.missing.difference_update(names)
        if request.missing:
            return []
        self._end(number)
        return [Resolve(number)]

    def _reported(self, message: Finished | Failed) -> list[Effect]:
        record = self.nodes.get((message.stage, message.replica))
        if record is None:
            return []
        request = self._requests.get(message.request)
        if request is not None and message.stage not in request.finished:
            request.finished.add(message.stage)
            record.outstanding -= 1
        if isinstance(message, Finished):
            record.requests += 1
            record.wait_ns += message.wait_ns
            record.run_ns += message.run_ns
            return []
        record.failures += 1
        error = StageFailed(f"{self._called(record)} could not execute the request: {message.reason}")
        return self._refuse(message.request, error)

    def _refuse(self, number: int, error: PipelineError) -> list[Effect]:
        request = self._requests.get(number)
        if request is None:
            return []
        waiting = tuple(
            self.nodes[stage, replica].identity
            for stage, replica in enumerate(request.route)
            if replica != NOT_NEEDED and stage not in request.finished
        )
        self._end(number)
        return [Reject(number, error), Forget(number, waiting)]

    def _end(self, number: int) -> None:
        request = self._requests.pop(number)
        for stage, replica in enumerate(request.route):
            if replica != NOT_NEEDED and stage not in request.finished:
                self.nodes[stage, replica].outstanding -= 1

    def _ticked(self, now_ns: int) -> list[Effect]:
        effects: list[Effect] = []
        for number, request in list(self._requests.items()):
            if request.deadline_ns is not None and request.deadline_ns <= now_ns:
                behind = [
                    f"{stage}"
                    for stage, r in enumerate(request.route)
                    if r != NOT_NEEDED and stage not in request.finished
                ]
                where = f"stage {', '.join(behind)} had not finished" if behind else "its outputs were on their way"
                effects += self._refuse(number, DeadlineExceeded(f"the request's time ran out: {where}"))
        return effects

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
