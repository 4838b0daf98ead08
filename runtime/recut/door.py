"""The door of a pipeline: every request enters the plan that is current when it comes, and stays with it.

A caller's thread first notes that it is about to enter a plan (a lease), and then looks whether the plan is still the
current one. Whoever has changed the current plan looks for leases afterwards. So a plan without leases gets no more
requests, and no lock is needed on a request's way.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Unpack

from onnxsplit.tensors import Array
from runtime.coordinator.node_record import Incident
from runtime.recut.running_plan import RunningPlan
from runtime.requests.admission import Admission
from runtime.requests.generate_options import GenerateArguments
from runtime.requests.generation import Generation
from runtime.requests.request import Answering, OutputSelection

_MOST_INCIDENTS = 100


class Entering:
    """A lease on the current plan of a door, for one call; a context manager."""

    __slots__ = ("__weakref__", "_door", "_running")

    def __init__(self, door: Door) -> None:
        self._door = door
        self._running: RunningPlan | None = None

    def __enter__(self) -> RunningPlan:
        while True:
            running = self._running = self._door.current
            running.leases.add(self)
            if self._door.current is running:
                return running
            running.leases.discard(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._running is not None
        self._running.leases.discard(self)


class Door:
    """Where the requests of a pipeline enter. Its methods can be called from any number of threads.

    Args:
        first: the plan that the pipeline was launched with.
        admission: limits the requests in flight, over all plans together.

    Attributes:
        current: the plan that new requests enter.
        plans: the plans that have nodes, by generation.
        admission: as given.
        address: the address to which nodes that are started by hand connect.
    """

    def __init__(self, first: RunningPlan, admission: Admission) -> None:
        self.current = first
        self.plans: tuple[RunningPlan, ...] = (first,)
        self.admission = admission
        self.address = ""
        self._closed = False
        self._lock = threading.Lock()  # held to change the plans, and never while a request enters
        self._numbers = itertools.count(first.number + 1)
        self._past_retries = 0
        self._past_losses = 0
        self._past_incidents: list[Incident] = []
        self._loop: _LoopTakers | None = None

    def entering(self) -> Entering:
        """A lease on the current plan. The plan keeps its nodes as long as somebody holds one."""
        return Entering(self)

    # What callers do

    def submit(self, inputs: object, outputs: object, deadline_ns: int | None, *, block: bool) -> Answering:
        """Submit a request; see :meth:`.Entrance.submit`."""
        with Entering(self) as running:
            return running.entrance.submit(inputs, outputs, deadline_ns, block=block)

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...] | None = None) -> OutputSelection:
        """Check a request against the model; see :meth:`.Entrance.check`."""
        with Entering(self) as running:
            return running.entrance.check(inputs, outputs)

    def enter(
        self, arrays: Mapping[str, Array], selection: OutputSelection, *, deadline_ns: int | None, block: bool
    ) -> Answering:
        """Submit inputs that have passed :meth:`check`, perhaps of an earlier plan; see :meth:`.Entrance.enter`.

        Raises:
            InputError: the request names a tensor that the current plan does not send between stages.
        """
        with Entering(self) as running:
            entrance = running.entrance
            return entrance.enter(arrays, entrance.own(selection), deadline_ns=deadline_ns, block=block)

    def generate(
        self,
        tokens: Sequence[int] | Array,
        *,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[GenerateArguments],
    ) -> Generation:
        """Start a generation; see :meth:`runtime.pipeline.Pipeline.generate`."""
        with Entering(self) as running:
            return running.generator(tokens, timeout=timeout, block=block, **options)

    def check_open(self) -> None:
        """Check that the pipeline is open and belongs to this process; raises as :meth:`.Entrance.check_open`."""
        self.current.entrance.check_open()

    def check_process(self) -> None:
        """Check that the pipeline belongs to this process; raises as :meth:`.Entrance.check_process`."""
        self.current.entrance.check_process()

    @property
    def is_own(self) -> bool:
        """Whether the pipeline belongs to this process."""
        return self.current.entrance.is_own

    def later(self, function: Callable[[], object]) -> None:
        """Call a function soon, in a thread of the pipeline; see :meth:`.Inbox.call`."""
        self.current.entrance.later(function)

    # What was seen of all plans

    @property
    def retries(self) -> int:
        """The number of attempts that were repeated, by all plans."""
        with self._lock:
            return self._past_retries + sum(running.coordinator.retries for running in self.plans)

    @property
    def losses(self) -> int:
        """The number of processes of nodes that were lost, by all plans."""
        with self._lock:
            return self._past_losses + sum(map(_losses, self.plans))

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The lost nodes and dead links of all plans, oldest first, at most a hundred."""
        with self._lock:
            found = [*self._past_incidents, *(one for running in self.plans for one in running.coordinator.incidents)]
        return tuple(sorted(found, key=lambda one: one.at_ns)[-_MOST_INCIDENTS:])

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        with self._lock:
            return sum(running.coordinator.requests.lent_bytes for running in self.plans)

    # Changing the plan

    def next_number(self) -> int:
        """The number of the next generation."""
        return next(self._numbers)

    def add(self, running: RunningPlan) -> bool:
        """Keep a plan that is about to start, so that :meth:`close` ends it; False when the door is closed."""
        with self._lock:
            if not self._closed:
                self.plans = (*self.plans, running)
                self._tell_roles()
            return not self._closed

    def remove(self, running: RunningPlan) -> None:
        """End a plan that is not the current one, and remember what was seen of it."""
        assert running is not self.current
        if self._loop is not None:
            self._loop.remove(running)
        losses = _losses(running)
        running.close()
        with self._lock:
            if running in self.plans:
                self.plans = tuple(one for one in self.plans if one is not running)
                self._tell_roles()
                self._past_retries += running.coordinator.retries
                self._past_losses += losses
                self._past_incidents += running.coordinator.incidents
                del self._past_incidents[:-_MOST_INCIDENTS]

    def swap(self, running: RunningPlan) -> bool:
        """Let new requests enter another plan, whose nodes are ready; False when the door is closed.

        Requests that wait for admission still enter the plan that was current when they came.
        """
        with self._lock:
            if self._closed:
                return False
            if self._loop is not None:
                self._loop.add(running)
            former = self.current.plan
            running.entrance.forget({cut.tensor for cut in former.cuts})
            running.has_served = True
            self.current = running
            self.admission.resize(*running.limits)
            self._tell_roles()
            return True

    def _tell_roles(self) -> None:
        """Tell the coordinators which of them takes new requests, for ``onnxsplit status``."""
        for running in self.plans:
            takes = "takes new requests" if running is self.current else "takes no new requests"
            role = f"plan {running.number}, which {takes}" if len(self.plans) > 1 else ""
            running.coordinator.handover.role = role

    def close(self) -> None:
        """End all plans, at once."""
        with self._lock:
            self._closed = True
            plans = self.plans
        for running in plans:
            running.entrance.close()
        for running in plans:
            running.coordinator.close()

    def close_when_drained(self) -> None:
        """End all plans when their requests are answered. It waits for nothing, and takes no lock."""
        self._closed = True
        for running in self.plans:
            running.coordinator.close_when_drained()

    # Results in an event loop

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Receive results in an event loop; see :meth:`runtime.pipeline.Pipeline.take_in_loop`."""
        with self._lock:
            self._loop = _LoopTakers()
            self._loop.add(self.current)
            return os.dup(self._loop.fileno()), self._loop.take


def _losses(running: RunningPlan) -> int:
    """The number of processes of a plan's nodes that were lost."""
    return sum(node.restarts for node in running.coordinator.stats())


class _LoopTakers:
    """Receives the results of several plans in one event loop, which watches one descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._takers: dict[int, tuple[RunningPlan, Callable[[], None]]] = {}

    def fileno(self) -> int:
        """A descriptor that is readable when a plan has results."""
        return self._epoll.fileno()

    def add(self, running: RunningPlan) -> None:
        """Receive the results of a plan from now on."""
        if any(one is running for one, _ in self._takers.values()):
            return
        descriptor, take = running.coordinator.take_in_loop()
        self._takers[descriptor] = running, take
        self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, running: RunningPlan) -> None:
        """Receive no more results of a plan."""
        for descriptor, (one, _) in list(self._takers.items()):
            if one is running:
                self._epoll.unregister(descriptor)
                del self._takers[descriptor]
                os.close(descriptor)

    def take(self) -> None:
        """Receive the results that wait; called in the event loop."""
        for descriptor, _ in self._epoll.poll(0):
            if (found := self._takers.get(descriptor)) is not None:
                found[1]()
