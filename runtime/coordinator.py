"""The coordinator's loop: performs the effects of :class:`~runtime.coordinator_state.CoordinatorState`.

It runs in a thread of the caller's process. Callers post requests from their own threads; answers go to futures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array
from runtime import codec
from runtime.coordinator_state import (
    Announce,
    CloseAsked,
    CoordinatorState,
    Declined,
    Effect,
    Enter,
    Event,
    Forget,
    GiveStage,
    Joined,
    Lost,
    NodeState,
    Prepared,
    Reject,
    Reported,
    Resolve,
    Returned,
    SendAway,
    Slot,
    Submitted,
    Ticked,
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
    Failed,
    Finished,
    Fragment,
    Hello,
    NodeBeat,
    Ready,
    Refused,
    Stop,
    Wire,
)
from runtime.node_state import sources
from runtime.transport import Inlet, Outlet, Sockets, Wakeup

BEAT_S = 1.0
SILENCE_S = 10.0
"""A node that says nothing for this long is taken for dead."""

_STOP_GRACE_S = 3.0
_log = logging.getLogger("runtime.coordinator")

Answer = Future[dict[str, Array]]


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
        control: where nodes report.
        data: where results come in.
        launcher: starts the nodes; None waits for nodes started by hand.
        start_timeout_s: time for all nodes to become ready; None waits for ever.
    """

    folder: Path
    plan: Plan
    plan_id: str
    replicas: tuple[int, ...]
    providers: tuple[str, ...]
    threads: int
    control: str
    data: str
    launcher: Launcher | None
    start_timeout_s: float | None


@dataclass
class _Pending:
    """A request in flight: what the caller gave, what has come back, and the caller's future."""

    future: Answer
    inputs: Mapping[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict)


class Coordinator:
    """Starts nodes, wires them, routes requests, watches, collects. Start it once with :meth:`start`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._machine = CoordinatorState(setup.plan, setup.replicas)
        self._entrances = tuple(
            tuple(name for name in stage.inputs if name in setup.plan.inputs)
            if CALLER in sources(setup.plan, stage.index)
            else None
            for stage in setup.plan.stages
        )
        self._posted: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self._count = 0
        self._ready: Future[str] = Future()
        self._handles: dict[Slot, Handle] = {}
        self._heard: dict[bytes, float] = {}
        self._links: dict[Slot, Outlet] = {}
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)
        self._stopped = False

    # Called from any thread

    def start(self) -> Future[str]:
        """Begin; the future gives the control address when every node is ready, or the reason why not."""
        self._thread.start()
        return self._ready

    def submit(
        self, inputs: Mapping[str, Array], wanted: tuple[str, ...], deadline_ns: int | None, future: Answer
    ) -> None:
        """Post a request. ``inputs`` must not change until the future is done."""
        with self._lock:
            if self._stopped:
                future.set_exception(self._machine.error or PipelineClosed("the pipeline was closed"))
                return
            number = self._count
            self._count += 1
            self._pending[number] = _Pending(future, inputs)
            self._post(Submitted(number, wanted, deadline_ns))

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

    # The coordinator's thread

    def _serve(self) -> None:
        failure: BaseException | None = None
        try:
            with Sockets(linger_s=0.5) as sockets:
                try:
                    self._loop(sockets)
                finally:
                    self._end_nodes()
        except BaseException as error:  # a caller must never wait for a thread that died
            failure = error
            if not isinstance(error, PipelineError):
                _log.exception("the coordinator failed")
        finally:
            self._finish(failure)

    def _loop(self, sockets: Sockets) -> None:
        setup = self._setup
        control, data = sockets.bind(setup.control), sockets.bind(setup.data)
        self._address = control.address
        sockets.watch(self._wakeup.fileno())
        if setup.launcher is not None:
            for slot in self._machine.nodes:
                handle = setup.launcher.start(connect=control.address, stage=slot[0], replica=slot[1])
                self._handles[slot] = handle
                sockets.watch(handle.fileno())
        if not self._machine.nodes:  # every output passes through: there is nothing to wait for
            self._ready.set_result(control.address)
        begun = time.monotonic()
        next_beat = begun
        closing = False
        while not closing:
            ready = sockets.wait(self._patience(next_beat))
            self._wakeup.clear()
            events = [*self._control_events(control), *self._data_events(data), *self._exits(sockets, ready)]
            while self._posted:
                events.append(self._posted.popleft())
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_S
                events += self._silent(now)
                for identity in self._heard:
                    control.send(identity, codec.encode(Beat()))
                if setup.start_timeout_s is not None and now - begun > setup.start_timeout_s:
                    events.append(TimedOut(self._late(setup.start_timeout_s)))
            events.append(Ticked(time.monotonic_ns()))
            for event in events:
                closing = closing or isinstance(event, CloseAsked)
                for effect in self._machine.handle(event):
                    self._perform(effect, sockets, control, data)

    def _patience(self, next_beat: float) -> float:
        if self._posted:
            return 0.0
        deadline = self._machine.next_deadline_ns()
        until = next_beat if deadline is None else min(next_beat, deadline / 1e9)
        return max(0.0, until - time.monotonic()) + 0.001

    def _late(self, seconds: float) -> str:
        missing = ", ".join(
            f"stage {stage} (node {stage}.{replica})" for stage, replica in self._machine.missing_nodes()
        )
        return f"not ready after {seconds:.0f} s: {missing}"

    def _control_events(self, control: Inlet) -> list[Event]:
        events: list[Event] = []
        while (message := control.receive()) is not None:
            identity, header, _ = message
            try:
                said = codec.decode_node_control(header)
            except ProtocolError as error:
                _log.warning("dropped: %s", error)
                continue
            self._heard[identity] = time.monotonic()
            match said:
                case Hello():
                    events.append(Joined(identity, said))
                case Ready():
                    events.append(Prepared(identity))
                case Refused(reason):
                    events.append(Declined(identity, reason))
                case NodeBeat():
                    pass
        return events

    def _data_events(self, data: Inlet) -> list[Event]:
        events: list[Event] = []
        while (message := data.receive()) is not None:
            _, header, frames = message
            try:
                said = codec.decode_data(header)
                match said:
                    case Fragment():
                        events += self._collect(said, frames)
                    case Finished() | Failed():
                        events.append(Reported(said))
            except ProtocolError as error:
                _log.warning("dropped: %s", error)
        return events

    def _collect(self, fragment: Fragment, frames: list[codec.Buffer]) -> list[Event]:
        pending = self._pending.get(fragment.request)
        if pending is None:
            return []
        tensors = codec.decode_tensors(fragment.tensors, frames)
        # Copied: the caller's arrays are its own, writable and not tied to a message.
        pending.outputs.update({name: np.array(tensor) for name, tensor in tensors.items()})
        return [Returned(fragment.request, tuple(tensors))]

    def _exits(self, sockets: Sockets, ready: set[object]) -> list[Event]:
        events: list[Event] = []
        for slot, handle in self._handles.items():
            if handle.fileno() in ready and self._machine.nodes[slot].state is not NodeState.LOST:
                sockets.unwatch(handle.fileno())
                events.append(Lost(slot, handle.story()))
        return events

    def _silent(self, now: float) -> list[Event]:
        """Nodes that nobody here started are known to be alive by their beats alone."""
        if self._setup.launcher is not None:
            return []
        return [
            Lost(slot, f"has been silent for {SILENCE_S:.0f} s")
            for slot, node in self._machine.nodes.items()
            if node.identity in self._heard and now - self._heard[node.identity] > SILENCE_S
        ]

    def _perform(self, effect: Effect, sockets: Sockets, control: Inlet, data: Inlet) -> None:
        setup = self._setup
        match effect:
            case Enter(request, route, wanted):
                self._enter(request, route, wanted)
            case Resolve(request):
                self._answer(request, None)
            case Reject(request, error):
                self._answer(request, error)
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
                    address=data.address,
                )
                control.send(identity, codec.encode(assign))
            case WireAll(identities, addresses):
                for slot in self._machine.nodes:
                    self._links[slot] = sockets.connect(addresses[slot[0]][slot[1]])
                for identity in identities:
                    control.send(identity, codec.encode(Wire(addresses)))
            case SendAway(identity, reason):
                control.send(identity, codec.encode(Stop(reason)))
            case Announce(None):
                self._ready.set_result(self._address)
            case Announce(error):
                self._ready.set_exception(error)

    def _enter(self, request: int, route: tuple[int, ...], wanted: tuple[str, ...]) -> None:
        inputs = self._pending[request].inputs
        for stage, names in enumerate(self._entrances):
            if names is None or route[stage] == NOT_NEEDED:
                continue
            heads, frames = codec.encode_tensors({name: inputs[name] for name in names})
            header = Fragment(request, CALLER, route, wanted, heads)
            self._links[stage, route[stage]].send(codec.encode(header), frames)

    def _answer(self, request: int, error: PipelineError | None) -> None:
        pending = self._pending.pop(request)
        if error is None:
            pending.future.set_result(pending.outputs)
        else:
            pending.future.set_exception(error)

    def _end_nodes(self) -> None:
        deadline = time.monotonic() + _STOP_GRACE_S
        for handle in self._handles.values():
            handle.end(max(0.0, deadline - time.monotonic()))

    def _finish(self, failure: BaseException | None) -> None:
        """Leave nobody waiting, whatever happened."""
        broken = failure is not None or any(n.state is NodeState.LOST for n in self._machine.nodes.values())
        if self._setup.launcher is not None:
            self._setup.launcher.close(keep_logs=broken)
        with self._lock:
            self._stopped = True
        reason = (
            failure if isinstance(failure, PipelineError) else PipelineClosed(f"the coordinator failed: {failure!r}")
        )
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(reason)
        self._pending.clear()
        if not self._ready.done():
            self._ready.set_exception(reason)
