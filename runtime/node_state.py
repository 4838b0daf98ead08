"""What a node does, without doing it: an event in, effects out. Knows no socket, no session and no clock.

A node goes through these states; the requests it holds are joined and run only in READY:

    WAITING --Assigned--> LOADING --Loaded--> LOADED --Wired--> READY
                             |
                             +--LoadFailed--> STOPPED            StopAsked leads to STOPPED from everywhere

Two rules. A request runs once the fragments of all its sources are here. One request runs at a time, in the order in
which they became complete, whenever the loop gives a :class:`Turn`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from msgspec import Struct

from onnxsplit.plan import Plan
from runtime.messages import CALLER, NOT_NEEDED, Assign, Failed, Fragment, Peer, Visit

_REMEMBERED = 4096  # cancelled requests, whose fragments may still be under way

Tensors = Mapping[str, Any]
"""Tensors by name; what they are is the loop's business."""


class State(Enum):
    """See the drawing above."""

    WAITING = auto()
    LOADING = auto()
    LOADED = auto()
    READY = auto()
    STOPPED = auto()


class Assigned(Struct, frozen=True):
    """The coordinator gave the node its stage."""

    assign: Assign


class Loaded(Struct, frozen=True):
    """The session is open; the plan says where outputs go."""

    plan: Plan


class LoadFailed(Struct, frozen=True):
    """The stage could not be loaded."""

    reason: str


class Wired(Struct, frozen=True):
    """All processes of the pipeline are known, by number."""

    peers: tuple[Peer, ...]


class Shared(Struct, frozen=True):
    """These peers read this node's memory."""

    readers: tuple[int, ...]


class Arrived(Struct, frozen=True):
    """A fragment came in."""

    fragment: Fragment
    tensors: Tensors
    now_ns: int


class Turn(Struct, frozen=True):
    """The loop has time for a request."""


class Executed(Struct, frozen=True):
    """The session ran a request, and its outputs are ready to go."""

    request: int
    started_ns: int
    ended_ns: int
    ready_ns: int
    output_bytes: int
    shared_bytes: int


class ExecutionFailed(Struct, frozen=True):
    """The session could not run a request."""

    request: int
    reason: str


class Cancelled(Struct, frozen=True):
    """Nobody waits for a request any more."""

    request: int


class StopAsked(Struct, frozen=True):
    """The coordinator, a signal, or the coordinator's death asks the node to end."""

    reason: str


Event = (
    Assigned
    | Loaded
    | LoadFailed
    | Wired
    | Shared
    | Arrived
    | Turn
    | Executed
    | ExecutionFailed
    | Cancelled
    | StopAsked
)

TRANSITIONS: Mapping[tuple[State, type[Event]], State] = {
    (State.WAITING, Assigned): State.LOADING,
    (State.LOADING, Loaded): State.LOADED,
    (State.LOADING, LoadFailed): State.STOPPED,
    (State.LOADED, Wired): State.READY,
    (State.READY, Shared): State.READY,
    (State.READY, Arrived): State.READY,
    (State.READY, Turn): State.READY,
    (State.READY, Executed): State.READY,
    (State.READY, ExecutionFailed): State.READY,
    (State.READY, Cancelled): State.READY,
    **{(state, StopAsked): State.STOPPED for state in State},
}
"""What is legal, and where it leads. Anything else is a bug or a peer that broke the protocol."""


class Load(Struct, frozen=True):
    """Open the session."""

    assign: Assign


class Connect(Struct, frozen=True):
    """Learn the own number, map the memory of neighbours, and open links to those that get something, by number."""

    me: int
    neighbours: Mapping[int, Peer]
    targets: frozenset[int]


class SayReady(Struct, frozen=True):
    """Tell the coordinator that requests may come."""


class SayRefused(Struct, frozen=True):
    """Tell the coordinator why not."""

    reason: str


class Share(Struct, frozen=True):
    """Lend memory to these peers from now on."""

    readers: tuple[int, ...]


class Run(Struct, frozen=True):
    """Execute the session; answer with :class:`Executed` or :class:`ExecutionFailed`.

    ``targets`` are the tensors that each peer will get, by its number; the inputs lie in ``fragments``.
    """

    request: int
    inputs: Tensors
    fragments: tuple[Fragment, ...]
    targets: Mapping[int, tuple[str, ...]]


class GiveBack(Struct, frozen=True):
    """The tensors of these fragments are read no more."""

    fragments: tuple[Fragment, ...]


class Forward(Struct, frozen=True):
    """Send the outputs of the request that ran last to the peers they are for."""

    request: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    history: tuple[Visit, ...]


class Discard(Struct, frozen=True):
    """Nobody wants the outputs of the request that ran last."""


class Report(Struct, frozen=True):
    """Tell the coordinator that a request failed here."""

    message: Failed


class Exit(Struct, frozen=True):
    """End the node."""

    reason: str


Effect = Load | Connect | SayReady | SayRefused | Share | Run | GiveBack | Forward | Discard | Report | Exit


class IllegalEventError(Exception):
    """An event that has no place in the present state; tells what led here."""


@dataclass
class _Join:
    """A request whose fragments are being gathered."""

    fragments: list[Fragment] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    complete_ns: int = 0


class NodeState:
    """The state machine of one node."""

    def __init__(self) -> None:
        self.state = State.WAITING
        self.executed = 0
        self._assign: Assign | None = None
        self._sources: frozenset[int] = frozenset()
        self._readers: dict[int, tuple[str, ...]] = {}  # which outputs each stage reads
        self._outputs: tuple[str, ...] = ()
        self._numbers: dict[tuple[int, int], int] = {}
        self._joins: dict[int, _Join] = {}
        self._queue: deque[int] = deque()
        self._running: int | None = None
        self._cancelled: OrderedDict[int, None] = OrderedDict()
        self._story: deque[tuple[type[Event], State]] = deque(maxlen=20)

    def handle(self, event: Event) -> list[Effect]:
        """Take an event; returns what is to be done, in order.

        Raises:
            IllegalEventError: the event is not legal in this state.
        """
        kind = type(event)
        target = TRANSITIONS.get((self.state, kind))
        if target is None:
            story = ", ".join(f"{kind.__name__} in {state.name}" for kind, state in self._story)
            raise IllegalEventError(f"{kind.__name__} in state {self.state.name}; before it: {story or 'nothing'}")
        self._story.append((kind, self.state))
        self.state = target
        match event:
            case Arrived():
                return self._arrived(event)
            case Turn():
                return self._next()
            case Executed():
                return self._executed(event)
            case ExecutionFailed(request, reason):
                return self._failed(request, reason)
            case Cancelled(request):
                return self._cancel(request)
            case Assigned(assign):
                self._assign = assign
                return [Load(assign)]
            case Loaded(plan):
                self._learn(plan)
                return []
            case LoadFailed(reason):
                return [SayRefused(reason), Exit(reason)]
            case Wired(peers):
                return [self._meet(peers), SayReady()]
            case Shared(readers):
                return [Share(readers)]
            case StopAsked(reason):
                return [Exit(reason)]

    @property
    def ready(self) -> bool:
        """True when a request waits for its turn."""
        return bool(self._queue) and self._running is None

    def _learn(self, plan: Plan) -> None:
        """Who sends to this stage, and which of its outputs go where."""
        stage = plan.stages[self._place()[0]]
        self._sources = sources(plan, stage.index)
        self._outputs = stage.outputs
        self._readers = {
            other.index: names
            for other in plan.stages
            if (names := tuple(name for name in stage.outputs if name in other.inputs))
        }

    def _place(self) -> tuple[int, int]:
        assert self._assign is not None
        return self._assign.stage, self._assign.replica

    def _meet(self, peers: tuple[Peer, ...]) -> Connect:
        self._numbers = {(peer.stage, peer.replica): number for number, peer in enumerate(peers)}
        targets = {number for number, peer in enumerate(peers) if peer.stage in self._readers or peer.stage == CALLER}
        neighbours = targets | {number for number, peer in enumerate(peers) if peer.stage in self._sources}
        return Connect(
            me=self._numbers[self._place()],
            neighbours={number: peers[number] for number in sorted(neighbours)},
            targets=frozenset(targets),
        )

    def _arrived(self, event: Arrived) -> list[Effect]:
        fragment = event.fragment
        request = fragment.request
        join = self._joins.get(request)
        seen = join is not None and any(other.source == fragment.source for other in join.fragments)
        if fragment.source not in self._sources or seen or request in self._cancelled:
            return [GiveBack((fragment,))]  # a stray or a duplicate: the first one counts
        if join is None:
            join = self._joins[request] = _Join()
        join.fragments.append(fragment)
        join.tensors.update(event.tensors)
        if len(join.fragments) == len(self._sources):
            join.complete_ns = event.now_ns
            self._queue.append(request)
        return []

    def _next(self) -> list[Effect]:
        if not self._queue or self._running is not None:
            return []
        request = self._running = self._queue.popleft()
        join = self._joins[request]
        return [Run(request, join.tensors, tuple(join.fragments), self._targets(join.fragments[0]))]

    def _targets(self, fragment: Fragment) -> dict[int, tuple[str, ...]]:
        targets = {
            self._numbers[stage, fragment.route[stage]]: names
            for stage, names in self._readers.items()
            if fragment.route[stage] != NOT_NEEDED
        }
        asked = tuple(name for name in self._outputs if name in fragment.wanted)
        if asked:
            targets[self._numbers[CALLER, 0]] = asked
        return targets

    def _executed(self, event: Executed) -> list[Effect]:
        self.executed += 1
        self._running = None
        join = self._joins.pop(event.request)
        back = GiveBack(tuple(join.fragments))
        if event.request in self._cancelled:
            return [back, Discard()]
        stage, replica = self._place()
        visit = Visit(
            stage,
            replica,
            join.complete_ns,
            event.started_ns,
            event.ended_ns,
            event.ready_ns,
            event.output_bytes,
            event.shared_bytes,
        )
        first, *others = join.fragments
        history = first.history
        for other in others:  # branches that meet again share the stages before they parted
            history += tuple(visited for visited in other.history if visited not in history)
        return [Forward(event.request, first.route, first.wanted, (*history, visit)), back]

    def _failed(self, request: int, reason: str) -> list[Effect]:
        self._running = None
        stage, replica = self._place()
        join = self._joins.pop(request)
        return [GiveBack(tuple(join.fragments)), Report(Failed(request, stage, replica, reason))]

    def _cancel(self, request: int) -> list[Effect]:
        self._cancelled[request] = None
        if len(self._cancelled) > _REMEMBERED:
            self._cancelled.popitem(last=False)
        if request == self._running or request not in self._joins:
            return []
        if request in self._queue:
            self._queue.remove(request)
        return [GiveBack(tuple(self._joins.pop(request).fragments))]


def sources(plan: Plan, stage: int) -> frozenset[int]:
    """Who sends a fragment of every request to a stage: stages, and the caller where it reads an input of the model.

    A stage that reads nothing is set going by the caller.
    """
    writers = plan.producers()
    found = {writers.get(name, CALLER) for name in plan.stages[stage].inputs}
    return frozenset(found or {CALLER})
