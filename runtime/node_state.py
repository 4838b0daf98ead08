"""What a node does, without doing it: an event in, effects out. Knows no socket, no session and no clock.

A node goes through these states; the requests it holds are joined and run only in READY:

    WAITING --Assigned--> LOADING --Loaded--> LOADED --Wired--> READY
                             |
                             +--LoadFailed--> STOPPED            StopAsked leads to STOPPED from everywhere

Two rules. A request runs once the fragments of all its sources are here. One request runs at a time, in the order in
which they became complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from onnxsplit.plan import Plan
from runtime.messages import CALLER, NOT_NEEDED, Assign, Failed, Finished, Fragment

Tensors = Mapping[str, Any]
"""Tensors by name; what they are is the loop's business."""


class State(Enum):
    """See the drawing above."""

    WAITING = auto()
    LOADING = auto()
    LOADED = auto()
    READY = auto()
    STOPPED = auto()


@dataclass(frozen=True)
class Assigned:
    """The coordinator gave the node its stage."""

    assign: Assign


@dataclass(frozen=True)
class Loaded:
    """The session is open; the plan says where outputs go."""

    plan: Plan


@dataclass(frozen=True)
class LoadFailed:
    """The stage could not be loaded."""

    reason: str


@dataclass(frozen=True)
class Wired:
    """The addresses of all nodes are known, by stage, then replica."""

    addresses: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Arrived:
    """A fragment came in."""

    fragment: Fragment
    tensors: Tensors
    now_ns: int


@dataclass(frozen=True)
class Executed:
    """The session ran a request."""

    request: int
    outputs: Tensors
    started_ns: int
    ended_ns: int


@dataclass(frozen=True)
class ExecutionFailed:
    """The session could not run a request."""

    request: int
    reason: str


@dataclass(frozen=True)
class Cancelled:
    """Nobody waits for a request any more."""

    request: int


@dataclass(frozen=True)
class StopAsked:
    """The coordinator, a signal, or the coordinator's death asks the node to end."""

    reason: str


Event = Assigned | Loaded | LoadFailed | Wired | Arrived | Executed | ExecutionFailed | Cancelled | StopAsked

TRANSITIONS: Mapping[tuple[State, type[Event]], State] = {
    (State.WAITING, Assigned): State.LOADING,
    (State.LOADING, Loaded): State.LOADED,
    (State.LOADING, LoadFailed): State.STOPPED,
    (State.LOADED, Wired): State.READY,
    (State.READY, Arrived): State.READY,
    (State.READY, Executed): State.READY,
    (State.READY, ExecutionFailed): State.READY,
    (State.READY, Cancelled): State.READY,
    **{(state, StopAsked): State.STOPPED for state in State},
}
"""What is legal, and where it leads. Anything else is a bug or a peer that broke the protocol."""


@dataclass(frozen=True)
class Load:
    """Open the session."""

    assign: Assign


@dataclass(frozen=True)
class Connect:
    """Open links to the nodes of these stages: stage -> address of each replica."""

    addresses: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class SayReady:
    """Tell the coordinator that requests may come."""


@dataclass(frozen=True)
class SayRefused:
    """Tell the coordinator why not."""

    reason: str


@dataclass(frozen=True)
class Run:
    """Execute the session; answer with :class:`Executed` or :class:`ExecutionFailed`."""

    request: int
    inputs: Tensors


@dataclass(frozen=True)
class Forward:
    """Send tensors to a replica of a stage, or to the caller (stage :data:`CALLER`)."""

    stage: int
    replica: int
    request: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    tensors: Tensors


@dataclass(frozen=True)
class Report:
    """Tell the coordinator how a request fared here."""

    message: Finished | Failed


@dataclass(frozen=True)
class Exit:
    """End the node."""

    reason: str


Effect = Load | Connect | SayReady | SayRefused | Run | Forward | Report | Exit


class IllegalEventError(Exception):
    """An event that has no place in the present state; tells what led here."""


@dataclass
class _Join:
    """A request whose fragments are being gathered."""

    fragment: Fragment
    tensors: dict[str, Any] = field(default_factory=dict)
    sources: set[int] = field(default_factory=set)
    complete_ns: int = 0


class NodeState:
    """The state machine of one node."""

    def __init__(self) -> None:
        self.state = State.WAITING
        self.executed = 0
        self._assign: Assign | None = None
        self._sources: frozenset[int] = frozenset()
        self._targets: dict[int, tuple[str, ...]] = {}
        self._outputs: tuple[str, ...] = ()
        self._joins: dict[int, _Join] = {}
        self._queue: deque[int] = deque()
        self._running: int | None = None
        self._story: deque[str] = deque(maxlen=20)

    def handle(self, event: Event) -> list[Effect]:
        """Take an event; returns what is to be done, in order.

        Raises:
            IllegalEventError: the event is not legal in this state.
        """
        target = TRANSITIONS.get((self.state, type(event)))
        if target is None:
            raise IllegalEventError(
                f"{type(event).__name__} in state {self.state.name}; before it: {', '.join(self._story) or 'nothing'}"
            )
        self._story.append(f"{type(event).__name__} in {self.state.name}")
        self.state = target
        match event:
            case Assigned(assign):
                self._assign = assign
                return [Load(assign)]
            case Loaded(plan):
                self._learn(plan)
                return []
            case LoadFailed(reason):
                return [SayRefused(reason), Exit(reason)]
            case Wired(addresses):
                return [Connect({stage: addresses[stage] for stage in self._targets}), SayReady()]
            case Arrived():
                return self._arrived(event)
            case Executed():
                return self._executed(event)
            case ExecutionFailed(request, reason):
                stage, replica = self._place()
                self._forget(request)
                return [Report(Failed(request, stage, replica, reason)), *self._next()]
            case Cancelled(request):
                if request != self._running:
                    self._forget(request)
                return []
            case StopAsked(reason):
                return [Exit(reason)]

    def _learn(self, plan: Plan) -> None:
        """Who sends to this stage, and which of its outputs go where."""
        stage = plan.stages[self._place()[0]]
        self._sources = sources(plan, stage.index)
        self._outputs = stage.outputs
        self._targets = {
            other.index: names
            for other in plan.stages
            if (names := tuple(name for name in stage.outputs if name in other.inputs))
        }

    def _place(self) -> tuple[int, int]:
        assert self._assign is not None
        return self._assign.stage, self._assign.replica

    def _arrived(self, event: Arrived) -> list[Effect]:
        fragment = event.fragment
        join = self._joins.setdefault(fragment.request, _Join(fragment))
        if fragment.source not in self._sources or fragment.source in join.sources:
            return []  # a stray or a duplicate: the first one counts
        join.sources.add(fragment.source)
        join.tensors.update(event.tensors)
        if join.sources != self._sources:
            return []
        join.complete_ns = event.now_ns
        self._queue.append(fragment.request)
        return self._next() if self._running is None else []

    def _next(self) -> list[Effect]:
        if not self._queue:
            self._running = None
            return []
        self._running = self._queue.popleft()
        return [Run(self._running, self._joins[self._running].tensors)]

    def _executed(self, event: Executed) -> list[Effect]:
        self.executed += 1
        join = self._joins.pop(event.request)
        stage, replica = self._place()
        route, wanted = join.fragment.route, join.fragment.wanted
        effects: list[Effect] = []
        for target, names in self._targets.items():
            if route[target] != NOT_NEEDED:
                tensors = {name: event.outputs[name] for name in names}
                effects.append(Forward(target, route[target], event.request, route, wanted, tensors))
        waited, ran = event.started_ns - join.complete_ns, event.ended_ns - event.started_ns
        effects.append(Report(Finished(event.request, stage, replica, waited, ran)))
        asked = {name: event.outputs[name] for name in self._outputs if name in wanted}
        if asked:  # after the report, so that what a caller has is counted
            effects.append(Forward(CALLER, 0, event.request, route, wanted, asked))
        return effects + self._next()

    def _forget(self, request: int) -> None:
        self._joins.pop(request, None)
        if request in self._queue:
            self._queue.remove(request)


def sources(plan: Plan, stage: int) -> frozenset[int]:
    """Who sends a fragment of every request to a stage: stages, and the caller where it reads an input of the model.

    A stage that reads nothing is set going by the caller.
    """
    writers = plan.producers()
    found = {writers.get(name, CALLER) for name in plan.stages[stage].inputs}
    return frozenset(found or {CALLER})
