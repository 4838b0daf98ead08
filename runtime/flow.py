"""Requests out to the nodes, and results back.

A request goes out in its caller's own thread and comes back in one thread of the coordinator's, and nobody hands it on.
The lock is held only to decide and to send, never to copy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array
from runtime import codec
from runtime.coordinator_state import (
    CoordinatorState,
    Effect,
    Enter,
    Event,
    Reject,
    Reported,
    Resolve,
    Returned,
    Submitted,
)
from runtime.errors import PipelineClosed, PipelineError, ProtocolError
from runtime.messages import CALLER, NOT_NEEDED, Fragment
from runtime.node_state import sources
from runtime.payloads import Outgoing, Payloads, shapes_of
from runtime.trace import Traced
from runtime.transport import Inlet, Outlet, Sockets, Wakeup

_log = logging.getLogger("runtime.coordinator")


@dataclass(frozen=True)
class Answer:
    """How a request ended: its outputs, which are the caller's own, or an error."""

    outputs: dict[str, Array]
    error: PipelineError | None = None


Done = Callable[[Answer], None]


@dataclass
class _Pending:
    """A request in flight: who wants to know, and what has come back."""

    done: Done
    entered_ns: int
    outputs: dict[str, Array] = field(default_factory=dict)


class Flow:
    """The requests of one coordinator.

    Args:
        plan: what the nodes execute.
        machine: decides.
        payloads: the caller's side of shared memory.
        trace: record when each request was where.
        elsewhere: takes effects that are not about requests, while the lock is held; any thread calls it.
        deadline: told of a request's deadline in nanoseconds.

    Attributes:
        lock: of the machine, the links, the own shared memory and what is pending here.
        links: to the nodes, by number.
        wakeup: to be watched by the sockets that :meth:`take_results` waits at.
        traced: what was recorded.
    """

    def __init__(
        self,
        plan: Plan,
        machine: CoordinatorState,
        payloads: Payloads,
        *,
        trace: bool,
        elsewhere: Callable[[Effect], None],
        deadline: Callable[[int], None],
    ) -> None:
        self.lock = threading.Lock()
        self.links: dict[int, Outlet] = {}
        self.wakeup = Wakeup()
        self.traced: list[Traced] = []
        self._machine = machine
        self._payloads = payloads
        self._trace = trace
        self._elsewhere = elsewhere
        self._deadline = deadline
        self._entrances = {
            stage.index: tuple(name for name in stage.inputs if name in plan.inputs)
            for stage in plan.stages
            if CALLER in sources(plan, stage.index)
        }
        self._pending: dict[int, _Pending] = {}
        self._answers: deque[tuple[Done, Answer]] = deque()
        self._count = 0
        self._stopped = False

    def submit(self, inputs: Mapping[str, Array], wanted: tuple[str, ...], deadline_ns: int | None, done: Done) -> None:
        """Send a request in; ``inputs`` are copied before this returns.

        ``done`` is called once: in a thread of the coordinator's, or in this one when the request is refused at once.
        """
        entering = None
        with self.lock:
            if self._stopped:
                self._answers.append(
                    (done, Answer({}, self._machine.error or PipelineClosed("the pipeline was closed")))
                )
            else:
                number = self._count
                self._count += 1
                self._pending[number] = _Pending(done, time.monotonic_ns())
                (effect,) = self._machine.handle(Submitted(number, wanted, deadline_ns))
                if isinstance(effect, Enter):
                    targets = self._targets(effect.route)
                    going = Outgoing()
                    self._payloads.place(going, shapes_of(inputs), targets)
                    entering = effect, targets, going
                else:
                    self.answer(effect)
        if entering is not None:
            self._enter(*entering, inputs)
            if deadline_ns is not None:
                self._deadline(deadline_ns)
        self.deliver()

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
        with self.lock:
            if self._stopped:
                return
            for number, names in targets.items():
                self._payloads.send(
                    self.links[number],
                    number,
                    going,
                    names,
                    request=enter.request,
                    source=CALLER,
                    route=enter.route,
                    wanted=enter.wanted,
                )

    def take_results(self, sockets: Sockets, data: Inlet) -> None:
        """Take what comes back until :meth:`stop`."""
        while not self._stopped:
            ready = sockets.wait(60.0)
            message = data.receive(ready)
            event = self._result(*message) if message is not None else None
            if event is not None:
                with self.lock:
                    for effect in self._machine.handle(event):
                        self.answer(effect)
                self.deliver()

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

    def answer(self, effect: Effect) -> None:
        """Note what to tell a caller, while the lock is held; :meth:`deliver` tells it, since it may submit again."""
        match effect:
            case Resolve(request, visits):
                pending = self._pending.pop(request)
                self._answers.append((pending.done, Answer(pending.outputs)))
                if self._trace:
                    self.traced.append(Traced(request, pending.entered_ns, visits, time.monotonic_ns()))
            case Reject(request, error):
                self._answers.append((self._pending.pop(request).done, Answer({}, error)))
            case _:
                self._elsewhere(effect)

    def deliver(self) -> None:
        """Tell callers what was noted; without the lock."""
        while True:
            try:
                done, answer = self._answers.popleft()
            except IndexError:  # another thread may have delivered them
                return
            done(answer)

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        with self.lock:
            return self._payloads.lent_bytes

    def stop(self) -> None:
        """Send nothing more; what is pending stays so until :meth:`fail`."""
        with self.lock:
            self._stopped = True
        self.wakeup.ring()

    def fail(self, reason: PipelineError) -> None:
        """Leave nobody waiting."""
        with self.lock:
            self._stopped = True
            self._answers += [(pending.done, Answer({}, reason)) for pending in self._pending.values()]
            self._pending.clear()
            self._payloads.close()
            self.wakeup.close()
        self.deliver()
