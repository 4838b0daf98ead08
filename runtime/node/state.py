"""The state machine of a node. Pure: it takes an event and returns effects; it uses no socket, session or clock.

A node passes through the phases WAITING, LOADING, LOADED, READY, LEAVING and STOPPED. :data:`TRANSITIONS` lists the
events that are legal in each phase and the phase that follows; any other event is an error. docs/states.md is drawn
from this table. Events come from the control link, from data links, from the session, and from the main loop, which
sends a :class:`~runtime.node.events.Turn` when it has time for a request. The loop performs the effects in order. An
effect that has a result (Load, Run) is answered by an event before the loop handles anything else.

In READY and LEAVING, each attempt at a request goes through these steps:

    joining    fragments of some of its sources have arrived
    queued     fragments of all its sources have arrived
    running    the session executes it
    ended      its fragments were given back to their senders

Rules:
    1. Only fragments of one attempt are joined, one from each source. A second fragment from a source is given back.
    2. One attempt runs at a time. Attempts run in the order in which they were queued.
    3. A fragment that was sent with a newer view of the pipeline waits until this node has that view too. The outputs
       of an attempt are therefore never sent to a node that was lost before the attempt began.

Invariants: every fragment is given back exactly once, whether its attempt was executed, failed, expired or was
cancelled (unless the node stops first). The outputs of an attempt that was cancelled are not forwarded.

tests/runtime/test_node_state.py tests the rules. tests/runtime/test_world.py tests this machine together with the
coordinator's under arbitrary orders of messages and arbitrary faults.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from onnxsplit.plan import CALLER, Plan
from runtime.node.events import (
    Arrived,
    Assigned,
    AttemptCancelled,
    Connect,
    Discard,
    Executed,
    ExecutionFailed,
    Exit,
    Forward,
    GiveBack,
    LeaveAsked,
    LendMemory,
    Load,
    Loaded,
    LoadFailed,
    NodeEffect,
    NodeEvent,
    OutputsByTarget,
    Passed,
    ReportFailure,
    Run,
    SayLeaving,
    SayReady,
    SayRefused,
    Shared,
    StopAsked,
    Turn,
    Wired,
)
from runtime.topology import sources
from runtime.transition_table import Machine
from runtime.wire.messages.control import Assign, Wire
from runtime.wire.messages.data import NOT_NEEDED, AttemptKey, Failed, Fragment, Visit

_REMEMBERED = 4096  # number of cancelled requests remembered, because their fragments may still arrive


class NodePhase(Enum):
    """The phases of a node."""

    WAITING = auto()
    LOADING = auto()
    LOADED = auto()
    READY = auto()
    LEAVING = auto()
    STOPPED = auto()


_SERVING = (Wired, Shared, Arrived, Turn, Executed, ExecutionFailed, AttemptCancelled, Passed)

TRANSITIONS: Mapping[tuple[NodePhase, type[NodeEvent]], NodePhase] = {
    (NodePhase.WAITING, Assigned): NodePhase.LOADING,
    (NodePhase.LOADING, Loaded): NodePhase.LOADED,
    (NodePhase.LOADING, LoadFailed): NodePhase.STOPPED,
    (NodePhase.LOADED, Wired): NodePhase.READY,
    **{(NodePhase.READY, kind): NodePhase.READY for kind in _SERVING},
    (NodePhase.READY, LeaveAsked): NodePhase.LEAVING,
    **{(NodePhase.LEAVING, kind): NodePhase.LEAVING for kind in (*_SERVING, LeaveAsked)},
    **{(state, LeaveAsked): NodePhase.STOPPED for state in (NodePhase.WAITING, NodePhase.LOADING, NodePhase.LOADED)},
    **{(state, StopAsked): NodePhase.STOPPED for state in NodePhase},
}


@dataclass
class _Join:
    """An attempt that is joining, queued or running."""

    deadline_ns: int
    fragments: list[Fragment] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    complete_ns: int = 0


class NodeState:
    """The state machine of one node.

    Attributes:
        executed: number of requests executed so far.
        running: the attempt that the session executes; None for none.
    """

    def __init__(self) -> None:
        self.executed = 0
        self.running: AttemptKey | None = None
        self._machine = Machine("node", TRANSITIONS, NodePhase.WAITING)
        self._assign: Assign | None = None
        self._view = -1
        self._sources: frozenset[int] = frozenset()
        self._readers: dict[int, tuple[str, ...]] = {}  # the outputs that each stage reads
        self._co_senders: frozenset[int] = frozenset()  # the stages that send to the same stages as this one
        self._outputs: tuple[str, ...] = ()
        self._targets: dict[tuple[tuple[int, ...], tuple[str, ...]], OutputsByTarget] = {}
        self._early: list[Arrived] = []
        self._joins: dict[AttemptKey, _Join] = {}
        self._queue: deque[AttemptKey] = deque()
        self._cancelled: OrderedDict[int, int] = OrderedDict()  # the last cancelled attempt of each request
        self._oldest = 0

    @property
    def state(self) -> NodePhase:
        """The phase of the node."""
        return self._machine.state

    def handle(self, event: NodeEvent) -> list[NodeEffect]:
        """Handle an event; returns the effects to perform, in order.

        Raises:
            IllegalEventError: the event is not legal in this phase.
        """
        state = self._machine.go(type(event))
        match event:
            case Arrived():
                return self._arrived(event)
            case Turn(now_ns):
                return self._next(now_ns)
            case Executed():
                return self._executed(event)
            case ExecutionFailed(reason):
                return self._failed(reason)
            case AttemptCancelled(request, attempt):
                return self._cancel(request, attempt)
            case Passed(oldest):
                self._oldest = max(self._oldest, oldest)
                return self._drop([key for key in self._joins if key[0] < self._oldest])
            case Assigned(assign):
                self._assign = assign
                return [Load(assign)]
            case Loaded(plan):
                self._learn(plan)
                return []
            case LoadFailed(reason):
                return [SayRefused(reason), Exit(reason)]
            case Wired(wire):
                return self._wired(wire)
            case Shared(readers):
                return [LendMemory(readers)]
            case LeaveAsked(reason):
                return [Exit(reason)] if state is NodePhase.STOPPED else [SayLeaving()]
            case StopAsked(reason):
                return [Exit(reason)]

    @property
    def ready(self) -> bool:
        """Whether an attempt is queued and none is running."""
        return bool(self._queue) and self.running is None

    def _learn(self, plan: Plan) -> None:
        """Note the sources of this stage, and which stages read its outputs."""
        stage = plan.stages[self._place()[0]]
        self._sources = sources(plan, stage.index)
        self._outputs = stage.outputs
        self._readers = {
            other.index: names
            for other in plan.stages
            if (names := tuple(name for name in stage.outputs if name in other.inputs))
        }
        self._co_senders = frozenset(source for reader in self._readers for source in sources(plan, reader))

    def _place(self) -> tuple[int, int]:
        assert self._assign is not None
        return self._assign.stage, self._assign.replica

    def _wired(self, wire: Wire) -> list[NodeEffect]:
        self._view = wire.view
        targets = {p.number for p in wire.peers if p.stage in self._readers or p.stage == CALLER}
        senders = {p.number for p in wire.peers if p.stage in self._sources | self._co_senders}
        effects: list[NodeEffect] = [
            Connect(
                me=wire.me,
                peers=wire.peers,
                neighbours=frozenset((targets | senders) - {wire.me}),
                targets=frozenset(targets),
            ),
            SayReady(),
        ]
        early, self._early = self._early, []
        for event in early:
            effects += self._arrived(event)
        return effects

    def _arrived(self, event: Arrived) -> list[NodeEffect]:
        fragment = event.fragment
        if fragment.view > self._view:
            self._early.append(event)
            return []
        key = fragment.request, fragment.attempt
        join = self._joins.get(key)
        duplicate = join is not None and any(other.source == fragment.source for other in join.fragments)
        if fragment.source not in self._sources or duplicate or self._has_ended(key):
            return [GiveBack((fragment,))]
        if join is None:
            join = self._joins[key] = _Join(event.now_ns + fragment.budget_ns if fragment.budget_ns else 0)
        join.fragments.append(fragment)
        join.tensors.update(event.tensors)
        if len(join.fragments) == len(self._sources):
            join.complete_ns = event.now_ns
            self._queue.append(key)
        return []

    def _has_ended(self, key: AttemptKey) -> bool:
        """Whether the attempt was cancelled or its request has ended."""
        return key[0] < self._oldest or key[1] <= self._cancelled.get(key[0], 0)

    def _next(self, now_ns: int) -> list[NodeEffect]:
        effects: list[NodeEffect] = []
        while self._queue and self.running is None:
            key = self._queue.popleft()
            join = self._joins[key]
            if join.deadline_ns and now_ns > join.deadline_ns:
                del self._joins[key]
                effects.append(GiveBack(tuple(join.fragments)))
                continue
            self.running = key
            first = join.fragments[0]
            effects.append(Run(key, first.cost, join.tensors, tuple(join.fragments), self._outputs_of(first)))
        return effects

    def _outputs_of(self, fragment: Fragment) -> OutputsByTarget:
        """The outputs that each target gets; computed once for each route and set of wanted outputs."""
        targets = self._targets.get((fragment.route, fragment.wanted))
        if targets is None:
            if len(self._targets) >= _REMEMBERED:
                self._targets.clear()
            wanted = tuple(name for name in self._outputs if name in fragment.wanted)
            stages = ((s, names) for s, names in self._readers.items() if self._needs(fragment, s))
            targets = (*stages, *([(CALLER, wanted)] if wanted else []))
            self._targets[fragment.route, fragment.wanted] = targets
        return targets

    @staticmethod
    def _needs(fragment: Fragment, stage: int) -> bool:
        return stage < len(fragment.route) and fragment.route[stage] != NOT_NEEDED

    def _executed(self, event: Executed) -> list[NodeEffect]:
        self.executed += 1
        key, self.running = self.running, None
        assert key is not None
        join = self._joins.pop(key)
        back = GiveBack(tuple(join.fragments))
        if self._has_ended(key):
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
        for other in others:  # branches that join again share the stages before they parted
            history += tuple(visited for visited in other.history if visited not in history)
        forward = Forward(
            fragment=first,
            budget_ns=max(1, join.deadline_ns - event.ready_ns) if join.deadline_ns else 0,
            leaving=self._outputs_of(first),
            history=(*history, visit),
        )
        return [forward, back]

    def _failed(self, reason: str) -> list[NodeEffect]:
        key, self.running = self.running, None
        assert key is not None
        stage, replica = self._place()
        join = self._joins.pop(key)
        return [GiveBack(tuple(join.fragments)), ReportFailure(Failed(*key, stage, replica, reason))]

    def _cancel(self, request: int, attempt: int) -> list[NodeEffect]:
        self._cancelled[request] = max(attempt, self._cancelled.get(request, 0))
        if len(self._cancelled) > _REMEMBERED:
            self._cancelled.popitem(last=False)
        return self._drop([key for key in self._joins if key[0] == request and key[1] <= attempt])

    def _drop(self, keys: list[AttemptKey]) -> list[NodeEffect]:
        """Drop these attempts, except the one that is running, which is dropped when it ends."""
        dropped = [key for key in keys if key != self.running]
        if not dropped:
            return []
        self._queue = deque(key for key in self._queue if key not in dropped)
        return [GiveBack(tuple(self._joins.pop(key).fragments)) for key in dropped]
