"""What a coordinator decides about its nodes and its requests, without doing it: an event in, effects out.

Knows no socket, no process and no clock. :data:`TRANSITIONS` holds what may happen to the pipeline; nodes have a table
in :mod:`runtime.coordinator.roster`; docs/states.md is drawn from both.

The promise: while the coordinator lives, every request that was accepted is answered once, with the right tensors, all
of one attempt, or with an error that says why. It rests on this:

- The coordinator holds a request's inputs until the answer is there.
- When a node of stage s is lost, every attempt that needs s is made again, unless it is known that another node of s
  has it, or that everybody who reads from s has. What is known stands in the nodes' ledgers; what is not known counts
  against the attempt, since making it again only costs time.
- An attempt begins with the number of changes there have been in the pipeline (its *view*), and nobody who knows of
  fewer passes it on. So no attempt that began after a loss is sent to the node that was lost.
- What comes back from an attempt that is over is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heapify, heappop, heappush

from onnxsplit.plan import CALLER, Plan
from runtime.coordinator.events import (
    Again,
    Announce,
    CloseAsked,
    CoordinatorEffect,
    CoordinatorEvent,
    Declined,
    DrainAsked,
    Drained,
    Enter,
    Expired,
    Forget,
    GivenUp,
    GiveStage,
    Introduce,
    Joined,
    LeaveWanted,
    LinkChanged,
    LinksSeen,
    Lost,
    Met,
    Prepared,
    Reconnected,
    Reject,
    Reported,
    Resolve,
    Returned,
    Scaled,
    SendAway,
    ShareMemory,
    Steps,
    Submitted,
    Tick,
    TimedOut,
    Unsendable,
)
from runtime.coordinator.reach import LinkKey, dead_ends
from runtime.coordinator.roster import KillNode, NodeRecord, Phase, Refusal, Roster
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    LaunchFailed,
    NodeFailed,
    PipelineClosed,
    PipelineError,
    StageFailed,
    StageUnavailable,
)
from runtime.timings import Timings
from runtime.topology import sources
from runtime.transition_table import Machine
from runtime.wire.messages.control import Fate
from runtime.wire.messages.data import ANY, NOT_NEEDED, AttemptKey, Failed, Step, Visit

Choose = Callable[[int, int], int | None]
"""The number of the node that is to execute a stage for a request of a cost."""


_REMEMBERED = 1024  # of what is kept although it may not be needed again


class PipelinePhase(Enum):
    """Of the pipeline."""

    STARTING = auto()
    READY = auto()
    DRAINING = auto()
    FAILED = auto()
    CLOSED = auto()


class PipelineChange(Enum):
    """What happens to it."""

    ALL_READY = "all nodes are ready"
    DRAIN = "drain"
    FAIL = "a node fails"
    CLOSE = "close"


TRANSITIONS: Mapping[tuple[PipelinePhase, PipelineChange], PipelinePhase] = {
    (PipelinePhase.STARTING, PipelineChange.ALL_READY): PipelinePhase.READY,
    (PipelinePhase.STARTING, PipelineChange.FAIL): PipelinePhase.FAILED,
    (PipelinePhase.READY, PipelineChange.DRAIN): PipelinePhase.DRAINING,
    **{(state, PipelineChange.CLOSE): PipelinePhase.CLOSED for state in PipelinePhase},
}


@dataclass(slots=True)
class _Request:
    wanted: tuple[str, ...]
    needed: frozenset[int]
    cost: int
    deadline_ns: int | None
    entered_ns: int
    missing: set[str]
    attempt: int = 0
    waits: bool = False  # for a node of a stage it needs
    view: int = 0
    route: tuple[int, ...] = ()
    blamed: list[str] = field(default_factory=list)  # stories of nodes that died executing it
    begun_ns: int = 0
    visits: dict[int, Visit] = field(default_factory=dict)


class CoordinatorState:
    """The state machine of one coordinator.

    Args:
        plan: what the pipeline runs.
        replicas: number of nodes of every stage.
        choose: names the node of a stage that joins several inputs, whose fragments must meet.
        timings: when to try again.
        attempts: a request that killed so many nodes is not tried any more; 1: nothing is ever tried again.
        elastic: take nodes beyond those that there are to be, for as long as they stay.
        patient: wait for another when a node is lost before all were ready.
    """

    def __init__(
        self,
        plan: Plan,
        replicas: tuple[int, ...],
        *,
        choose: Choose,
        timings: Timings | None = None,
        attempts: int = 3,
        elastic: bool = False,
        patient: bool = False,
    ) -> None:
        self.error: PipelineError | None = None
        self.retries = 0
        hosts = {(s.index, replica): host for s in plan.stages for replica, host in enumerate(s.hosts)}
        self.roster = Roster(replicas, timings or Timings(), hosts=hosts, elastic=elastic)
        self.dead_links: dict[LinkKey, str] = {}  # and their stories
        self.data_address = ""  # where nodes send results
        self._machine = Machine("pipeline", TRANSITIONS, PipelinePhase.STARTING)
        self._plan = plan
        self._choose = choose
        self._timings = timings or Timings()
        self._attempts = attempts
        self._patient = patient
        self._senders = {s.index: sources(plan, s.index) for s in plan.stages}
        self._joins = frozenset(stage for stage, senders in self._senders.items() if len(senders) > 1)
        self._readers = {
            s.index: frozenset(o.index for o in plan.stages if set(s.outputs) & set(o.inputs)) for s in plan.stages
        }
        self._paths: dict[int, frozenset[int]] = {
            stage: readers | ({CALLER} if set(plan.stages[stage].outputs) & set(plan.outputs) else set())
            for stage, readers in self._readers.items()
        }
        self._paths[CALLER] = frozenset(s.index for s in plan.stages if CALLER in self._senders[s.index])
        self._requests: dict[int, _Request] = {}
        self._waiting: dict[int, None] = {}  # those that wait for a node, in order
        self._needed: dict[tuple[str, ...], frozenset[int]] = {}
        self._routes: dict[frozenset[int], tuple[int, ...]] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._usual_ns = 0.0  # from an attempt's beginning to its end

    @property
    def state(self) -> PipelinePhase:
        """Of the pipeline."""
        return self._machine.state

    def handle(self, event: CoordinatorEvent) -> list[CoordinatorEffect]:
        """Take an event; returns what is to be done, in order."""
        match event:
            case Submitted():
                return self._submitted(event)
            case Returned():
                return self._returned(event)
            case Joined():
                return self._joined(event)
            case Met(mapped, now_ns):
                self.roster.mapped = frozenset(mapped)
                return [*self._shared(), *self._resume(now_ns)]
            case Prepared():
                return self._prepared(event)
            case Declined(identity, reason, now_ns):
                record = self.roster.by_identity(identity)
                if record is not None and self.state is PipelinePhase.STARTING:
                    return self._fail(LaunchFailed(f"{record.called} refused: {reason}"))
                return [] if record is None else self._gone(record, f"refused: {reason}", {}, now_ns, "refused")
            case LeaveWanted(identity, now_ns):
                return self._leave(identity, now_ns)
            case Lost(number, reason, steps, now_ns, fate):
                record = self.roster.by_number(number)
                return [] if record is None else self._gone(record, reason, steps, now_ns, fate)
            case Reconnected(identity):
                record = self.roster.by_identity(identity)
                if record is None or not record.introduced:
                    return []
                return [Introduce((identity,), meet=False), ShareMemory(identity, record.readers)]
            case LinksSeen(dead, now_ns):
                return self._links_seen(dead, now_ns)
            case Reported(message):
                return self._reported(message)
            case Expired(request, steps):
                return self._expired(request, steps)
            case GivenUp(request):
                return self._refuse(request, Cancelled("the caller gave the request up"))
            case Unsendable(request, error, attempt):
                return self._refuse(request, error) if attempt in (0, self.attempt(request)) else []
            case Tick():
                return self._tick(event)
            case TimedOut(reason):
                return self._fail(LaunchFailed(reason)) if self.state is PipelinePhase.STARTING else []
            case Scaled(stage, replicas, now_ns):
                return self._scaled(stage, replicas, now_ns)
            case DrainAsked():
                if self.state is PipelinePhase.READY:
                    self._machine.go(PipelineChange.DRAIN)
                    self.error = PipelineClosed("the pipeline is ending and takes no more requests")
                return self._settled()
            case CloseAsked():
                return self._close()

    @property
    def in_flight(self) -> tuple[AttemptKey, ...]:
        """The attempts under way."""
        return tuple((number, r.attempt) for number, r in self._requests.items() if not r.waits)

    @property
    def unanswered(self) -> int:
        """Requests that are not answered yet."""
        return len(self._requests)

    @property
    def unanswered_cost(self) -> int:
        """What they cost together: no node can have more to do."""
        return sum(request.cost for request in self._requests.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for a node of a stage they need."""
        return len(self._waiting)

    @property
    def oldest(self) -> int | None:
        """The first request that is not answered; None when all are."""
        return next(iter(self._requests), None)

    def attempt(self, request: int) -> int:
        """The attempt at a request that is under way; 0 for none."""
        found = self._requests.get(request)
        return found.attempt if found is not None and not found.waits else 0

    def next_deadline_ns(self) -> int | None:
        """When a request's time runs out next."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expired(self, now_ns: int) -> tuple[AttemptKey, ...]:
        """The requests whose time has run out, and their attempts."""
        late = []
        while (first := self.next_deadline_ns()) is not None and first <= now_ns:
            number = heappop(self._deadlines)[1]
            late.append((number, self._requests[number].attempt))
        return tuple(late)

    def overdue(self, now_ns: int) -> tuple[AttemptKey, ...]:
        """The attempts of which nothing was heard for too long."""
        patience = max(self._timings.lost_s * 1e9, self._timings.stall_factor * self._usual_ns)
        return tuple(
            (number, found.attempt)
            for number, found in self._requests.items()
            if not found.waits and now_ns - found.begun_ns > patience * 2 ** min(found.attempt - 1, 8)
        )

    # Nodes

    def _joined(self, event: Joined) -> list[CoordinatorEffect]:
        refusal = self.roster.join(event.identity, event.hello, event.now_ns, open_=self._open)
        if isinstance(refusal, Refusal):
            return [SendAway(event.identity, refusal.reason, refusal.fate, refusal.again)]
        if refusal is None:
            return []
        record = refusal
        effects: list[CoordinatorEffect] = [GiveStage(record.identity, record.slot)]
        if self.state is not PipelinePhase.STARTING:
            effects.append(Introduce((record.identity,), meet=False))
        elif all(node.hello is not None for node in self.roster.nodes.values()):
            effects.append(self._introduce())
        return effects

    @property
    def _open(self) -> bool:
        return self.state in (PipelinePhase.STARTING, PipelinePhase.READY, PipelinePhase.DRAINING)

    def _introduce(self) -> CoordinatorEffect:
        self.roster.view += 1
        self.roster.dead_ends = self._dead_ends()
        return Introduce(self.roster.introduced(everyone=self.state is PipelinePhase.STARTING), meet=True)

    def _prepared(self, event: Prepared) -> list[CoordinatorEffect]:
        record = self.roster.by_identity(event.identity)
        if record is None:
            return []
        is_new = self.roster.prepare(record, event.mapped, event.now_ns)
        if self.state is PipelinePhase.STARTING:
            if self.roster.missing():
                return []
            self._machine.go(PipelineChange.ALL_READY)
            return [*self._shared(), Announce(None)]
        return [*self._shared(), *([self._introduce()] if is_new else [])]

    def _shared(self) -> list[CoordinatorEffect]:
        if self.state is PipelinePhase.STARTING:
            return []
        return [ShareMemory(identity, readers) for identity, readers in self.roster.share()]

    def _gone(
        self, record: NodeRecord, reason: str, steps: Steps, now_ns: int, fate: Fate = "rejoin"
    ) -> list[CoordinatorEffect]:
        """A node is lost: its work is done again elsewhere."""
        if self.state in (PipelinePhase.CLOSED, PipelinePhase.FAILED):
            return []
        called = record.called
        if self.state is PipelinePhase.STARTING and not self._patient:
            return self._fail(LaunchFailed(f"{called} {reason}"))
        number, known_of = record.number, record.phase in (Phase.READY, Phase.LEAVING)
        had_work = known_of and not record.released
        effects: list[CoordinatorEffect] = [*self.roster.lose(record, reason, now_ns)]
        if record.identity:  # it may live, and come back when a link does
            told = f"the pipeline took it for dead: it {reason}" if fate == "rejoin" else f"it {reason}"
            effects.append(SendAway(record.identity, told, fate))
            record.identity = b""
        stage = record.slot[0]
        for request, found in list(self._requests.items()) if had_work else ():
            known = steps.get((request, found.attempt), {})
            if not found.waits and known.get(number) is Step.RUNNING:
                found.blamed.append(f"{called} {reason}")
            if not found.waits and stage in found.needed and self._lacks(found, stage, number, known):
                record.counters.retries += 1
                effects += self._again(request, f"{called} was lost")
        if known_of or (self.state is PipelinePhase.STARTING and self.roster.introduced(everyone=False)):
            effects.append(self._introduce())  # what is to be made again begins when that is done
        return [*effects, *self._give_up()]

    # Links

    @property
    def entrances(self) -> frozenset[int]:
        """The stages that the coordinator itself sends to."""
        return self._paths[CALLER]

    @property
    def unreachable(self) -> str | None:
        """Why no request can get through although every stage has a node: dead links. None when all is well."""
        return "; ".join(self.dead_links.values()) if 0 in self._dead_ends() else None

    def avoided(self, stage: int) -> frozenset[int]:
        """The nodes of a stage that some of those who send to it cannot reach."""
        senders = self._senders[stage]
        return frozenset(b for a, b in self.dead_links if self._stage_of(b) == stage and self._stage_of(a) in senders)

    def _stage_of(self, number: int) -> int | None:
        return CALLER if number == 0 else self.roster.stage_of(number)

    def _dead_ends(self) -> frozenset[int]:
        nodes = {stage.index: self.roster.takers(stage.index) for stage in self._plan.stages}
        return dead_ends(self._paths, nodes, self.dead_links.keys())

    def _links_seen(self, dead: frozenset[LinkKey], now_ns: int) -> list[CoordinatorEffect]:
        """Links died or came back: say so, lead requests around them, and try again what may be stuck there."""
        effects: list[CoordinatorEffect] = []
        for link in self.dead_links.keys() - dead:
            del self.dead_links[link]
            sender, receiver = map(self.roster.name_of, link)
            if self.roster.linked >= set(link):  # else one of the two is gone
                effects.append(LinkChanged(f"{sender} reaches {receiver} again", is_dead=False))
        new = sorted(dead - self.dead_links.keys())
        for link in new:
            sender, receiver = map(self.roster.name_of, link)
            record = self.roster.by_number(link[1])
            at = record.hello.address if record is not None and record.hello is not None else self.data_address
            self.dead_links[link] = story = f"{sender} cannot reach {receiver} at {at}"
            self.roster.note_link(*link, story, now_ns)
            effects.append(LinkChanged(story, is_dead=True))
        if self.state in (PipelinePhase.READY, PipelinePhase.DRAINING):
            if self._dead_ends() != self.roster.dead_ends:
                effects.append(self._introduce())
            effects += self._stuck(new, now_ns)
        return effects

    def _stuck(self, links: list[LinkKey], now_ns: int) -> list[CoordinatorEffect]:
        """Make attempts again that may be stuck at links that just were found dead."""
        if self._attempts == 1:
            return []
        effects: list[CoordinatorEffect] = []
        for number, request in list(self._requests.items()):
            old = now_ns - request.begun_ns > self._timings.unreachable_s * 1e9
            on_way = [self.dead_links[link] for link in links if self._passes(request, link)]
            if old and on_way and not request.waits:
                effects += self._again(number, on_way[0])
        return [*effects, *self._resume(now_ns)] if effects else []

    def _passes(self, request: _Request, link: LinkKey) -> bool:
        """True when the request's way may lead over a link."""
        return all(self._stage_of(end) in (*request.needed, CALLER) for end in link)

    def _blocked(self, request: _Request) -> str:
        """The dead links that a request's way may lead over, for messages about it."""
        return "".join(f"; {story}" for link, story in self.dead_links.items() if self._passes(request, link))

    def _lacks(self, request: _Request, stage: int, lost: int, known: Mapping[int, Step]) -> bool:
        """True when the loss of a node may mean that the attempt never gets past its stage."""
        pinned = request.route[stage]
        if pinned not in (ANY, lost):
            return False

        def has(which: int) -> bool:
            return any(known.get(node, Step.UNKNOWN) is not Step.UNKNOWN for node in self.roster.numbers(which))

        if has(stage):
            return False
        readers = self._readers[stage] & request.needed
        asked = request.missing.intersection(self._plan.stages[stage].outputs)
        return bool(asked) or not readers or not all(has(reader) for reader in readers)

    def _leave(self, identity: bytes, now_ns: int) -> list[CoordinatorEffect]:
        record = self.roster.by_identity(identity)
        if record is None:
            return []
        if record.phase is not Phase.READY or not self._open:
            return [SendAway(identity, "it asked to leave", "end")]
        self.roster.leave(record)
        effects = [self._introduce(), *self.roster.replace(record, now_ns)]
        record.leaves_at = self.roster.view
        return [*effects, *self._settled()]

    def _scaled(self, stage: int, replicas: int, now_ns: int) -> list[CoordinatorEffect]:
        if not self._open:
            return []
        started, removed = self.roster.scale(stage, replicas, now_ns)
        effects: list[CoordinatorEffect] = [*started]
        leaving = [record for record in removed if record.phase is Phase.READY]
        for record in removed:
            if record in leaving:
                self.roster.leave(record)
            else:
                effects.append(KillNode(record.number))
        if leaving:
            effects.append(self._introduce())
            for record in leaving:
                record.leaves_at = self.roster.view
        return [*effects, *self._settled()]

    def _tick(self, event: Tick) -> list[CoordinatorEffect]:
        effects: list[CoordinatorEffect] = [*self.roster.due(event.now_ns)]
        for number, attempt in self.overdue(event.now_ns):
            request = self._requests[number]
            since_s = (event.now_ns - request.begun_ns) / 1e9
            awaited = self._awaited(request, event.steps.get((number, attempt), {}))
            effects += self._again(
                number, f"nothing was heard of it for {since_s:.0f} s: {awaited}{self._blocked(request)}"
            )
            effects += self._resume(event.now_ns)
        return effects

    def _awaited(self, request: _Request, steps: Mapping[int, Step]) -> str:
        """What a request waits for: the stages that are next, with their nodes, as far as is known."""
        at = {step: {self.roster.stage_of(n): n for n, found in steps.items() if found is step} for step in Step}
        behind = request.needed - at[Step.DONE].keys()
        if not behind:
            return "its outputs were on their way from " + self._names(max(request.needed))
        words = []
        for stage in sorted(behind):
            running = self.roster.by_number(at[Step.RUNNING].get(stage, -1))
            if running is not None:
                words.append(f"{running.called} was running it")
            elif not self._senders[stage] & behind:  # else it is the turn of another first
                words.append(f"{self._names(stage)} had not begun it")
        return "; ".join(words)

    def _names(self, stage: int) -> str:
        """A stage and its nodes, as messages name them, with what is wrong with those that are not ready."""
        records = [record for slot, record in self.roster.nodes.items() if slot[0] == stage]
        if len(records) == 1:
            return records[0].called + _unready(records[0])
        nodes = ", ".join(f"{stage}.{record.slot[1]}{_unready(record)}" for record in records)
        return f"stage {stage} (nodes {nodes})"

    # Requests

    def _submitted(self, event: Submitted) -> list[CoordinatorEffect]:
        if self.error is not None:
            return [Reject(event.request, self.error)]
        if self.state is not PipelinePhase.READY:
            return [Reject(event.request, PipelineClosed("the pipeline is not ready"))]
        needed = self._needed.get(event.wanted)
        if needed is None:
            if len(self._needed) >= _REMEMBERED:
                self._needed.clear()
            needed = self._needed[event.wanted] = self._plan.stages_for(event.wanted)
        self._requests[event.request] = _Request(
            event.wanted, needed, event.cost, event.deadline_ns, event.now_ns, set(event.wanted)
        )
        if event.deadline_ns is not None:
            self._note_deadline(event.deadline_ns, event.request)
        return self._begin(event.request, event.now_ns)

    def _note_deadline(self, deadline_ns: int, number: int) -> None:
        """Remember a deadline; those of requests that were answered long before theirs go when they are most."""
        if len(self._deadlines) > 2 * len(self._requests) + _REMEMBERED:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapify(self._deadlines)
        heappush(self._deadlines, (deadline_ns, number))

    def _begin(self, number: int, now_ns: int) -> list[CoordinatorEffect]:
        """Begin an attempt, or wait for a node."""
        request = self._requests[number]
        if not request.needed <= self.roster.served:
            error = self._hopeless(request.needed - self.roster.served)
            if error is not None:
                return self._refuse(number, error)
            request.waits = True
            self._waiting[number] = None
            return []
        route = self._routes.get(request.needed)
        if route is None:
            stages = range(len(self._plan.stages))
            route = self._routes[request.needed] = tuple(ANY if s in request.needed else NOT_NEEDED for s in stages)
        for stage in self._joins & request.needed:
            chosen = self._choose(stage, request.cost)
            assert chosen is not None
            route = (*route[:stage], chosen, *route[stage + 1 :])
        request.waits = False
        request.attempt += 1
        request.view = self.roster.view
        request.route = route
        request.begun_ns = now_ns
        return [
            Enter(
                number,
                request.attempt,
                request.view,
                request.cost,
                request.deadline_ns,
                request.route,
                request.wanted,
            )
        ]

    def _again(self, number: int, reason: str) -> list[CoordinatorEffect]:
        """End an attempt; another waits to begin, unless this request kills whoever tries."""
        request = self._requests[number]
        if self._attempts == 1:
            story = "; ".join(request.blamed) or reason
            return self._refuse(number, NodeFailed(f"{story}; with one attempt a request is not tried again"))
        if len(request.blamed) >= self._attempts:
            stories = "; ".join(dict.fromkeys(request.blamed))
            return self._refuse(
                number, NodeFailed(f"the request was given up after it ran on {len(request.blamed)} nodes: {stories}")
            )
        self.retries += 1
        request.missing = set(request.wanted)
        request.visits.clear()
        request.waits = True
        self._waiting[number] = None
        return [Again(number, request.attempt, reason), self._forget(number, request)]

    def _forget(self, number: int, request: _Request) -> CoordinatorEffect:
        nodes = [node.identity for node in self.roster.nodes.values() if node.slot[0] in request.needed]
        return Forget(number, request.attempt, tuple(identity for identity in nodes if identity))

    def _resume(self, now_ns: int) -> list[CoordinatorEffect]:
        """Begin what waited for a node, as far as it now can."""
        waiting, self._waiting = self._waiting, {}
        return [effect for number in waiting for effect in self._begin(number, now_ns)]

    def _hopeless(self, stages: Iterable[int]) -> PipelineError | None:
        for stage in stages:
            story = self.roster.broken(stage)
            if story is not None:
                return StageUnavailable(f"stage {stage} has no node: {story}")
        return None

    def _give_up(self) -> list[CoordinatorEffect]:
        """Refuse what waits for a stage whose nodes keep failing."""
        effects: list[CoordinatorEffect] = []
        for number in list(self._waiting):
            error = self._hopeless(self._requests[number].needed - self.roster.served)
            if error is not None:
                effects += self._refuse(number, error)
        return effects

    def _returned(self, event: Returned) -> list[CoordinatorEffect]:
        request = self._requests.get(event.request)
        if request is None or request.waits or request.attempt != event.attempt:
            return []
        request.missing.difference_update(event.names)
        for visit in event.history:
            request.visits[visit.stage] = visit
        if request.missing:
            return []
        self._end(event.request)
        last_ns = 0
        for visit in request.visits.values():
            self.roster.visited(visit)
            last_ns = max(last_ns, visit.sent_ns)
        if last_ns:
            self._usual_ns += 0.05 * (max(0, last_ns - request.begun_ns) - self._usual_ns)
        return [Resolve(event.request, tuple(request.visits.values())), *self._settled()]

    def _reported(self, message: Failed) -> list[CoordinatorEffect]:
        request = self._requests.get(message.request)
        record = self.roster.nodes.get((message.stage, message.replica))
        if record is None or request is None or request.attempt != message.attempt:
            return []
        record.failures += 1
        error = StageFailed(f"{record.called} could not execute the request: {message.reason}")
        return self._refuse(message.request, error)

    def _expired(self, number: int, steps: Mapping[int, Step]) -> list[CoordinatorEffect]:
        request = self._requests.get(number)
        if request is None:
            return []
        absent = sorted(request.needed - self.roster.served)
        if not request.waits:
            where = self._awaited(request, steps)
        elif absent:
            where = "it waited for a node of " + ", ".join(self._names(stage) for stage in absent)
        else:
            where = "its next attempt had not begun"
        where += self._blocked(request)
        tries = f" in {request.attempt} attempts" if request.attempt > 1 else ""
        return self._refuse(number, DeadlineExceeded(f"the request's time ran out{tries}: {where}"))

    def _refuse(self, number: int, error: PipelineError) -> list[CoordinatorEffect]:
        request = self._requests.get(number)
        if request is None:
            return []
        self._end(number)
        effects: list[CoordinatorEffect] = [Reject(number, error)]
        if request.attempt:
            effects.append(self._forget(number, request))
        return [*effects, *self._settled()]

    def _end(self, number: int) -> None:
        del self._requests[number]
        self._waiting.pop(number, None)

    def _settled(self) -> list[CoordinatorEffect]:
        """Let nodes go that nothing under way can reach any more; say so when nothing is under way at all."""
        effects: list[CoordinatorEffect] = []
        if self.roster.departing:
            oldest = min((r.view for r in self._requests.values() if not r.waits), default=self.roster.view)
            for record in self.roster.departing:
                if record.leaves_at <= oldest and not record.released:
                    record.released = True
                    effects.append(SendAway(record.identity, "it has no more work", "end"))
        if self.state is PipelinePhase.DRAINING and not self._requests:
            effects.append(Drained())
        return effects

    # The end

    def _fail(self, error: PipelineError) -> list[CoordinatorEffect]:
        self._machine.go(PipelineChange.FAIL)
        self.error = error
        return [Announce(error)]

    def _close(self) -> list[CoordinatorEffect]:
        if self.state is PipelinePhase.CLOSED:
            return []
        error = PipelineClosed("the pipeline was closed")
        effects: list[CoordinatorEffect] = [Announce(error)] if self.state is PipelinePhase.STARTING else []
        self._machine.go(PipelineChange.CLOSE)
        self.error = self.error or error
        for number in list(self._requests):
            effects += self._refuse(number, error)
        known = [node.identity for node in self.roster.nodes.values() if node.identity]
        return [*effects, *(SendAway(identity, "the pipeline was closed", "end") for identity in known)]


def _unready(record: NodeRecord) -> str:
    """What is wrong with a node that is not ready; nothing of one that is."""
    if record.phase is Phase.READY:
        return ""
    return f": {record.phase.value}" + (f", it {record.reason}" if record.reason else "")
