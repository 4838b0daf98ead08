"""The coordinator of a pipeline: its thread, and its methods for other threads.

Three kinds of threads share the state machine, which one lock protects:

- callers' threads submit requests (:mod:`runtime.coordinator.request_io`);
- one thread receives results (:mod:`runtime.coordinator.results`);
- the coordinator's own thread communicates with the nodes, and monitors nodes and deadlines.

The thread that holds the lock performs effects on requests at once. It puts effects on nodes into the
:class:`~runtime.coordinator.inbox.Inbox` of the coordinator's thread.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from runtime.background import BACKGROUND_S
from runtime.balance.router import Router
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.ending import end_in_order, remove_files
from runtime.coordinator.events import CloseAsked, CoordinatorEvent, DrainAsked, Expired, Lost, Prepared, Scaled, Tick
from runtime.coordinator.failure_detector import FailureDetector
from runtime.coordinator.handover import Handover
from runtime.coordinator.inbox import Inbox
from runtime.coordinator.interpreter import carry_out
from runtime.coordinator.node_controller import NodeController
from runtime.coordinator.node_monitor import NodeMonitor
from runtime.coordinator.node_record import Incident, Phase
from runtime.coordinator.pipeline_phase import PipelinePhase
from runtime.coordinator.progress import Progress
from runtime.coordinator.request_io import RequestIO
from runtime.coordinator.results import ResultTaker
from runtime.coordinator.scaling import LoadScaling
from runtime.coordinator.setup import Channels, Setup, open_channels
from runtime.coordinator.state import CoordinatorState
from runtime.coordinator.status import (
    NodeInfo,
    NodeStats,
    SequenceStats,
    Snapshot,
    StageReplicas,
    node_infos,
    node_stats,
    sequence_stats,
    snapshot,
    stage_replicas,
)
from runtime.coordinator.succession import Places
from runtime.errors import LaunchFailed, PipelineClosed, PipelineError
from runtime.home import hold, sweep
from runtime.logs import log_event
from runtime.memory.payloads import Payloads
from runtime.topology import ReplicaKey

_LOCK_S = 1.0
_TURN_S = 10.0  # a turn of the coordinator's loop takes half a second at most; after this time something is wrong
_log = logging.getLogger("runtime.coordinator")


class Coordinator:
    """Starts nodes, connects them and watches them. Start it once with :meth:`start`.

    Args:
        setup: how to run the plan.

    Attributes:
        requests: accepts requests and delivers their answers.
        profiles: the profiles of the nodes' sessions, by slot; filled when the coordinator closes, if requested.
        limits: the limits of sequences; None where the plan has no decoder.
        ranges: the allowed numbers of nodes of every stage.
        handover: where it listens, its role beside another one, and which successors of its nodes were lost.
    """

    def __init__(self, setup: Setup) -> None:
        self.profiles: dict[ReplicaKey, list[dict[str, Any]]] = {}
        self.limits = setup.sequences
        self.ranges = setup.ranges
        self._setup = setup
        self._inbox = Inbox()
        self.handover = Handover(self._inbox)
        self._payloads = Payloads(setup.memory_bytes)
        self._router = Router(setup.balance, self._payloads.board)
        self._machine = CoordinatorState(
            setup.plan,
            setup.replicas,
            choose=lambda stage, cost: self._links.choose(stage, cost),
            timings=setup.timings,
            attempts=setup.attempts,
            elastic=setup.elastic,
            patient=setup.is_patient,
            limits=setup.sequences,
        )
        self._links = DataLinks(setup.plan, self._machine, self._payloads, self._router)
        replay, trace = setup.attempts > 1, setup.trace
        self.requests = RequestIO(
            setup.plan, self._machine, self._payloads, self._links, self._inbox, replay=replay, trace=trace
        )
        self._detector = FailureDetector(setup.timings)
        self._control: NodeController | None = None
        self._scaling: LoadScaling | None = None
        self._results: ResultTaker | None = None
        self._turned_s = math.inf  # when the thread last monitored its nodes; infinite before the first time
        self._held: int | None = None
        self._begin_lock = threading.Lock()
        self._ready: Future[str] = Future()
        self._drained: Future[None] = Future()
        self._progress = Progress(setup.progress)
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    # Called from any thread

    def start(self) -> Future[str]:
        """Start the thread. The future gives the address to which nodes connect, once all are ready, or an error."""
        with self._begin_lock:
            if not self._ready.done():  # else it was closed before
                self._thread.start()
        return self._ready

    def close(self) -> None:
        """Stop the nodes, fail the requests in flight, and end the thread. Returns when all processes have ended."""
        with self._begin_lock:
            if self._thread.ident is None and not self._ready.done():  # it was never started
                self._finish(None)
        if self._thread.is_alive():
            self._inbox.post(CloseAsked())
            if not self.requests.delivering and threading.current_thread() is not self._thread:
                self._thread.join()

    def drain(self) -> Future[None]:
        """Take no more requests; the future is done when those in flight are answered."""
        self._inbox.post(DrainAsked())
        return self._drained

    def close_when_drained(self) -> None:
        """Drain, then close. Returns at once, and takes no lock that the calling thread may hold."""
        self.drain().add_done_callback(lambda _: None if self.ended else self._inbox.post(CloseAsked()))

    def succeed(self, address: str, places: Places, *, background_s: float = BACKGROUND_S) -> Future[None]:
        """Let nodes that were started by hand start their successors, and serve on meanwhile.

        Args:
            address: where the coordinator of the next plan listens.
            places: see :data:`~runtime.coordinator.succession.Places`. Other slots get no successor.
            background_s: how long successors load at idle priority at most; 0 for not at all.

        Returns:
            It is done when all have started. It fails with LaunchFailed, which names the node and the reason. Others
            may have started a successor then, which ends when the coordinator at the address closes.
        """
        return self.handover.succeed(address, places, background_s)

    def take_over(self, address: str) -> Future[None]:
        """Listen at this address too, as soon as it is free; the future fails with PipelineError if it is unusable."""
        return self.handover.take_over(address)

    def scale(self, stage: int, replicas: int) -> None:
        """Set the number of a stage's nodes."""
        if not self._machine.is_open:
            raise self._machine.error or PipelineClosed("the pipeline was closed")
        self._inbox.post(Scaled(stage, replicas, time.monotonic_ns()))

    @property
    def planned(self) -> tuple[int, ...]:
        """The number of nodes that every stage is to have."""
        return tuple(self._machine.roster.planned)

    def why_unguided(self, stage: int) -> str:
        """Why no sequence can follow a grammar at one of a stage's nodes, in one sentence; empty if none has said."""
        with self.requests.lock:
            nodes = [node for node in self._machine.roster if node.slot[0] == stage and node.why_unguided]
        return f"{nodes[0].called}: {nodes[0].why_unguided}" if nodes else ""

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Receive results in an event loop; see :meth:`~runtime.coordinator.results.ResultTaker.hand_over`."""
        assert self._results is not None, "the pipeline is ready"
        return self._results.hand_over()

    def nodes(self) -> tuple[NodeInfo, ...]:
        """The present nodes."""
        handles = dict(self._control.handles) if self._control is not None else {}
        pids = {number: handle.pid for number, handle in handles.items()}
        with self.requests.lock:
            return node_infos(self._machine.roster, pids)

    def stats(self) -> tuple[NodeStats, ...]:
        """Statistics of every node so far."""
        with self.requests.lock:
            return self._stats()

    def sequences(self) -> SequenceStats | None:
        """Statistics of the sequences so far; None where the plan has no decoder."""
        with self.requests.lock:
            return sequence_stats(self._machine.sequences)

    def replicas(self) -> tuple[StageReplicas, ...]:
        """The number of nodes of every stage."""
        with self.requests.lock:
            return stage_replicas(self._machine.roster, self.ranges)

    def _stats(self) -> tuple[NodeStats, ...]:
        queues = {} if self.requests.ended else self._links.queues()
        return node_stats(self._machine.roster, queues, self._setup.providers)

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The lost nodes and dead links, oldest first."""
        with self.requests.lock:
            return tuple(self._machine.roster.incidents)

    @property
    def retries(self) -> int:
        """The number of attempts that were repeated."""
        with self.requests.lock:
            return self._machine.requests.retries

    @property
    def in_flight(self) -> int:
        """The number of requests and sequences that are not answered yet."""
        with self.requests.lock:
            return len(self._machine.requests) + len(self._machine.sequences or ())

    @property
    def unreachable(self) -> str | None:
        """The dead links because of which no request can pass although every stage has a node; None when one can."""
        if not self.requests.lock.acquire(timeout=_LOCK_S):
            return f"the coordinator has not answered for {_LOCK_S:.0f} s"
        try:
            return self._machine.links.unreachable
        finally:
            self.requests.lock.release()

    @property
    def ended(self) -> bool:
        """True when its thread has ended, or is about to."""
        return self.requests.ended or not self._thread.is_alive()

    @property
    def trouble(self) -> str | None:
        """Why requests are not processed; None when they are."""
        if self.ended or self._machine.error is not None:
            return str(self.requests.reason)
        if self._inbox.failure is not None:
            return f"answers can no longer be received: {self._inbox.failure}"
        late_s = time.monotonic() - self._turned_s
        if late_s > _TURN_S:
            return f"the coordinator has not monitored its nodes for {late_s:.0f} s"
        return None

    # The coordinator's thread

    def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            sweep()
            self._held = hold(self._setup.rendezvous.home)
            with open_channels(self._setup) as channels:
                self._run(channels)
        except BaseException as error:  # a caller must never wait for a thread that has ended
            failure = error
            if not isinstance(error, PipelineError):
                _log.exception("the coordinator failed")
        finally:
            self._finish(failure)

    def _run(self, channels: Channels) -> None:
        """Serve until the pipeline is closed, then end the nodes."""
        machine, links, detector = self._machine, self._links, self._detector
        control = NodeController(
            self._setup, machine, links, detector, channels, ready=self._ready, all_drained=self._drained
        )
        monitor = NodeMonitor(self._setup, machine, links, detector, control, channels)
        taker = ResultTaker(
            self.requests, links, machine, self._payloads, self._router, self._inbox, channels.results, channels.data
        )
        self._control, self._results = control, taker
        self.handover.open(control.succession, control.take_over, channels.control.address)
        if self._setup.scales:
            self._scaling = LoadScaling(self._setup, machine, links, self.requests.lock, control.handles)
        machine.links.data_address = channels.data.address
        channels.sockets.watch(self._inbox.wakeup.fileno())
        channels.sockets.watch(channels.status.fileno())
        taker.start()
        try:
            if not machine.roster.nodes:  # no stage computes an output, so there is nothing to wait for
                self._ready.set_result(channels.control.address)
            self._loop(channels, control, monitor)
        finally:
            channels.status.close()
            self.requests.stop()
            taker.end()
            control.end_processes()

    def _loop(self, channels: Channels, control: NodeController, monitor: NodeMonitor) -> None:
        begun = next_beat = time.monotonic()
        beat_s = self._setup.timings.beat_s
        while self._machine.state is not PipelinePhase.CLOSED:
            if self._inbox.failure is not None:
                raise self._inbox.failure
            now = self._turned_s = time.monotonic()
            events: list[CoordinatorEvent] = []
            beats = now >= next_beat
            if beats:
                if (late := now - next_beat) > beat_s:  # this process was stopped, or its host is busy
                    self._detector.excuse(int(late * 1e9))
                next_beat = now + beat_s
                events += monitor.beat(self.requests.beat, now - begun)
                if self._scaling is not None:
                    events += self._scaling.look(time.monotonic_ns())
                if self._payloads.lanes.waiting:  # an event loop does not look by itself, if a doorbell was lost
                    self.requests.wakeup.ring()
            with self.requests.lock:
                self._turn(events, control, beats=beats)
            self._inbox.make_calls()
            self.requests.answers.deliver()
            self._progress.tell()
            ready = channels.sockets.wait(self._patience_s(next_beat, control))
            self._inbox.wakeup.clear()
            self._inbox.events.extend(monitor.hear())
            control.look_for_exits(ready)
            if channels.status.fileno() in ready:
                channels.status.answer(self._snapshot())

    def _turn(self, events: list[CoordinatorEvent], control: NodeController, *, beats: bool) -> None:
        """Handle these events and all queued ones, while the lock is held."""
        machine, inbox, links = self._machine, self._inbox, self._links
        now_ns = time.monotonic_ns()
        if beats:
            events.append(Tick(now_ns, links.steps() if machine.work.is_overdue(now_ns) else {}))
        while inbox.events:
            events.append(inbox.events.popleft())
        expired = machine.work.expired(now_ns)
        steps = links.steps() if control.lost or expired else {}
        events += [Lost(number, reason, steps, now_ns, fate) for number, (reason, fate) in control.lost.items()]
        control.lost.clear()
        events += [Expired(number, steps.get(key, {})) for number, key in expired]
        for event in events:
            self._handle(event, control)
        while inbox.effects:
            control.perform(inbox.effects.popleft())

    def _handle(self, event: CoordinatorEvent, control: NodeController) -> None:
        roster = self._machine.roster
        if self._scaling is not None:
            self._scaling.note(event)
        if isinstance(event, Lost):
            self._detector.end(event.number)
            if (node := roster.by_number(event.number)) is not None and not node.is_tentative:
                stage, replica = node.slot
                level, what = (logging.INFO, "node has left") if node.released else (logging.WARNING, "node lost")
                log_event(_log, level, what, stage=stage, replica=replica, reason=event.reason)
        carry_out(self._machine, event, self.requests, control)
        if isinstance(event, Prepared):
            if (node := roster.by_identity(event.identity)) is not None:
                self._detector.serves(node.number)
            self._progress.note(len(roster.nodes) - len(roster.missing()), len(roster.nodes))

    def _patience_s(self, next_beat_s: float, control: NodeController) -> float:
        """How long the thread may wait for messages."""
        with self.requests.lock:
            deadline_ns = self._machine.work.next_deadline_ns
            due_ns = min((node.due_ns for node in self._machine.roster if node.is_absent), default=None)
            times_s = [next_beat_s, *(at / 1e9 for at in (deadline_ns, due_ns) if at is not None)]
            self._inbox.sleeps_until_s = min(times_s)
        if self._inbox.events or control.lost:
            return 0.0
        return max(0.0, self._inbox.sleeps_until_s - time.monotonic()) + 0.001

    def _snapshot(self) -> Snapshot:
        with self.requests.lock:
            folder, count, role = self._setup.folder, self.requests.count, self.handover.role
            return snapshot(folder, self._machine, count, self._stats(), self.ranges, time.monotonic_ns(), role)

    def _finish(self, failure: BaseException | None) -> None:
        """Answer all requests and resolve all futures, even if a step fails."""
        what = "the pipeline was closed" if failure is None else f"the coordinator failed: {failure!r}"
        reason = failure if isinstance(failure, PipelineError) else PipelineClosed(what)
        end_in_order(
            lambda: self.requests.fail(reason),
            lambda: self._remove(failure),
            lambda: os.close(self._held) if self._held is not None else None,  # after everything else was removed
            self._inbox.wakeup.close,
            lambda: self.handover.end(reason),
        )
        for future in (self._ready, self._drained):
            if not future.done():
                future.set_exception(reason)

    def _remove(self, failure: BaseException | None) -> None:
        """Close the launcher, and remove the pipeline's files; logs stay where they are needed."""
        broken = failure is not None or isinstance(self._machine.error, LaunchFailed)
        broken = broken or any(node.phase is Phase.OPEN for node in self._machine.roster)
        self.profiles = remove_files(self._setup, self._machine.roster.nodes, keep_logs=broken)
