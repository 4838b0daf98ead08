"""The state machine of a node. Pure: it takes an event and returns effects; it uses no socket, session or clock.

A node passes through the phases WAITING, LOADING, LOADED, READY, LEAVING and STOPPED. :data:`TRANSITIONS` lists the
events that are legal in each phase and the phase that follows; any other event is an error. docs/states.md is drawn
from this table. Events come from the control link, from data links, from the session, and from the main loop, which
sends a :class:`~runtime.node.events.Turn` when it has time for a request. The loop performs the effects in order. An
effect that has a result (Load, Run) is answered by an event before the loop handles anything else.

In READY and LEAVING, each attempt at a request goes through these steps:

    joining    fragments of some of its sources have arrived
    queued     fragments of all its sources have arrived
    parked     a step that has to wait for an earlier step of one of its sequences
    running    the session executes it
    ended      its fragments were given back to their senders

Rules:
    1. Only fragments of one attempt are joined, one from each source. A second fragment from a source is given back.
    2. One attempt runs at a time. Attempts run in the order in which they were queued.
    3. A step of sequences is joined, queued and cancelled as a request is. :mod:`runtime.node.slots` says whether it
       can run when its turn comes. One that cannot run yet is parked, and returns to the head of the queue when a step
       has run or a sequence has ended.
    4. A fragment that was sent with a newer view of the pipeline waits until this node has that view too. The outputs
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
    ClearSlots,
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
from runtime.node.slots import Placed, Unfit, Unplaced
from runtime.node.stage_requests import StageRequests
from runtime.node.steps import StageSteps
from runtime.transition_table import Machine
from runtime.wire.messages.control import Assign, Wire
from runtime.wire.messages.data import AttemptKey, Failed, Fragment, Visit

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
    placed: Placed | None = None


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
        self._requests: StageRequests | None = None  # None until the stage is loaded
        self._early: list[Arrived] = []
        self._joins: dict[AttemptKey, _Join] = {}
        self._queue: deque[AttemptKey] = deque()
        self._parked: list[AttemptKey] = []
        self._steps: StageSteps | None = None  # None where there are no slots
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
            case Passed():
                return self._passed(event)
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

    def passes(self, request: int, attempt: int, view: int) -> bool:
        """Whether an attempt, whose only fragment has arrived, may run at once: nothing waits, and it has not ended."""
        key = request, attempt
        return not (self._queue or self.running or view > self._view or key in self._joins or self._has_ended(key))

    @property
    def sequences(self) -> int:
        """The number of sequences whose states this node holds. Thread-safe."""
        return self._steps.slots.sequences if self._steps is not None else 0

    @property
    def state_bytes(self) -> int:
        """The bytes of these states. Thread-safe."""
        return self._steps.state_bytes if self._steps is not None else 0

    def _learn(self, plan: Plan) -> None:
        """Note what arrives at this stage and what leaves it."""
        assert self._assign is not None
        if plan.decoder is not None and self._assign.slots:
            self._steps = StageSteps(plan, self._assign.stage, self._assign.slots, self._assign.length)
        self._requests = StageRequests(plan, self._assign.stage)

    def _place(self) -> tuple[int, int]:
        assert self._assign is not None
        return self._assign.stage, self._assign.replica

    def _wired(self, wire: Wire) -> list[NodeEffect]:
        self._view = wire.view
        requests = self._requests
        assert requests is not None
        targets = {p.number for p in wire.peers if p.stage in requests.readers or p.stage == CALLER}
        senders = {p.number for p in wire.peers if p.stage in requests.sources | requests.co_senders}
        neighbours = frozenset((targets | senders) - {wire.me})
        connect = Connect(me=wire.me, peers=wire.peers, neighbours=neighbours, targets=frozenset(targets))
        effects: list[NodeEffect] = [connect, SayReady()]
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
        sources = self._sources_of(fragment)
        if (fragment.source not in sources and not fragment.rows) or duplicate or self._has_ended(key):
            return [GiveBack((fragment,))]
        if fragment.rows and (reason := self._step_problem(fragment, join)) != "":
            return self._refuse_step(fragment, reason)
        if join is None:
            join = self._joins[key] = _Join(event.now_ns + fragment.budget_ns if fragment.budget_ns else 0)
        join.fragments.append(fragment)
        join.tensors.update(event.tensors)
        if len(join.fragments) == len(sources):
            join.complete_ns = event.now_ns
            self._queue.append(key)
        return []

    def _sources_of(self, fragment: Fragment) -> frozenset[int]:
        """The stages whose fragments are joined with this one."""
        assert self._requests is not None
        return self._steps.sources if fragment.rows and self._steps is not None else self._requests.sources

    def _step_problem(self, fragment: Fragment, join: _Join | None) -> str:
        """Why a step can never run here; empty if nothing forbids it."""
        if self._steps is None:
            return "a step of sequences came to a node that keeps no states: the plan has no decoder, or no slots"
        if join is not None and join.fragments[0].rows != fragment.rows:
            return "the rows of a step differ between its sources"
        return self._steps.problem(fragment)

    def _refuse_step(self, fragment: Fragment, reason: str) -> list[NodeEffect]:
        """Fail a step before it runs; fragments of it that arrive later are given back."""
        key = fragment.request, fragment.attempt
        return [GiveBack((fragment,)), *self._end_attempts(*key), ReportFailure(Failed(*key, *self._place(), reason))]

    def _has_ended(self, key: AttemptKey) -> bool:
        """Whether the attempt was cancelled or its request has ended."""
        return key[0] < self._oldest or key[1] <= self._cancelled.get(key[0], 0)

    def _next(self, now_ns: int) -> list[NodeEffect]:
        effects: list[NodeEffect] = []
        while self._queue and self.running is None:
            key = self._queue.popleft()
            join = self._joins[key]
            first = join.fragments[0]
            if join.deadline_ns and now_ns > join.deadline_ns:
                del self._joins[key]
                effects.append(GiveBack(tuple(join.fragments)))
                continue
            if first.rows and not self._placed(key, join, effects):
                continue
            self.running = key
            leaving = self.leaving(first)
            effects.append(Run(key, first.cost, join.tensors, tuple(join.fragments), leaving, join.placed))
        return effects

    def _placed(self, key: AttemptKey, join: _Join, effects: list[NodeEffect]) -> bool:
        """Whether a step can run now. If not, it is parked, dropped or failed."""
        assert self._steps is not None
        placed = self._steps.slots.place(key[0], join.fragments[0].rows)
        if isinstance(placed, Placed):
            join.placed = placed
            return True
        if placed is Unplaced.WAIT:
            self._parked.append(key)
            return False
        del self._joins[key]
        effects.append(GiveBack(tuple(join.fragments)))
        if isinstance(placed, Unfit):
            effects.append(ReportFailure(Failed(*key, *self._place(), placed.reason)))
        return False

    def _unpark(self) -> None:
        """Let the parked steps try again, before all that was queued after them."""
        if self._parked:
            self._queue.extendleft(reversed(self._parked))
            self._parked.clear()

    def leaving(self, fragment: Fragment) -> OutputsByTarget:
        """The outputs that each target of an attempt gets."""
        assert self._requests is not None
        if not fragment.rows:
            return self._requests.leaving(fragment)
        assert self._steps is not None
        return self._steps.leaving(fragment.wanted)

    def _executed(self, event: Executed) -> list[NodeEffect]:
        self.executed += 1
        key, self.running = self.running, None
        assert key is not None
        join = self._joins.pop(key)
        back = GiveBack(tuple(join.fragments))
        cleared = self._step_ended(key, join, ran=True)
        if self._has_ended(key):
            return [back, Discard(), *cleared]
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
            leaving=self.leaving(first),
            history=(*history, visit),
            drawn=event.drawn,
        )
        return [forward, back, *cleared]

    def _step_ended(self, key: AttemptKey, join: _Join, *, ran: bool) -> list[NodeEffect]:
        """Note that what ran has ended; steps may have waited for it."""
        if join.placed is None or self._steps is None:
            return []
        rows = join.fragments[0].rows
        slots = self._steps.slots
        cleared = slots.ran(key[0], rows, join.placed) if ran else slots.failed(rows, join.placed)
        self._unpark()
        return [ClearSlots(cleared)] if cleared else []

    def _failed(self, reason: str) -> list[NodeEffect]:
        key, self.running = self.running, None
        assert key is not None
        stage, replica = self._place()
        join = self._joins.pop(key)
        cleared = self._step_ended(key, join, ran=False)
        return [GiveBack(tuple(join.fragments)), ReportFailure(Failed(*key, stage, replica, reason)), *cleared]

    def _cancel(self, request: int, attempt: int) -> list[NodeEffect]:
        slots = self._steps.slots.free(request, attempt) if self._steps is not None else ()
        return self._end_attempts(request, attempt) + self._freed(slots)

    def _end_attempts(self, request: int, attempt: int) -> list[NodeEffect]:
        self._cancelled[request] = max(attempt, self._cancelled.get(request, 0))
        if len(self._cancelled) > _REMEMBERED:
            self._cancelled.popitem(last=False)
        return self._drop([key for key in self._joins if key[0] == request and key[1] <= attempt])

    def _passed(self, event: Passed) -> list[NodeEffect]:
        self._oldest = max(self._oldest, event.oldest)
        dropped = self._drop([key for key in self._joins if key[0] < self._oldest])
        slots = self._steps.slots.passed(event.oldest, event.kept) if self._steps is not None else ()
        return dropped + self._freed(slots)

    def _freed(self, slots: tuple[int, ...]) -> list[NodeEffect]:
        """Clear slots whose sequences have ended; steps that waited for these have ended too."""
        self._unpark()
        return [ClearSlots(slots)] if slots else []

    def _drop(self, keys: list[AttemptKey]) -> list[NodeEffect]:
        """Drop these attempts, except the one that is running, which is dropped when it ends."""
        dropped = [key for key in keys if key != self.running]
        if not dropped:
            return []
        self._queue = deque(key for key in self._queue if key not in dropped)
        self._parked = [key for key in self._parked if key not in dropped]
        return [GiveBack(tuple(self._joins.pop(key).fragments)) for key in dropped]
