"""The unanswered requests and their attempts: admission, replay and completion. Pure.

A request is executed in attempts, one at a time. It is in one of two states:

    under way   an attempt was begun, under a number of its own and with the view of the pipeline at that time
    waiting     a stage that it needs has no node, or its last attempt was ended; the next one has not begun

Rules:

- When a node of a stage is lost, every attempt that needs the stage is repeated, unless another replica of the stage,
  or every stage that reads from it, is known to have the attempt. In case of doubt an attempt is repeated, because that
  only costs time.
- A request records each lost node that was executing it. When their number reaches the allowed attempts, it is refused.
- Outputs of an attempt that has ended are dropped.

Invariant: every request that was submitted ends exactly once, with :class:`~runtime.coordinator.events.Resolve` or with
:class:`~runtime.coordinator.events.Reject`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from onnxsplit.errors import OnnxsplitError
from runtime.coordinator.deadlines import Deadlines
from runtime.coordinator.diagnosis import awaited, stage_name
from runtime.coordinator.events import (
    Again,
    Effects,
    Enter,
    Forget,
    Reject,
    Resolve,
    Returned,
    Steps,
    Submitted,
    Tick,
)
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.request_record import OpenRequest
from runtime.coordinator.roster import Roster
from runtime.errors import DeadlineExceeded, NodeFailed, PipelineError, StageFailed, StageUnavailable
from runtime.timings import Timings
from runtime.topology import StageGraph
from runtime.wire.messages.data import ANY, AttemptKey, Failed, Step, Visit

Choose = Callable[[int, int], int | None]
"""Chooses the node that is to execute a stage, for a request of this cost."""

_SMOOTHING = 0.05  # weight of the latest attempt in the usual time of one


class RequestTable:
    """All unanswered requests.

    Args:
        graph: the stages.
        roster: the nodes.
        links: the dead links.
        effects: collects the effects.
        choose: chooses the node of a stage that joins several inputs, whose fragments must meet.
        timings: when an attempt counts as lost.
        attempts: a request is refused after this many nodes were lost while they executed it; with 1, nothing is
            repeated.

    Attributes:
        retries: the number of attempts that were repeated.
        has_ended: whether a request has ended since this was set to False.
        deadlines: the deadlines of the requests.
        timings: as given; they may be replaced.
    """

    def __init__(
        self,
        graph: StageGraph,
        roster: Roster,
        links: DeadLinks,
        effects: Effects,
        *,
        choose: Choose,
        timings: Timings,
        attempts: int,
    ) -> None:
        self.retries = 0
        self.has_ended = False
        self._graph = graph
        self._roster = roster
        self._links = links
        self._effects = effects
        self._choose = choose
        self.timings = timings
        self._attempts = attempts
        self._requests: dict[int, OpenRequest] = {}
        self._waiting: dict[int, None] = {}  # ordered by the time at which they began to wait
        self._usual_ns = 0.0  # time from an attempt's beginning to its end
        self.deadlines = Deadlines(self._requests)

    def __len__(self) -> int:
        return len(self._requests)

    # State

    @property
    def in_flight(self) -> tuple[AttemptKey, ...]:
        """The attempts under way."""
        return tuple((number, r.attempt) for number, r in self._requests.items() if not r.waits)

    @property
    def cost(self) -> int:
        """The cost of all requests together. No node can have more to do."""
        return sum(request.cost for request in self._requests.values())

    @property
    def waiting(self) -> int:
        """The number of requests that wait for their next attempt."""
        return len(self._waiting)

    @property
    def oldest(self) -> int | None:
        """The first request; None when there is none."""
        return next(iter(self._requests), None)

    @property
    def oldest_view(self) -> int:
        """The earliest view in which an attempt under way began; the present one when none is under way."""
        return min((r.view for r in self._requests.values() if not r.waits), default=self._roster.view)

    def asked(self, number: int) -> OpenRequest | None:
        """What is known of a request; None if it has ended."""
        return self._requests.get(number)

    def attempt(self, number: int) -> int:
        """The attempt at a request that is under way; 0 when there is none."""
        request = self._requests.get(number)
        return request.attempt if request is not None and not request.waits else 0

    def overdue(self, now_ns: int) -> tuple[AttemptKey, ...]:
        """The attempts that have been under way for too long."""
        patience = max(self.timings.lost_s * 1e9, self.timings.stall_factor * self._usual_ns)
        return tuple(
            (number, request.attempt)
            for number, request in self._requests.items()
            if not request.waits and now_ns - request.begun_ns > patience * 2 ** min(request.attempt - 1, 8)
        )

    def expired(self, now_ns: int) -> tuple[AttemptKey, ...]:
        """The requests whose deadline has passed, and their attempts."""
        return tuple((number, self._requests[number].attempt) for number in self.deadlines.pop_expired(now_ns))

    # Attempts

    def submit(self, event: Submitted) -> None:
        """Accept a request, and begin the first attempt at it if all stages that it needs have nodes."""
        self._accept(event.request, event.wanted, event.cost, event.deadline_ns)
        self._begin(event.request, event.now_ns)

    def enter(
        self, number: int, wanted: tuple[str, ...], cost: int, deadline_ns: int | None, now_ns: int
    ) -> Enter | None:
        """Accept a request, and begin the first attempt; None, with nothing changed, if a stage has no node."""
        if not self._graph.needed(wanted) <= self._roster.served:
            return None
        return self._attempt(number, self._accept(number, wanted, cost, deadline_ns), now_ns)

    def _accept(self, number: int, wanted: tuple[str, ...], cost: int, deadline_ns: int | None) -> OpenRequest:
        request = OpenRequest(wanted, self._graph.needed(wanted), cost, deadline_ns, set(wanted))
        self._requests[number] = request
        if deadline_ns is not None:
            self.deadlines.add(deadline_ns, number)
        return request

    def _begin(self, number: int, now_ns: int) -> None:
        """Begin an attempt, or wait for a node, or refuse the request if no node can be expected."""
        request = self._requests[number]
        if request.needed <= self._roster.served:
            self._effects.on_requests.append(self._attempt(number, request, now_ns))
            return
        error = self._unavailable(request.needed - self._roster.served)
        if error is not None:
            self.refuse(number, error)
            return
        request.waits = True
        self._waiting[number] = None

    def _attempt(self, number: int, request: OpenRequest, now_ns: int) -> Enter:
        """Begin an attempt; all stages that it needs have nodes."""
        route = self._graph.open_route(request.needed)
        for stage in self._graph.joins & request.needed:
            chosen = self._choose(stage, request.cost)
            assert chosen is not None
            route = (*route[:stage], chosen, *route[stage + 1 :])
        request.waits = False
        request.attempt += 1
        request.view = self._roster.view
        request.route = route
        request.begun_ns = now_ns
        return Enter(number, request.attempt, request.view, request.cost, request.deadline_ns, route, request.wanted)

    def _retry(self, number: int, reason: str) -> None:
        """End an attempt. The next one waits to begin; a request that has no attempts left is refused."""
        request = self._requests[number]
        if self._attempts == 1:
            loss = "; ".join(request.blamed) or reason
            self.refuse(number, NodeFailed(f"{loss}; with one attempt a request is not tried again"))
            return
        if len(request.blamed) >= self._attempts:
            losses = "; ".join(dict.fromkeys(request.blamed))
            nodes = len(request.blamed)
            self.refuse(number, NodeFailed(f"the request was given up after it ran on {nodes} nodes: {losses}"))
            return
        self.retries += 1
        request.missing = set(request.wanted)
        request.visits.clear()
        request.waits = True
        self._waiting[number] = None
        self._effects.on_requests.append(Again(number, request.attempt, reason))
        self._forget(number, request)

    def _forget(self, number: int, request: OpenRequest) -> None:
        nodes = [node.identity for node in self._roster.nodes.values() if node.slot[0] in request.needed]
        self._effects.on_nodes.append(
            Forget(number, request.attempt, tuple(identity for identity in nodes if identity))
        )

    def resume(self, now_ns: int) -> None:
        """Begin the next attempt at every request that waits and now has nodes."""
        waiting = list(self._waiting)
        self._waiting.clear()
        for number in waiting:
            self._begin(number, now_ns)

    # What ends attempts

    def node_lost(self, stage: int, number: int, called: str, reason: str, steps: Steps) -> int:
        """Repeat the attempts that a lost node may have had.

        Args:
            stage: the node's stage.
            number: the node's number.
            called: the node's name in messages.
            reason: what happened to it.
            steps: how far all nodes are with all attempts in flight.

        Returns:
            the number of these attempts.
        """
        count = 0
        for key, request in list(self._requests.items()):
            if request.waits:
                continue
            known = steps.get((key, request.attempt), {})
            if known.get(number) is Step.RUNNING:
                request.blamed.append(f"{called} {reason}")
            if stage in request.needed and self._may_be_stuck(request, stage, number, known):
                count += 1
                self._retry(key, f"{called} was lost")
        return count

    def _may_be_stuck(self, request: OpenRequest, stage: int, lost: int, known: Mapping[int, Step]) -> bool:
        """True when the loss of a node may mean that the attempt never gets past its stage."""
        if request.route[stage] not in (ANY, lost):
            return False

        def has(which: int) -> bool:
            return any(known.get(node, Step.UNKNOWN) is not Step.UNKNOWN for node in self._roster.numbers(which))

        if has(stage):
            return False
        readers = self._graph.readers[stage] & request.needed
        asked = request.missing.intersection(self._graph.outputs(stage))
        return bool(asked) or not readers or not all(has(reader) for reader in readers)

    def links_died(self, links: list[LinkKey], now_ns: int) -> bool:
        """Repeat the attempts that may be stuck at links that were just found dead; True when there are any."""
        if self._attempts == 1:
            return False
        stuck = []
        for number, request in self._requests.items():
            is_old = now_ns - request.begun_ns > self.timings.unreachable_s * 1e9
            if is_old and not request.waits and (on_way := self._links.on_way(request.needed, links)):
                stuck.append((number, on_way[0]))
        for number, story in stuck:
            self._retry(number, story)
        return bool(stuck)

    def time_passed(self, event: Tick) -> None:
        """Repeat the attempts that are overdue."""
        overdue = self.overdue(event.now_ns)
        for number, attempt in overdue:
            request = self._requests[number]
            since_s = (event.now_ns - request.begun_ns) / 1e9
            where = self._progress_of(request, event.steps.get((number, attempt), {}))
            self._retry(number, f"nothing was heard of it for {since_s:.0f} s: {where}")
        if overdue:
            self.resume(event.now_ns)

    def _progress_of(self, request: OpenRequest, steps: Mapping[int, Step]) -> str:
        """Describe what an attempt is waiting for, and the dead links on its way."""
        blocked = self._links.on_way(request.needed, self._links.stories)
        return "; ".join([awaited(self._graph, self._roster, request.needed, steps), *blocked])

    # What ends requests

    def returned(self, event: Returned) -> None:
        """Handle output tensors of an attempt; the last ones end the request."""
        visits = self.complete(event.request, event.attempt, event.names, event.history)
        if visits is not None:
            self._effects.on_requests.append(Resolve(event.request, visits))

    def complete(
        self, number: int, attempt: int, names: tuple[str, ...], history: tuple[Visit, ...]
    ) -> tuple[Visit, ...] | None:
        """Handle output tensors of an attempt; returns the visits of the request if they were the last ones."""
        request = self._requests.get(number)
        if request is None or request.waits or request.attempt != attempt:
            return None
        request.missing.difference_update(names)
        for visit in history:
            request.visits[visit.stage] = visit
        if request.missing:
            return None
        self._end(number)
        last_ns = 0
        for visit in request.visits.values():
            self._roster.visited(visit, request.cost)
            last_ns = max(last_ns, visit.sent_ns)
        if last_ns:
            self._usual_ns += _SMOOTHING * (max(0, last_ns - request.begun_ns) - self._usual_ns)
        return tuple(request.visits.values())

    def reported(self, message: Failed) -> None:
        """End a request because a node could not execute it."""
        request = self._requests.get(message.request)
        node = self._roster.nodes.get((message.stage, message.replica))
        if node is None or request is None or request.attempt != message.attempt:
            return
        node.counters.failures += 1
        self.refuse(message.request, StageFailed(f"{node.called} could not execute the request: {message.reason}"))

    def time_ran_out(self, number: int, steps: Mapping[int, Step]) -> None:
        """End a request whose deadline has passed; its error says what it was waiting for."""
        request = self._requests.get(number)
        if request is None:
            return
        absent = sorted(request.needed - self._roster.served)
        if not request.waits:
            where = self._progress_of(request, steps)
        else:
            where = "its next attempt had not begun"
            if absent:
                where = "it waited for a node of " + ", ".join(stage_name(self._roster, stage) for stage in absent)
            where = "; ".join([where, *self._links.on_way(request.needed, self._links.stories)])
        tries = f" in {request.attempt} attempts" if request.attempt > 1 else ""
        self.refuse(number, DeadlineExceeded(f"the request's time ran out{tries}: {where}"))

    def refuse_hopeless(self) -> None:
        """Refuse the requests that wait for a stage whose nodes keep failing."""
        for number in list(self._waiting):
            error = self._unavailable(self._requests[number].needed - self._roster.served)
            if error is not None:
                self.refuse(number, error)

    def _unavailable(self, stages: Iterable[int]) -> PipelineError | None:
        for stage in stages:
            story = self._roster.broken(stage)
            if story is not None:
                return StageUnavailable(f"stage {stage} has no node: {story}")
        return None

    def refuse(self, number: int, error: OnnxsplitError) -> None:
        """End a request with an error; nothing happens when it has ended."""
        request = self._requests.get(number)
        if request is None:
            return
        self._end(number)
        self._effects.on_requests.append(Reject(number, error))
        if request.attempt:
            self._forget(number, request)

    def refuse_all(self, error: OnnxsplitError) -> None:
        """End all requests with an error."""
        for number in list(self._requests):
            self.refuse(number, error)

    def _end(self, number: int) -> None:
        del self._requests[number]
        self._waiting.pop(number, None)
        self.has_ended = True
