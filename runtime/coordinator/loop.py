"""The coordinator: performs the effects of :class:`~runtime.coordinator.state.CoordinatorState`.

One thread of the caller's process speaks with the nodes, watches their processes and minds the time; requests and
results are the business of :mod:`runtime.coordinator.request_io`.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.plan import CALLER, Plan
from runtime.balance.router import Router
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
    Resolve,
    Scaled,
    SendAway,
    ShareMemory,
    Steps,
    Tick,
    TimedOut,
)
from runtime.coordinator.failure_detector import FailureDetector
from runtime.coordinator.reach import Reachability
from runtime.coordinator.request_io import RequestIO
from runtime.coordinator.roster import KillNode, Phase, StartNode
from runtime.coordinator.state import CoordinatorState, PipelinePhase
from runtime.coordinator.status import NodeStats, Snapshot, StatusServer, node_stats
from runtime.errors import LaunchFailed, PipelineClosed, PipelineError, ProtocolError
from runtime.files.server import FileServer
from runtime.home import hold, sweep
from runtime.launcher import Handle, Launcher, Rendezvous
from runtime.logs import DropLog, log_event
from runtime.memory.payloads import Payloads
from runtime.timings import Timings
from runtime.topology import ReplicaKey, sources
from runtime.wire import codec
from runtime.wire.links import AnsweringInlet, Inlet
from runtime.wire.messages.control import (
    Assign,
    Beat,
    Cancel,
    Fate,
    Hello,
    Leaving,
    NodeBeat,
    Peer,
    Policy,
    Ready,
    Refused,
    Share,
    Stop,
    Trust,
    Wire,
    refusal,
)
from runtime.wire.messages.data import Step
from runtime.wire.security import check_address
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_STOP_GRACE_S = 3.0
_LOCK_S = 1.0
_TURN_S = 10.0  # without a turn of its loop, which takes half a second at most, the coordinator is in trouble
_log = logging.getLogger("runtime.coordinator")
_drops = DropLog(_log)


@dataclass(frozen=True)
class Setup:
    """What a coordinator is told once.

    Attributes:
        folder: the plan directory.
        plan: its plan.
        plan_id: its identity.
        replicas: nodes of every stage.
        providers: provider of every stage.
        threads: threads of every node's session; 0 for the plan's number.
        share_weights: whether the replicas of each stage map one copy of its weights.
        trace: record when each request was where.
        profile: have the sessions profiled.
        balance: how to choose among replicas.
        attempts: a request is given up when it killed so many nodes.
        timings: when something counts as failed, and when to try again.
        memory_bytes: of shared memory for the requests' inputs at most; 0 for none.
        elastic: take nodes beyond those that there are to be, for as long as they stay.
        rendezvous: where nodes are met; without a launcher, its home is removed at the end.
        launcher: starts the nodes; None waits for nodes started by hand.
        start_timeout_s: time for all nodes to become ready; None waits for ever.
        progress: told how many of all nodes are ready, whenever one more is.
    """

    folder: Path
    plan: Plan
    plan_id: str
    replicas: tuple[int, ...]
    providers: tuple[str, ...]
    threads: int
    share_weights: tuple[bool, ...]
    trace: bool
    profile: bool
    balance: Policy
    attempts: int
    timings: Timings
    memory_bytes: int
    elastic: bool
    rendezvous: Rendezvous
    launcher: Launcher | None
    start_timeout_s: float | None
    progress: Callable[[int, int], None]


class Coordinator:
    """Starts nodes, wires them and watches them. Start it once with :meth:`start`.

    Attributes:
        requests: takes requests in and brings their answers.
        profiles: of the nodes' sessions, when asked for and the coordinator was closed.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._payloads = Payloads(setup.memory_bytes)
        self._router = Router(setup.balance, self._payloads.board)
        self._sources = {stage.index: sorted(sources(setup.plan, stage.index)) for stage in setup.plan.stages}
        self._machine = CoordinatorState(
            setup.plan,
            setup.replicas,
            choose=self._choose,
            timings=setup.timings,
            attempts=setup.attempts,
            elastic=setup.elastic,
            patient=setup.launcher is None,
        )
        self._rendezvous = setup.rendezvous
        self._files: FileServer | None = None
        self._roster = self._machine.roster
        self._watch = FailureDetector(setup.timings)
        self._reach = Reachability(setup.timings.unreachable_s)
        self.requests = RequestIO(
            setup.plan,
            self._machine,
            self._payloads,
            self._router,
            replay=setup.attempts > 1,
            trace=setup.trace,
            elsewhere=self._leave_to_control,
            deadline=self._expect,
            broken=self._break,
        )
        self.profiles: dict[ReplicaKey, list[dict[str, Any]]] = {}
        self._shortcut = setup.rendezvous.home / "results.fragments" if setup.memory_bytes else None
        self._posted: deque[CoordinatorEvent] = deque()
        self._left: deque[CoordinatorEffect] = deque()  # to the thread that owns the control socket
        self._wakeup = Wakeup()
        self._sleeps_until = 0.0
        self._turned = math.inf  # when the thread last looked after its nodes; it has not begun to
        self._broken: BaseException | None = None
        self._held: int | None = None
        self._ready: Future[str] = Future()
        self._drained: Future[None] = Future()
        self._handles: dict[int, Handle] = {}  # by the number of the node
        self._gone: dict[int, tuple[str, Fate]] = {}  # numbers of dead nodes: their stories, and what they are told
        self._unreached: set[bytes] = set()  # identities of nodes that something could not be sent to
        self._trusted = self._allowed() or frozenset()
        self._progress = self._told_progress = (-1, -1)  # nodes that are ready, of all
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    def _allowed(self) -> frozenset[str] | None:
        """The public keys that are allowed now; None where links are plain."""
        return None if self._rendezvous.trusted is None else self._rendezvous.trusted()

    # Called from any thread

    def start(self) -> Future[str]:
        """Begin; the future gives the control address when every node is ready, or the reason why not."""
        self._thread.start()
        return self._ready

    def close(self) -> None:
        """Stop the nodes, fail what is in flight, and end; returns when everything is gone."""
        if self._thread.is_alive():
            self._post(CloseAsked())
            if not self.requests.delivering and threading.current_thread() is not self._thread:
                self._thread.join()

    def drain(self) -> Future[None]:
        """Take no more requests; the future is done when those in flight are answered."""
        self._post(DrainAsked())
        return self._drained

    def scale(self, stage: int, replicas: int) -> None:
        """Have so many nodes of a stage from now on."""
        self._post(Scaled(stage, replicas, time.monotonic_ns()))

    @property
    def machine(self) -> CoordinatorState:
        """To be read only: the nodes and what they have done."""
        return self._machine

    @property
    def pids(self) -> dict[int, int]:
        """Processes that were started here, by the number of the node."""
        return {number: handle.pid for number, handle in list(self._handles.items())}

    @property
    def unreachable(self) -> str | None:
        """Why no request can get through although every stage has a node: dead links. None when all is well."""
        if not self.requests.lock.acquire(timeout=_LOCK_S):
            return f"the coordinator has not answered for {_LOCK_S:.0f} s"
        try:
            return self._machine.unreachable
        finally:
            self.requests.lock.release()

    def stats(self) -> tuple[NodeStats, ...]:
        """Of every node."""
        with self.requests.lock:
            known = frozenset() if self.requests.ended else self._router.known
            most = self._machine.unanswered_cost  # what is done at a lone node of another host is told twice a second
            queues = {number: min(most, self._router.outstanding(number)) for number in known - {0}}
            return node_stats(self._roster, queues, self._setup.providers)

    @property
    def ended(self) -> bool:
        """True when its thread has ended, or is about to."""
        return self.requests.ended or not self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why nobody looks after the requests; None when somebody does."""
        if self.ended or self._machine.error is not None:
            return str(self.requests.reason)
        if self._broken is not None:
            return f"answers cannot be taken any more: {self._broken}"
        late_s = time.monotonic() - self._turned
        if late_s > _TURN_S:
            return f"the coordinator has not looked after its nodes for {late_s:.0f} s"
        return None

    def _snapshot(self) -> Snapshot:
        machine, incidents = self._machine, self._roster.incidents
        return Snapshot(
            plan=str(self._setup.folder.resolve()),
            pid=os.getpid(),
            state=machine.state.name.lower(),
            taken_ns=time.monotonic_ns(),
            requests=self.requests.count,
            in_flight=machine.unanswered,
            waiting=machine.waiting,
            retries=machine.retries,
            losses=self._roster.losses,
            cause=next(iter([*machine.dead_links.values(), *(incident.story for incident in incidents)]), ""),
            nodes=self.stats(),
        )

    def _choose(self, stage: int, cost: int) -> int | None:
        avoid = self._machine.avoided(stage) if self._machine.dead_links else frozenset()
        return self._router.choose(stage, self._sources[stage], cost, 0, time.monotonic_ns(), avoid=avoid)

    def _post(self, event: CoordinatorEvent) -> None:
        self._posted.append(event)
        self._wakeup.ring()

    def _leave_to_control(self, effect: CoordinatorEffect) -> None:
        self._left.append(effect)
        self._wakeup.ring()

    def _break(self, error: BaseException) -> None:
        """Results cannot be taken any more."""
        self._broken = error
        self._wakeup.ring()

    def _expect(self, deadline_ns: int) -> None:
        if deadline_ns / 1e9 < self._sleeps_until:
            self._wakeup.ring()

    # The thread that minds the nodes

    def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            sweep()
            rendezvous, security = self._rendezvous, self._rendezvous.security
            self._held = hold(rendezvous.home)
            with (
                Sockets(linger_s=0.5, security=security) as sockets,
                Sockets(security=security) as results,
                ExitStack() as stack,
            ):
                control = sockets.answering(rendezvous.control)
                data = results.inlet(rendezvous.data, shortcut=self._shortcut)
                if rendezvous.files:
                    setup = self._setup
                    server = FileServer(rendezvous.files, setup.folder, setup.plan, setup.plan_id, security=security)
                    self._files = stack.enter_context(server)
                results.watch(self.requests.wakeup.fileno())
                taker = threading.Thread(
                    target=self.requests.take_results, args=(results, data), name="results", daemon=True
                )
                taker.start()
                try:
                    with StatusServer(rendezvous.home) as door:
                        self._loop(sockets, results, control, data, door)
                finally:
                    self.requests.stop()
                    taker.join()
                    self._end_nodes()
        except BaseException as error:  # a caller must never wait for a thread that died
            failure = error
            if not isinstance(error, PipelineError):
                _log.exception("the coordinator failed")
        finally:
            self._finish(failure)

    def _loop(
        self, sockets: Sockets, results: Sockets, control: AnsweringInlet, data: Inlet, door: StatusServer
    ) -> None:
        setup = self._setup
        self._address = control.address
        self._machine.data_address = data.address
        sockets.watch(self._wakeup.fileno())
        sockets.watch(door.fileno())
        if not self._roster.nodes:  # every output passes through: there is nothing to wait for
            self._ready.set_result(control.address)
        begun = next_beat = time.monotonic()
        while self._machine.state is not PipelinePhase.CLOSED:
            if self._broken is not None:
                raise self._broken
            now = self._turned = time.monotonic()
            events: list[CoordinatorEvent] = []
            beats = now >= next_beat
            if beats:
                if (late := now - next_beat) > setup.timings.beat_s:  # this process was stopped, or its host is busy
                    self._watch.excuse(int(late * 1e9))
                next_beat = now + setup.timings.beat_s
                events += self._beat(control, now - begun)
            with self.requests.lock:
                if beats:
                    now_ns = time.monotonic_ns()
                    events.append(Tick(now_ns, self._steps() if self._machine.overdue(now_ns) else {}))
                while self._posted:
                    events.append(self._posted.popleft())
                steps, now_ns = self._steps() if self._gone else {}, time.monotonic_ns()
                for number, (reason, fate) in self._gone.items():
                    events.append(Lost(number, reason, steps, now_ns, fate))
                self._gone.clear()
                events += self._expired()
                for event in events:
                    self._handle(event, sockets, results, control, data)
                while self._left:
                    self._perform(self._left.popleft(), sockets, results, control, data)
            self.requests.deliver()
            self._tell_progress()
            ready = sockets.wait(self._patience(next_beat))
            self._wakeup.clear()
            self._posted.extend(self._control_events(control))
            self._exits(sockets, ready)
            if door.fileno() in ready:
                door.answer(self._snapshot())

    def _handle(
        self, event: CoordinatorEvent, sockets: Sockets, results: Sockets, control: AnsweringInlet, data: Inlet
    ) -> None:
        if isinstance(event, Lost):
            self._watch.end(event.number)
        if isinstance(event, Lost) and (record := self._roster.by_number(event.number)) is not None:
            stage, replica = record.slot
            level = logging.INFO if record.released else logging.WARNING
            log_event(_log, level, "node lost", stage=stage, replica=replica, reason=event.reason)
        effects = deque(self._machine.handle(event))
        while effects:
            answer = self._perform(effects.popleft(), sockets, results, control, data)
            if answer is not None:
                effects.extend(self._machine.handle(answer))
        if isinstance(event, Prepared):
            if (record := self._roster.by_identity(event.identity)) is not None:
                self._watch.serves(record.number)
            total = len(self._roster.nodes)
            ready = total - len(self._roster.missing())
            self._progress = ready, total

    def _tell_progress(self) -> None:
        """Tell the caller how many nodes are ready, where that has changed; without the lock, and at its own risk."""
        if self._progress == self._told_progress:
            return
        self._told_progress = self._progress
        try:
            self._setup.progress(*self._progress)
        except Exception:
            _log.exception("the callback for progress raised")

    def _patience(self, next_beat: float) -> float:
        with self.requests.lock:
            deadline = self._machine.next_deadline_ns()
            due = min((r.due_ns for r in self._roster if r.phase in (Phase.BACKOFF, Phase.OPEN)), default=None)
            times = [next_beat, *(at / 1e9 for at in (deadline, due) if at is not None)]
            self._sleeps_until = min(times)
        return 0.0 if self._posted or self._gone else max(0.0, self._sleeps_until - time.monotonic()) + 0.001

    def _late(self, seconds: float) -> str:
        missing = ", ".join(f"stage {stage} (node {stage}.{replica})" for stage, replica in self._roster.missing())
        return f"not ready after {seconds:.0f} s: {missing}"

    def _steps(self) -> Steps:
        """How far all nodes are with all attempts in flight, as their memory, or what they said, tells."""
        numbers = [record.number for record in self._roster if record.number >= 0]
        steps: dict[tuple[int, int], dict[int, Step]] = {}
        for key in self._machine.in_flight:
            steps[key] = {n: step for n in numbers if (step := self._payloads.step(n, *key)) is not Step.UNKNOWN}
        for number, key in self.requests.started.items():
            if key in steps:
                steps[key].setdefault(number, Step.RUNNING)
        return steps

    def _expired(self) -> list[CoordinatorEvent]:
        """Requests whose time ran out, with what the nodes' memory tells of how far they came."""
        late = self._machine.expired(time.monotonic_ns())
        steps = self._steps() if late else {}
        return [Expired(request, steps.get((request, attempt), {})) for request, attempt in late]

    def _control_events(self, control: AnsweringInlet) -> list[CoordinatorEvent]:
        events: list[CoordinatorEvent] = []
        while (message := control.receive()) is not None:
            identity, header, key = message
            now = time.monotonic_ns()
            try:
                said = codec.decode_node_control(header)
            except ProtocolError as error:
                _drops.note(error)
                continue
            match said:
                case Hello() if self._rendezvous.trusted is not None and said.key != key:
                    _drops.note("a node that says it has another key than it has")
                case Hello():
                    try:
                        check_address(said.address, self._rendezvous.security)
                    except PipelineError as error:
                        _drops.note(error)
                        continue
                    events.append(Joined(identity, said, now))
                case Ready(mapped):
                    events.append(Prepared(identity, mapped, now))
                case Refused(reason):
                    events.append(Declined(identity, reason, now))
                case Leaving():
                    events.append(LeaveWanted(identity, now))
                case NodeBeat():
                    events += self._heard(identity, said, control, now)
        return events

    def _heard(self, identity: bytes, beat: NodeBeat, control: AnsweringInlet, now_ns: int) -> list[CoordinatorEvent]:
        record = self._roster.by_identity(identity)
        if record is None:  # it was cut off, taken for dead, and is back
            told = "the pipeline took it for dead, or was started anew"
            control.send(identity, codec.encode(Stop(told, "rejoin")))
            return []
        self._reach.seen(record.number, beat.unreachable, now_ns)
        verdict = self._watch.heard(record.number, beat, now_ns)
        if verdict is not None:
            self._give_up({record.number: verdict})
        if identity not in self._unreached:
            return []
        self._unreached.remove(identity)
        control.send(identity, codec.encode(Trust(tuple(self._trusted))))
        return [Reconnected(identity)]

    def _tell(self, control: AnsweringInlet, identity: bytes, header: bytes) -> bool:
        """Say something to a node; what does not reach it because its link is broken is said again when it is heard."""
        reached = control.send(identity, header)
        if not reached:
            self._unreached.add(identity)
        return reached

    def _give_up(self, verdicts: Mapping[int, str], fate: Fate = "rejoin") -> None:
        """Take nodes for dead, and see that they are."""
        for number, reason in verdicts.items():
            self._watch.end(number)
            self._gone.setdefault(number, (reason, fate))
            if number in self._handles:
                self._handles[number].kill()

    def _exits(self, sockets: Sockets, ready: set[object]) -> None:
        for number, handle in list(self._handles.items()):
            if handle.fileno() in ready:
                sockets.unwatch(handle.fileno())
                del self._handles[number]
                self._watch.end(number)
                self._gone.setdefault(number, (handle.story(), "rejoin"))
                handle.end(0.0)

    def _beat(self, control: AnsweringInlet, running_s: float) -> list[CoordinatorEvent]:
        """Let nodes hear that the coordinator lives; look for those that do not."""
        setup, now = self._setup, time.monotonic_ns()
        header = codec.encode(Beat(self.requests.oldest))
        self._unreached &= {record.identity for record in self._roster}
        for record in self._roster:
            if record.identity and not self._tell(control, record.identity, header):
                self._watch.closed(record.number, now)
                if record.released and record.number not in self._handles:  # it was to end, and it has
                    self._give_up({record.number: "has left"}, "end")
        if (trusted := self._allowed()) is not None and trusted != self._trusted:
            self._trusted = trusted
            for record in self._roster:
                if record.identity:
                    self._tell(control, record.identity, codec.encode(Trust(tuple(trusted))))
                if record.hello is not None and record.hello.key not in trusted:
                    self._give_up({record.number: f"had its key revoked ({record.hello.key})"}, "refused")
        events: list[CoordinatorEvent] = [*self._look_at_links(now)]
        patience = setup.start_timeout_s
        if patience is not None and self._files is not None and self._files.idle_s < patience:
            patience = None  # nobody is late while stage files are on their way
        self._give_up(self._watch.silent(now))
        if patience is not None and self._machine.state is PipelinePhase.STARTING and running_s > patience:
            events.append(TimedOut(self._late(patience)))
        elif patience is not None and self._machine.state is not PipelinePhase.STARTING and setup.launcher is not None:
            self._give_up(dict(self._roster.late(now, patience)))
        return events

    def _look_at_links(self, now_ns: int) -> list[CoordinatorEvent]:
        """Who cannot reach whom, where that changed."""
        entrances = {number for stage in self._machine.entrances for number in self._roster.numbers(stage)}
        own = frozenset(
            number for number in entrances & self.requests.links.keys() if not self.requests.links[number].connected
        )
        self._router.unreachable = own
        self._reach.seen(0, own, now_ns)
        dead = self._reach.dead(self._roster.linked, {0, *self._watch.heard_lately(now_ns)}, now_ns)
        return [LinksSeen(dead, now_ns)] if dead != self._machine.dead_links.keys() else []

    def _perform(
        self, effect: CoordinatorEffect, sockets: Sockets, results: Sockets, control: AnsweringInlet, data: Inlet
    ) -> CoordinatorEvent | None:
        setup = self._setup
        match effect:
            case Enter() | Again() | Resolve() | Reject():
                self.requests.answer(effect)
            case Forget(request, attempt, identities):
                for identity in identities:
                    control.send(identity, codec.encode(Cancel(request, attempt)))
            case StartNode((stage, replica), number):
                log_event(_log, logging.INFO, "node starts", stage=stage, replica=replica, number=number)
                if setup.launcher is not None:
                    address = control.address
                    try:
                        handle = setup.launcher.start(connect=address, stage=stage, replica=replica, number=number)
                    except OSError as error:  # no room for a process, a file, a descriptor: it is tried again later
                        self._gone[number] = f"could not be started: {error}", "rejoin"
                        return None
                    self._handles[number] = handle
                    sockets.watch(handle.fileno())
            case KillNode(number):
                if number in self._handles:
                    self._handles[number].kill()
            case GiveStage(identity, (stage, replica)):
                assign = Assign(
                    plan_id=setup.plan_id,
                    folder=str(setup.folder.resolve()),
                    files=self._files.address if self._files is not None else "",
                    stage=stage,
                    replica=replica,
                    provider=setup.providers[stage],
                    threads=setup.threads,
                    share_weights=setup.share_weights[stage],
                    profile=setup.profile,
                    beat_ns=int(setup.timings.beat_s * 1e9),
                    silence_ns=int(setup.timings.silence_s * 1e9),
                    balance=setup.balance,
                )
                control.send(identity, codec.encode(Trust(tuple(self._trusted))))
                control.send(identity, codec.encode(assign))
                if (record := self._roster.by_identity(identity)) is not None:
                    predicted = setup.plan.stages[stage].predicted_time_ns or 0
                    self._watch.begin(record.number, predicted, time.monotonic_ns())
            case Introduce(identities, meet):
                return self._introduce(identities, meet, results, control, data)
            case ShareMemory(None, readers):
                self._payloads.share(readers)
            case ShareMemory(identity, readers):
                self._tell(control, identity, codec.encode(Share(readers)))
            case SendAway(identity, reason, fate, again):
                log_event(_log, logging.DEBUG if again else logging.INFO, "node sent away", reason=reason)
                control.send(identity, refusal(reason) if fate == "refused" else codec.encode(Stop(reason, fate)))
            case LinkChanged(story, is_dead):
                _log.log(logging.WARNING if is_dead else logging.INFO, "%s", story)
            case Announce(None):
                log_event(_log, logging.INFO, "pipeline ready", nodes=len(self._roster.nodes))
                self._ready.set_result(self._address)
            case Announce(error):
                self._ready.set_exception(error)
            case Drained():
                if not self._drained.done():
                    self._drained.set_result(None)
        return None

    def _introduce(
        self,
        identities: tuple[bytes, ...],
        meet: bool,
        results: Sockets,
        control: AnsweringInlet,
        data: Inlet,
    ) -> CoordinatorEvent | None:
        """Tell nodes who all processes are, and learn it here."""
        starting = self._machine.state is PipelinePhase.STARTING
        pair = self._rendezvous.security.pair
        key = pair.public if pair is not None else ""
        caller = Peer(0, CALLER, 0, False, data.address, str(self._shortcut or ""), self._payloads.memory, key)
        for identity in identities:
            record = self._roster.by_identity(identity)
            assert record is not None
            record.introduced = True
            peers = self._roster.peers(record, everyone=starting)
            self._tell(control, identity, codec.encode(Wire(self._roster.view, record.number, (caller, *peers))))
        if not meet:
            return None
        peers = self._roster.peers(None, everyone=starting)
        nodes = {peer.number: peer for peer in peers}
        mapped = self._payloads.meet(0, nodes)
        self._router.learn(0, (caller, *peers), self._payloads.boards())
        for number in self.requests.links.keys() - nodes.keys():
            self.requests.links.pop(number).close()
            self.requests.started.pop(number, None)
            self._watch.end(number)
        for number in nodes.keys() - self.requests.links.keys():
            peer = nodes[number]
            shortcut = peer.shortcut if number in mapped else ""
            try:
                self.requests.links[number] = results.connect(peer.address, shortcut=shortcut, key=peer.key)
            except PipelineError as error:
                self._give_up({number: f"cannot be reached: {error}"})
        return Met(mapped, time.monotonic_ns())

    def _end_nodes(self) -> None:
        deadline = time.monotonic() + _STOP_GRACE_S
        for handle in self._handles.values():
            handle.end(max(0.0, deadline - time.monotonic()))

    def _finish(self, failure: BaseException | None) -> None:
        """Leave nobody waiting, whatever happened, and whatever fails on the way."""
        reason = (
            failure if isinstance(failure, PipelineError) else PipelineClosed(f"the coordinator failed: {failure!r}")
        )
        steps: tuple[Callable[[], None], ...] = (
            lambda: self.requests.fail(reason),
            lambda: self._remove(failure),
            self._let_go,
            self._wakeup.close,
        )
        for step in steps:
            try:
                step()
            except Exception:
                _log.exception("the coordinator could not end in order")
        for future in (self._ready, self._drained):
            if not future.done():
                future.set_exception(reason)

    def _let_go(self) -> None:
        """Hold the pipeline's folder no more; not before what is to stay in it is all that is left."""
        if self._held is not None:
            os.close(self._held)

    def _remove(self, failure: BaseException | None) -> None:
        """End the launcher, and remove what is in the pipeline's folder; the logs stay where they are needed."""
        broken = failure is not None or isinstance(self._machine.error, LaunchFailed)
        broken = broken or any(record.phase is Phase.OPEN for record in self._roster)
        if self._setup.launcher is None:
            shutil.rmtree(self._rendezvous.home, ignore_errors=True)
            return
        if self._setup.profile:
            self.profiles = {slot: self._setup.launcher.profile(*slot) for slot in self._roster.nodes}
        self._setup.launcher.close(keep_logs=broken)
