"""The coordinator's loop: performs the effects of :class:`~runtime.coordinator_state.CoordinatorState`.

Two threads of the caller's process. One takes results; the other speaks with the nodes, watches their processes and
minds the time. A request goes out in its caller's own thread and comes back in the first, and nobody hands it on; the
lock is held only to decide and to send, never to copy.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array
from runtime import codec
from runtime.arena import Step
from runtime.coordinator_state import (
    Announce,
    CloseAsked,
    CoordinatorState,
    Declined,
    Effect,
    Enter,
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
    Reported,
    Resolve,
    Returned,
    SendAway,
    ShareMemory,
    Slot,
    State,
    Submitted,
    TimedOut,
    WireAll,
)
from runtime.errors import PipelineClosed, PipelineError, ProtocolError
from runtime.launch import Handle, Launcher
from runtime.messages import (
    CALLER,
    NOT_NEEDED,
    Assign,
    Beat,
    Cancel,
    Fragment,
    Hello,
    NodeBeat,
    Peer,
    Ready,
    Refused,
    Share,
    Stop,
    Wire,
)
from runtime.node_state import sources
from runtime.payloads import Outgoing, Payloads, shapes_of
from runtime.trace import Traced
from runtime.transport import AnsweringInlet, Inlet, Outlet, Sockets, Wakeup

BEAT_S = 1.0
SILENCE_S = 10.0
"""A node that says nothing for this long is taken for dead."""

_STOP_GRACE_S = 3.0
_log = logging.getLogger("runtime.coordinator")


@dataclass(frozen=True)
class Answer:
    """How a request ended: its outputs, which are the caller's own, or an error."""

    outputs: dict[str, Array]
    error: PipelineError | None = None


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


@dataclass
class _Pending:
    """A request in flight: who wants to know, and what has come back."""

    done: Callable[[Answer], None]
    entered_ns: int
    outputs: dict[str, Array] = field(default_factory=dict)


class Coordinator:
    """Starts nodes, wires them, routes requests, watches, collects. Start it once with :meth:`start`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._machine = CoordinatorState(setup.plan, setup.replicas)
        self._entrances = {
            stage.index: tuple(name for name in stage.inputs if name in setup.plan.inputs)
            for stage in setup.plan.stages
            if CALLER in sources(setup.plan, stage.index)
        }
        self._payloads = Payloads(setup.memory_bytes)
        self._shortcut = setup.home / "results.fragments" if setup.memory_bytes else None
        self._posted: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._results_wakeup = Wakeup()
        self._lock = threading.Lock()  # of the machine, what is pending, the links and the own shared memory
        self._control_effects: deque[Effect] = deque()  # for the thread that owns the control socket
        self._pending: dict[int, _Pending] = {}
        self.traced: list[Traced] = []
        self.profiles: dict[Slot, list[dict[str, Any]]] = {}
        self._answers: deque[tuple[Callable[[Answer], None], Answer]] = deque()
        self._links: dict[int, Outlet] = {}
        self._count = 0
        self._sleeps_until = 0.0
        self._stopped = False
        self._ready: Future[str] = Future()
        self._handles: dict[Slot, Handle] = {}
        self._heard: dict[bytes, float] = {}
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    # Called from any thread

    def start(self) -> Future[str]:
        """Begin; the future gives the control address when every node is ready, or the reason why not."""
        self._thread.start()
        return self._ready

    def submit(
        self,
        inputs: Mapping[str, Array],
        wanted: tuple[str, ...],
        deadline_ns: int | None,
        done: Callable[[Answer], None],
    ) -> int:
        """Send a request in; returns its number. ``inputs`` are copied before this returns.

        ``done`` is called once, in the coordinator's thread, or in this one when the request is refused at once.
        """
        entering = None
        with self._lock:
            number = self._count
            self._count += 1
            if self._stopped:
                error = self._machine.error or PipelineClosed("the pipeline was closed")
                self._answers.append((done, Answer({}, error)))
            else:
                self._pending[number] = _Pending(done, time.monotonic_ns())
                (effect,) = self._machine.handle(Submitted(number, wanted, deadline_ns))
                if isinstance(effect, Enter):
                    targets = self._targets(effect.route)
                    going = Outgoing()
                    self._payloads.place(going, shapes_of(inputs), targets)
                    entering = effect, targets, going
                else:
                    self._answer(effect)
        if entering is not None:
            self._enter(*entering, inputs)
            if deadline_ns is not None and deadline_ns / 1e9 < self._sleeps_until:
                self._wakeup.ring()
        self._deliver()
        return number

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

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        with self._lock:
            return self._payloads.lent_bytes

    def _post(self, event: Event) -> None:
        self._posted.append(event)
        self._wakeup.ring()

    def _targets(self, route: tuple[int, ...]) -> Mapping[int, tuple[str, ...]]:
        """The inputs that each node on a route reads, by the node's number."""
        return {
            self._machine.number((stage, route[stage])): names
            for stage, names in self._entrances.items()
            if route[stage] != NOT_NEEDED
        }

    def _enter(
        self, enter: Enter, targets: Mapping[int, tuple[str, ...]], going: Outgoing, inputs: Mapping[str, Array]
    ) -> None:
        for name, array in inputs.items():
            if name in going.arrays:
                going.arrays[name][...] = array
            else:  # small ones are copied into the message
                going.arrays[name] = array if array.nbytes <= codec.INLINE_BYTES else np.array(array, order="C")
        with self._lock:
            if self._stopped:
                return
            for number, names in targets.items():
                self._payloads.send(
                    self._links[number],
                    number,
                    going,
                    names,
                    request=enter.request,
                    source=CALLER,
                    route=enter.route,
                    wanted=enter.wanted,
                )

    # The thread that takes results

    def _take_results(self, sockets: Sockets, data: Inlet) -> None:
        while not self._stopped:
            ready = sockets.wait(60.0)
            message = data.receive(ready)
            event = self._result(*message) if message is not None else None
            if event is not None:
                with self._lock:
                    for effect in self._machine.handle(event):
                        self._answer(effect)
                self._deliver()

    def _result(self, header: codec.Buffer, frames: list[codec.Buffer]) -> Event | None:
        try:
            said = codec.decode_data(header)
            return self._collect(said, frames) if isinstance(said, Fragment) else Reported(said)
        except ProtocolError as error:
            _log.warning("dropped: %s", error)
            return None

    def _collect(self, fragment: Fragment, frames: list[codec.Buffer]) -> Event | None:
        tensors = self._payloads.receive(fragment, frames)
        pending = self._pending.get(fragment.request)
        # Copied: the caller's arrays are its own, writable and not tied to a message or to a node's memory.
        copies = {name: np.array(tensor) for name, tensor in tensors.items()} if pending is not None else {}
        held = self._payloads.hold((fragment,))
        self._payloads.give_back(fragment)
        if pending is None or not held:
            return None
        pending.outputs.update(copies)
        return Returned(fragment.request, tuple(tensors), fragment.history)

    # The thread that minds the nodes

    def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            with Sockets(linger_s=0.5) as sockets, Sockets() as results:
                control = sockets.answering(self._setup.control)
                data = results.inlet(self._setup.data, shortcut=self._shortcut)
                results.watch(self._results_wakeup.fileno())
                taker = threading.Thread(target=self._take_results, args=(results, data), name="results", daemon=True)
                taker.start()
                try:
                    self._loop(sockets, results, control, data)
                finally:
                    with self._lock:
                        self._stopped = True
                    self._results_wakeup.ring()
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
            with self._lock:
                events += self._expired()
                for event in events:
                    self._handle(event, results, control, data)
                while self._control_effects:
                    self._perform(self._control_effects.popleft(), results, control, data)
            self._deliver()

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
        with self._lock:
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
                self._answer(effect)
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
            self._links[number] = results.connect(peer.address, shortcut=shortcut)
        for node in self._machine.nodes.values():
            control.send(node.identity, codec.encode(Wire(tuple(peers))))
        return Met(mapped)

    def _answer(self, effect: Effect) -> None:
        """Note what to tell a caller; it is told when the lock is free, since it may submit again at once.

        What is to be told to nodes is left to the thread that can.
        """
        match effect:
            case Resolve(request, visits):
                pending = self._pending.pop(request)
                self._answers.append((pending.done, Answer(pending.outputs)))
                if self._setup.trace:
                    self.traced.append(Traced(request, pending.entered_ns, visits, time.monotonic_ns()))
            case Reject(request, error):
                self._answers.append((self._pending.pop(request).done, Answer({}, error)))
            case _:
                self._control_effects.append(effect)
                self._wakeup.ring()

    def _deliver(self) -> None:
        while True:
            try:
                done, answer = self._answers.popleft()
            except IndexError:  # another thread may have delivered them
                return
            done(answer)

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
        with self._lock:
            self._stopped = True
            self._answers += [(pending.done, Answer({}, reason)) for pending in self._pending.values()]
            self._pending.clear()
            self._payloads.close()
            self._wakeup.close()
            self._results_wakeup.close()
        self._deliver()
        if not self._ready.done():
            self._ready.set_exception(reason)
