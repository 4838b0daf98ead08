"""The state machine of a coordinator: it takes an event and returns effects for others to perform. Pure.

**Theory.** The machine is a function from a state and an event to a new state and effects. It uses no socket, no
process and no clock: events carry the time. The effects come in two lists: effects on requests, which
:class:`~runtime.coordinator.request_io.RequestIO` performs in the thread that handles the event, and effects on nodes,
which the coordinator's thread performs. There are four tables of states: the pipeline's
(:mod:`runtime.coordinator.pipeline_phase`), and those of nodes (:mod:`runtime.coordinator.node_record`), requests
(:mod:`runtime.coordinator.requests`) and sequences (:mod:`runtime.coordinator.sequence_record`). docs/states.md is
drawn from all but that of requests.

**The promise.** While the coordinator lives, every request that it accepted is answered once: with the right tensors,
all of one attempt, or with an error that gives the reason. The promise rests on three rules:

1. The coordinator holds a request's inputs until the answer has arrived, so it can always make another attempt.
2. When a node is lost, every attempt that it may have had is repeated, unless other nodes are known to have the work.
3. Each change of the pipeline's nodes makes a new *view*, and views are counted. An attempt carries the view in which
   it began, and a node that knows only earlier views holds it back. So no attempt that began after a loss is ever sent
   to the lost node.

**Invariants.** A node that leaves is told to end only when no attempt is under way that began before the view in which
it left. After CLOSED and FAILED, no request is taken. A change that a table does not list raises IllegalEventError.

**Tests.** tests/runtime/test_coordinator_state.py tests each event; tests/runtime/test_world.py joins
this machine with those of its nodes (:mod:`runtime.testing`) and checks the promise under any order of messages, losses
and other faults that hypothesis finds.
"""

from __future__ import annotations

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import CALLER, Plan
from runtime.balance.board import PEERS
from runtime.coordinator.events import (
    Announce,
    CloseAsked,
    CoordinatorEvent,
    Decision,
    Declined,
    DrainAsked,
    Drained,
    Effects,
    Enter,
    Expired,
    GivenUp,
    GiveStage,
    Introduce,
    Joined,
    KillNode,
    LeaveWanted,
    LinksSeen,
    Lost,
    Met,
    Prepared,
    Reconnected,
    Reject,
    Reported,
    Returned,
    Scaled,
    SendAway,
    ShareMemory,
    Submitted,
    Tick,
    TimedOut,
    Unsendable,
)
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.node_record import NodeRecord, Phase
from runtime.coordinator.numbers import Numbers
from runtime.coordinator.pipeline_phase import TRANSITIONS, PipelineChange, PipelinePhase
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.refusals import Refusal
from runtime.coordinator.requests import Choose, RequestTable
from runtime.coordinator.roster import Roster
from runtime.coordinator.sequence_events import SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequences import SequenceTable
from runtime.coordinator.work import Work
from runtime.errors import Cancelled, LaunchFailed, PipelineClosed, PipelineError
from runtime.timings import Timings
from runtime.topology import StageGraph
from runtime.transition_table import Machine


class CoordinatorState:
    """The state machine of one coordinator.

    Args:
        plan: the plan that the pipeline runs.
        replicas: the number of nodes of every stage.
        choose: chooses the node of a stage that joins several inputs, whose fragments must meet.
        timings: when to try again.
        attempts: a request is refused after this many nodes were lost while they executed it; with 1, nothing is
            repeated.
        elastic: whether to accept nodes beyond the number of replicas, for as long as they stay.
        patient: whether to wait for another node when one is lost before all were ready.
        process_numbers: how many numbers there are for processes, the coordinator's own included.
        limits: the limits of sequences, for a plan with a decoder; None to take no sequences.

    Attributes:
        numbers: numbers requests, sequences and steps together.
        roster: the nodes.
        links: the dead links.
        requests: the unanswered requests.
        sequences: the sequences that have not ended; None where none are taken.
        work: the requests and the sequences together.
        entrances: the stages that the coordinator itself sends to.
        error: why no more requests are taken; None while they are.
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
        process_numbers: int = PEERS,
        limits: SequenceLimits | None = None,
    ) -> None:
        timings = timings or Timings()
        graph = StageGraph(plan)
        hosts = {(s.index, replica): host for s in plan.stages for replica, host in enumerate(s.hosts)}
        self.error: PipelineError | None = None
        self.roster = Roster(replicas, timings, hosts=hosts, elastic=elastic, process_numbers=process_numbers)
        self.links = DeadLinks(graph, self.roster)
        self.numbers = Numbers()
        self._effects = Effects()
        nodes = self.roster, self.links, self._effects
        self.requests = RequestTable(graph, *nodes, choose=choose, timings=timings, attempts=attempts)
        self.sequences: SequenceTable | None = None
        if limits is not None:
            self.sequences = SequenceTable(plan, graph, *nodes, self.numbers, limits, timings, attempts)
        self.work = Work(self.requests, self.sequences, self.numbers)
        self.entrances = graph.targets[CALLER]
        self._machine = Machine("pipeline", TRANSITIONS, PipelinePhase.STARTING)
        self._patient = patient

    @property
    def state(self) -> PipelinePhase:
        """The state of the pipeline."""
        return self._machine.state

    @property
    def is_open(self) -> bool:
        """Whether nodes may join and leave."""
        return self.state in (PipelinePhase.STARTING, PipelinePhase.READY, PipelinePhase.DRAINING)

    @property
    def settled(self) -> bool:
        """Whether the end of a request has no effect on nodes: none waits for it, and neither does the pipeline."""
        return self.state is PipelinePhase.READY and not self.roster.departing

    def enter(
        self, number: int, wanted: tuple[str, ...], cost: int, deadline_ns: int | None, now_ns: int
    ) -> Enter | None:
        """Begin a request at once, as :meth:`handle` does; None, with nothing changed, if anything is unusual."""
        if self.error is not None or self.state is not PipelinePhase.READY:
            return None
        return self.requests.enter(number, wanted, cost, deadline_ns, now_ns)

    def handle(self, event: CoordinatorEvent) -> Decision:
        """Handle an event; returns the effects on requests and the effects on nodes, each in order."""
        match event:
            case StepReturned():
                if self.sequences is not None:
                    self.sequences.returned(event)
            case Returned():
                self.requests.returned(event)
            case Submitted() | SequenceSubmitted():
                self._submitted(event)
            case Reported(message):
                self.work.reported(message)
            case Expired(request, steps):
                self.work.time_ran_out(request, steps)
            case GivenUp(request):
                self.work.refuse(request, Cancelled("the caller gave the request up"))
            case Unsendable():
                self.work.unsendable(event)
            case Tick(now_ns):
                self._effects.on_nodes += self.roster.due(now_ns)
                self.work.time_passed(event)
            case _:
                self._handle_nodes(event)
        if self.work.take_ended():
            self._settle()
        effects = self._effects
        decision = effects.on_requests, effects.on_nodes
        effects.on_requests, effects.on_nodes = [], []
        return decision

    def _handle_nodes(self, event: CoordinatorEvent) -> None:
        """Handle an event about nodes, or about the pipeline as a whole."""
        match event:
            case Joined():
                self._joined(event)
            case Met(mapped, now_ns):
                self.roster.mapped = frozenset(mapped)
                self._share_memory()
                self.work.resume(now_ns)
            case Prepared():
                self._prepared(event)
            case Declined(identity, reason, now_ns):
                self._declined(identity, reason, now_ns)
            case LeaveWanted(identity, now_ns):
                self._leave_wanted(identity, now_ns)
            case Lost(number):
                if (node := self.roster.by_number(number)) is not None:
                    self._lost(node, event)
            case Reconnected(identity):
                node = self.roster.by_identity(identity)
                if node is not None and node.introduced:
                    self._effects.on_nodes.append(Introduce((identity,), meet=False))
                    self._effects.on_nodes.append(ShareMemory(identity, node.readers))
            case LinksSeen(dead, now_ns):
                self._links_seen(dead, now_ns)
            case TimedOut(reason):
                if self.state is PipelinePhase.STARTING:
                    self._fail(LaunchFailed(reason))
            case Scaled():
                self._scaled(event)
            case DrainAsked():
                if self.state is PipelinePhase.READY:
                    self._machine.go(PipelineChange.DRAIN)
                    self.error = PipelineClosed("the pipeline is ending and takes no more requests")
                self._settle()
            case CloseAsked():
                self._close()

    # Requests

    def _submitted(self, event: Submitted | SequenceSubmitted) -> None:
        error: OnnxsplitError | None = self.error
        if error is None and self.state is not PipelinePhase.READY:
            error = PipelineClosed("the pipeline is not ready")
        error = error or self.work.submit(event)
        if error is not None:
            number = event.request if isinstance(event, Submitted) else event.number
            self._effects.on_requests.append(Reject(number, error))

    def _settle(self) -> None:
        """Tell leaving nodes to end once no work can reach them, and report when no work is in flight."""
        for node in self.roster.departing:
            if not node.released and not self.work.may_reach(node.number, node.leaves_at):
                node.released = True
                self._effects.on_nodes.append(SendAway(node.identity, "it has no more work", "end"))
        if self.state is PipelinePhase.DRAINING and not len(self.work):
            self._effects.on_nodes.append(Drained())

    # Nodes that join

    def _joined(self, event: Joined) -> None:
        answer = self.roster.join(event.identity, event.hello, event.now_ns, is_open=self.is_open)
        if isinstance(answer, Refusal):
            self._effects.on_nodes.append(SendAway(event.identity, answer.reason, answer.fate, answer.again))
        elif answer is not None:
            self._effects.on_nodes.append(GiveStage(answer.identity, answer.slot))
            if self.state is not PipelinePhase.STARTING:
                self._effects.on_nodes.append(Introduce((answer.identity,), meet=False))
            elif all(node.hello is not None for node in self.roster.nodes.values()):
                self._introduce()

    def _introduce(self) -> None:
        """Begin a new view: all processes are told which processes exist."""
        self.roster.view += 1
        self.roster.dead_ends = self.links.dead_ends()
        identities = self.roster.introduced(everyone=self.state is PipelinePhase.STARTING)
        self._effects.on_nodes.append(Introduce(identities, meet=True))

    def _prepared(self, event: Prepared) -> None:
        node = self.roster.by_identity(event.identity)
        if node is None:
            return
        node.why_unguided, node.left_to_cpu = event.why_unguided, event.left_to_cpu
        is_new = self.roster.prepare(node, event.mapped, event.now_ns)
        if self.state is PipelinePhase.STARTING:
            if not self.roster.missing():
                self._machine.go(PipelineChange.ALL_READY)
                self._share_memory()
                self.work.resume(event.now_ns)
                self._effects.on_nodes.append(Announce(None))
            return
        self._share_memory()
        if is_new:
            self._introduce()

    def _share_memory(self) -> None:
        if self.state is not PipelinePhase.STARTING:
            self._effects.on_nodes += [ShareMemory(identity, readers) for identity, readers in self.roster.share()]

    # Nodes that leave

    def _declined(self, identity: bytes, reason: str, now_ns: int) -> None:
        node = self.roster.by_identity(identity)
        if node is None:
            return
        if self.state is PipelinePhase.STARTING:
            self._fail(LaunchFailed(f"{node.called} refused: {reason}"))
        else:
            self._lost(node, Lost(node.number, f"refused: {reason}", {}, now_ns, "refused"))

    def _lost(self, node: NodeRecord, event: Lost) -> None:
        """Handle the loss of a node: another process gets its place, and its work is repeated elsewhere."""
        if not self.is_open:
            return
        called, reason = node.called, event.reason
        if self.state is PipelinePhase.STARTING and not self._patient:
            self._fail(LaunchFailed(f"{called} {reason}"))
            return
        number, was_known = node.number, node.phase in (Phase.READY, Phase.LEAVING)
        had_work = was_known and not node.released
        self._effects.on_nodes += self.roster.lose(node, reason, event.now_ns)
        if node.identity:  # it may still live, and report again when its link works
            told = f"the pipeline declared it dead: it {reason}" if event.fate == "rejoin" else f"it {reason}"
            self._effects.on_nodes.append(SendAway(node.identity, told, event.fate))
            node.identity = b""
        if had_work:
            node.counters.retries += self.work.node_lost(node.slot[0], number, called, reason, event.steps)
        if was_known or (self.state is PipelinePhase.STARTING and self.roster.introduced(everyone=False)):
            self._introduce()  # then Met begins the attempts that are to be repeated
        self.work.refuse_hopeless()

    def _leave_wanted(self, identity: bytes, now_ns: int) -> None:
        node = self.roster.by_identity(identity)
        if node is None:
            return
        if node.phase is not Phase.READY or not self.is_open:
            self._effects.on_nodes.append(SendAway(identity, "it asked to leave", "end"))
            return
        self.roster.leave(node)
        self._introduce()
        self._effects.on_nodes += self.roster.replace(node, now_ns)
        node.leaves_at = self.roster.view
        self._settle()

    def _scaled(self, event: Scaled) -> None:
        if not self.is_open:
            return
        started, removed = self.roster.scale(event.stage, event.replicas, event.now_ns, tentative=event.tentative)
        self._effects.on_nodes += started
        leaving = [node for node in removed if node.phase is Phase.READY]
        for node in removed:
            if node in leaving:
                self.roster.leave(node)
            else:
                self._effects.on_nodes.append(KillNode(node.number))
        if leaving:
            self._introduce()
            for node in leaving:
                node.leaves_at = self.roster.view
        self._settle()

    def _links_seen(self, dead: frozenset[LinkKey], now_ns: int) -> None:
        """Handle changed links: send requests around dead links, and repeat the attempts that may be stuck there."""
        died, changes = self.links.update(dead, now_ns)
        self._effects.on_nodes += changes
        if self.state not in (PipelinePhase.READY, PipelinePhase.DRAINING):
            return
        has_new_view = self.links.dead_ends() != self.roster.dead_ends
        if has_new_view:
            self._introduce()
        self.work.links_died(died, now_ns)
        if not has_new_view:  # else Met begins what is to be repeated
            self.work.resume(now_ns)

    # The end

    def _fail(self, error: PipelineError) -> None:
        self._machine.go(PipelineChange.FAIL)
        self.error = error
        self._effects.on_nodes.append(Announce(error))

    def _close(self) -> None:
        if self.state is PipelinePhase.CLOSED:
            return
        error = PipelineClosed("the pipeline was closed")
        if self.state is PipelinePhase.STARTING:
            self._effects.on_nodes.append(Announce(error))
        self._machine.go(PipelineChange.CLOSE)
        self.error = self.error or error
        self.work.refuse_all(error)
        known = [node.identity for node in self.roster if node.identity and not node.released]
        self._effects.on_nodes += [SendAway(identity, "the pipeline was closed", "end") for identity in known]
