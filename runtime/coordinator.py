"""The coordinator's loop: performs the effects of :class:`~runtime.coordinator_state.CoordinatorState`.

A thread of the caller's process speaks with the nodes, watches their processes and minds the time; requests and results
are the business of :mod:`runtime.flow`.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.plan import Plan
from runtime import codec
from runtime.arena import Step
from runtime.coordinator_state import (
    Announce,
    CloseAsked,
    CoordinatorState,
    Declined,
    Effect,
    Event,
    Expired,
    Forget,
    GiveStage,
    Joined,
    Lost,
    Met,
    NodeState,
    Prepared,
    Reject,
    Resolve,
    SendAway,
    ShareMemory,
    Slot,
    State,
    TimedOut,
    WireAll,
)
from runtime.errors import PipelineClosed, PipelineError, ProtocolError
from runtime.flow import Flow
from runtime.launch import Handle, Launcher
from runtime.messages import (
    CALLER,
    NOT_NEEDED,
    Assign,
    Beat,
    Cancel,
    Hello,
    NodeBeat,
    Peer,
    Ready,
    Refused,
    Share,
    Stop,
    Wire,
)
from runtime.payloads import Payloads
from runtime.transport import AnsweringInlet, Inlet, Sockets, Wakeup

BEAT_S = 1.0
SILENCE_S = 10.0
"""A node that says nothing for this long is taken for dead."""

_STOP_GRACE_S = 3.0
_log = logging.getLogger("runtime.coordinator")


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
        memory_bytes: of shared memory for the requests' inputs at most; 0 for none.
        control: where nodes report.
        data: where results come in.
        home: a folder that only the user can open, for sockets of this host; the launcher's, or removed at the end.
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
    memory_bytes: int
    control: str
    data: str
    home: Path
    launcher: Launcher | None
    start_timeout_s: float | None
    progress: Callable[[int, int], None]


class Coordinator:
    """Starts nodes, wires them and watches them. Start it once with :meth:`start`.

    Attributes:
        flow: requests go in there.
        profiles: of the nodes' sessions, when asked for and the coordinator was closed.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._machine = CoordinatorState(setup.plan, setup.replicas)
        self._payloads = Payloads(setup.memory_bytes)
        self.flow = Flow(
            setup.plan,
            self._machine,
            self._payloads,
            trace=setup.trace,
            elsewhere=self._leave_to_control,
            deadline=self._expect,
        )
        self.profiles: dict[Slot, list[dict[str, Any]]] = {}
        self._shortcut = setup.home / "results.fragments" if setup.memory_bytes else None
        self._posted: deque[Event] = deque()
        self._left: deque[Effect] = deque()  # to the thread that owns the control socket
        self._wakeup = Wakeup()
        self._sleeps_until = 0.0
        self._ready: Future[str] = Future()
        self._handles: dict[Slot, Handle] = {}
        self._heard: dict[bytes, float] = {}
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    # Called from any thread

    def start(self) -> Future[str]:
        """Begin; the future gives the control address when every node is ready, or the reason why not."""
        self._thread.start()
        return self._ready

    def close(self) -> None:
        """Stop the nodes, fail what is in flight, and end; returns when everything is gone."""
        if self._thread.is_alive():
            self._post(CloseAsked())
            self._thread.join()

    @property
    def machine(self) -> CoordinatorState:
        """To be read only: the nodes and what they have done."""
        return self._machine

    @property
    def pids(self) -> dict[Slot, int]:
        """Processes that were started here."""
        return {slot: handle.pid for slot, handle in self._handles.items()}

    def _post(self, event: Event) -> None:
        self._posted.append(event)
        self._wakeup.ring()

    def _leave_to_control(self, effect: Effect) -> None:
        self._left.append(effect)
        self._wakeup.ring()

    def _expect(self, deadline_ns: int) -> None:
        if deadline_ns / 1e9 < self._sleeps_until:
            self._wakeup.ring()

    # The thread that minds the nodes

    def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            with Sockets(linger_s=0.5) as sockets, Sockets() as results:
                control = sockets.answering(self._setup.control)
                data = results.inlet(self._setup.data, shortcut=self._shortcut)
                results.watch(self.flow.wakeup.fileno())
                taker = threading.Thread(
                    target=self.flow.take_results, args=(results, data), name="results", daemon=True
                )
                taker.start()
                try:
                    self._loop(sockets, results, control, data)
                finally:
                    self.flow.stop()
                    taker.join()
                    self._end_nodes()
        except BaseException as error:  # a caller must never wait for a thread that died
            failure = error
            if not isinstance(error, PipelineError):
                _log.exception("the coordinator failed")
        finally:
            self._finish(failure)

    def _loop(self, sockets: Sockets, results: Sockets, control: AnsweringInlet, data: Inlet) -> None:
        setup = self._setup
        self._address = control.address
        sockets.watch(self._wakeup.fileno())
        if setup.launcher is not None:
            for slot in self._machine.nodes:
                handle = setup.launcher.start(connect=control.address, stage=slot[0], replica=slot[1])
                self._handles[slot] = handle
                sockets.watch(handle.fileno())
        if not self._machine.nodes:  # every output passes through: there is nothing to wait for
            self._ready.set_result(control.address)
        begun = next_beat = time.monotonic()
        while self._machine.state is not State.CLOSED:
            ready = sockets.wait(self._patience(next_beat))
            self._wakeup.clear()
            events: list[Event] = [*self._control_events(control), *self._exits(sockets, ready)]
            while self._posted:
                events.append(self._posted.popleft())
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_S
                events += self._beat(control, now)
                if setup.start_timeout_s is not None and now - begun > setup.start_timeout_s:
                    events.append(TimedOut(self._late(setup.start_timeout_s)))
            with self.flow.lock:
                events += self._expired()
                for event in events:
                    self._handle(event, results, control, data)
                while self._left:
                    self._perform(self._left.popleft(), results, control, data)
            self.flow.deliver()

    def _handle(self, event: Event, results: Sockets, control: AnsweringInlet, data: Inlet) -> None:
        effects = deque(self._machine.handle(event))
        while effects:
            answer = self._perform(effects.popleft(), results, control, data)
            if answer is not None:
                effects.extend(self._machine.handle(answer))
        if isinstance(event, Prepared):
            total = len(self._machine.nodes)
            self._setup.progress(total - len(self._machine.missing_nodes()), total)

    def _patience(self, next_beat: float) -> float:
        with self.flow.lock:
            deadline = self._machine.next_deadline_ns()
            self._sleeps_until = next_beat if deadline is None else min(next_beat, deadline / 1e9)
        return 0.0 if self._posted else max(0.0, self._sleeps_until - time.monotonic()) + 0.001

    def _late(self, seconds: float) -> str:
        missing = ", ".join(
            f"stage {stage} (node {stage}.{replica})" for stage, replica in self._machine.missing_nodes()
        )
        return f"not ready after {seconds:.0f} s: {missing}"

    def _expired(self) -> list[Event]:
        """Requests whose time ran out, with what the nodes' memory tells of how far they came."""
        found: list[Event] = []
        for number, route in self._machine.expired(time.monotonic_ns()).items():
            nodes = {stage: self._machine.number((stage, r)) for stage, r in enumerate(route) if r != NOT_NEEDED}
            finished = (stage for stage, node in nodes.items() if self._payloads.step(node, number) is Step.DONE)
            found.append(Expired(number, frozenset(finished)))
        return found

    def _control_events(self, control: AnsweringInlet) -> list[Event]:
        events: list[Event] = []
        while (message := control.receive()) is not None:
            identity, header = message
            try:
                said = codec.decode_node_control(header)
            except ProtocolError as error:
                _log.warning("dropped: %s", error)
                continue
            self._heard[identity] = time.monotonic()
            match said:
                case Hello():
                    events.append(Joined(identity, said))
                case Ready(mapped):
                    events.append(Prepared(identity, mapped))
                case Refused(reason):
                    events.append(Declined(identity, reason))
                case NodeBeat():
                    pass
        return events

    def _exits(self, sockets: Sockets, ready: set[object]) -> list[Event]:
        events: list[Event] = []
        for slot, handle in self._handles.items():
            if handle.fileno() in ready and self._machine.nodes[slot].state is not NodeState.LOST:
                sockets.unwatch(handle.fileno())
                events.append(Lost(slot, handle.story()))
        return events

    def _beat(self, control: AnsweringInlet, now: float) -> list[Event]:
        """Let nodes hear that the coordinator lives; those that nobody here started are known by their beats alone."""
        for identity in self._heard:
            control.send(identity, codec.encode(Beat()))
        if self._setup.launcher is not None:
            return []
        return [
            Lost(slot, f"has been silent for {SILENCE_S:.0f} s")
            for slot, node in self._machine.nodes.items()
            if node.identity in self._heard and now - self._heard[node.identity] > SILENCE_S
        ]

    def _perform(self, effect: Effect, results: Sockets, control: AnsweringInlet, data: Inlet) -> Event | None:
        setup = self._setup
        match effect:
            case Resolve() | Reject():
                self.flow.answer(effect)
            case Forget(request, identities):
                for identity in identities:
                    control.send(identity, codec.encode(Cancel(request)))
            case GiveStage(identity, (stage, replica)):
                assign = Assign(
                    plan_id=setup.plan_id,
                    folder=str(setup.folder.resolve()),
                    stage=stage,
                    replica=replica,
                    provider=setup.providers[stage],
                    threads=setup.threads,
                    share_weights=setup.share_weights[stage],
                    profile=setup.profile,
                )
                control.send(identity, codec.encode(assign))
            case WireAll():
                return self._wire(results, control, data)
            case ShareMemory(None, readers):
                self._payloads.share(readers)
            case ShareMemory(identity, readers):
                control.send(identity, codec.encode(Share(readers)))
            case SendAway(identity, reason):
                control.send(identity, codec.encode(Stop(reason)))
            case Announce(None):
                self._ready.set_result(self._address)
            case Announce(error):
                self._ready.set_exception(error)
        return None

    def _wire(self, results: Sockets, control: AnsweringInlet, data: Inlet) -> Event:
        peers = [Peer(CALLER, 0, data.address, str(self._shortcut or ""), self._payloads.memory)]
        for (stage, replica), node in self._machine.nodes.items():
            assert node.hello is not None
            hello = node.hello
            peers.append(Peer(stage, replica, hello.address, hello.shortcut, hello.memory))
        nodes = dict(enumerate(peers))
        del nodes[0]
        mapped = self._payloads.meet(0, nodes)
        for number, peer in nodes.items():
            shortcut = peer.shortcut if number in mapped else ""
            self.flow.links[number] = results.connect(peer.address, shortcut=shortcut)
        for node in self._machine.nodes.values():
            control.send(node.identity, codec.encode(Wire(tuple(peers))))
        return Met(mapped)

    def _end_nodes(self) -> None:
        deadline = time.monotonic() + _STOP_GRACE_S
        for handle in self._handles.values():
            handle.end(max(0.0, deadline - time.monotonic()))

    def _finish(self, failure: BaseException | None) -> None:
        """Leave nobody waiting, whatever happened."""
        broken = failure is not None or any(n.state is NodeState.LOST for n in self._machine.nodes.values())
        if self._setup.launcher is not None:
            if self._setup.profile:
                self.profiles = {slot: self._setup.launcher.profile(*slot) for slot in self._machine.nodes}
            self._setup.launcher.close(keep_logs=broken)
        else:
            shutil.rmtree(self._setup.home, ignore_errors=True)
        reason = (
            failure if isinstance(failure, PipelineError) else PipelineClosed(f"the coordinator failed: {failure!r}")
        )
        self.flow.fail(reason)
        self._wakeup.close()
        if not self._ready.done():
            self._ready.set_exception(reason)
