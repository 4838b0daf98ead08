"""Requests out to the nodes, and results back.

A request goes out in its caller's own thread and comes back in one thread of the coordinator's, and nobody hands it on.
The lock is held only to decide and to send, never to copy.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxsplit.errors import one_line
from onnxsplit.plan import CALLER, Plan
from onnxsplit.tensors import Array
from runtime.balance.router import Router
from runtime.coordinator.events import (
    Again,
    CoordinatorEffect,
    CoordinatorEvent,
    Enter,
    GivenUp,
    Reject,
    Reported,
    Resolve,
    Returned,
    Submitted,
    Unsendable,
)
from runtime.coordinator.state import CoordinatorState
from runtime.errors import MemoryWithdrawn, PipelineClosed, PipelineError, ProtocolError, StageFailed
from runtime.logs import DropLog, log_event
from runtime.memory.outgoing import Attempt, Outgoing, shapes_of
from runtime.memory.payloads import Payloads
from runtime.memory.sender import Sender
from runtime.topology import sources
from runtime.trace import RequestTrace
from runtime.wire import codec
from runtime.wire.links import Inlet, Outlet
from runtime.wire.messages.data import Failed, Fragment, Receipt, Started, Visit
from runtime.wire.sockets import Sockets
from runtime.wire.wakeup import Wakeup

_log = logging.getLogger("runtime.coordinator")
_drops = DropLog(_log)


@dataclass(frozen=True)
class Answer:
    """How a request ended: its outputs, which are the caller's own, and where it was when; or an error."""

    outputs: dict[str, Array]
    error: PipelineError | None = None
    visits: tuple[Visit, ...] = ()


Done = Callable[[Answer], None]


def _nobody(_: Answer) -> None:
    """Hears the answer to a request whose caller was told otherwise."""


_WORDS = 500
_MOST_FAULTS = 100  # messages in a row that cannot be taken, after which the pipeline ends


@dataclass(frozen=True)
class _Outputs:
    """A fragment that came back, and copies of its tensors; None when nobody waits for them, or they were not made."""

    fragment: Fragment
    tensors: dict[str, Array] | None
    error: PipelineError | None = None


@dataclass
class _Pending:
    """A request that is not answered: who wants to know, its inputs, and what has come back of the attempt.

    Attributes:
        done: told the answer.
        entered_ns: it was submitted.
        going: its inputs, held until it is answered so that they can be sent again.
        enter: the attempt under way, or to come as soon as the inputs are ``placed``.
    """

    done: Done
    entered_ns: int
    going: Outgoing = field(default_factory=Outgoing)
    placed: bool = False
    enter: Enter | None = None
    outputs: dict[str, Array] = field(default_factory=dict)


class _Here(threading.local):
    """What the present thread is at."""

    delivering = False


class RequestIO:
    """The requests of one coordinator.

    A fault that has to do with one request ends that request alone: no thread that others need ends with it.

    Args:
        plan: what the nodes execute.
        machine: decides.
        payloads: the caller's side of shared memory.
        router: chooses among replicas.
        replay: hold inputs until the answer is there, so that another attempt can be made.
        trace: record when each request was where.
        elsewhere: takes effects that are not about requests, while the lock is held; any thread calls it.
        deadline: told of a request's deadline in nanoseconds.
        broken: told, in any thread, that results cannot be taken any more.

    Attributes:
        lock: of the machine, the links, the own shared memory and what is pending here.
        links: to the nodes, by number.
        started: the attempt that nodes on other hosts said last they begin to execute, by number.
        wakeup: to be watched by the sockets that :meth:`take_results` waits at.
        traced: what was recorded.
    """

    def __init__(
        self,
        plan: Plan,
        machine: CoordinatorState,
        payloads: Payloads,
        router: Router,
        *,
        replay: bool,
        trace: bool,
        elsewhere: Callable[[CoordinatorEffect], None],
        deadline: Callable[[int], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self.lock = threading.Lock()
        self.links: dict[int, Outlet] = {}
        self.started: dict[int, tuple[int, int]] = {}
        self.wakeup = Wakeup()
        self.traced: list[RequestTrace] = []
        self._machine = machine
        self._payloads = payloads
        self.ended = False
        self._router = router
        self._replay = replay
        self._trace = trace
        self._elsewhere = elsewhere
        self._deadline = deadline
        self._broken = broken
        self._reason: PipelineError | None = None
        self._here = _Here()
        self._faults = 0
        self._entrances = {
            stage.index: tuple(name for name in stage.inputs if name in plan.inputs)
            for stage in plan.stages
            if CALLER in sources(plan, stage.index)
        }
        by_stage = {stage.index: sorted(sources(plan, stage.index)) for stage in plan.stages}
        self._sender = Sender(payloads, router, self.links, by_stage)
        self._pending: dict[int, _Pending] = {}
        self._answers: deque[tuple[Done, Answer]] = deque()
        self._count = 0
        self._stopped = False
        self._sockets: Sockets
        self._data: Inlet
        self._elsewhere_taken = False
        self._thread_ended = threading.Event()
        self._taking = threading.Lock()

    def submit(
        self, inputs: Mapping[str, Array], wanted: tuple[str, ...], cost: int, deadline_ns: int | None, done: Done
    ) -> int:
        """Send a request in, and return its number; ``inputs`` are copied before this returns.

        ``done`` is called once: in a thread of the coordinator's, or in this one when the request is refused at once.
        When this raises, nothing of the request is left, and ``done`` is not called from then on.
        """
        number = -1
        try:
            with self.lock:
                number = self._count
                self._count += 1
                if self._stopped:
                    self._answers.append((done, Answer({}, self.reason)))
                    pending = None
                else:
                    pending = self._decide(number, inputs, wanted, cost, deadline_ns, done)
            if pending is not None:
                self._place(pending, number, inputs)
                if deadline_ns is not None:
                    self._deadline(deadline_ns)
            self._hand_on()
        except BaseException:
            with self.lock:
                self._withdraw(number)
            raise
        return number

    def _decide(
        self,
        number: int,
        inputs: Mapping[str, Array],
        wanted: tuple[str, ...],
        cost: int,
        deadline_ns: int | None,
        done: Done,
    ) -> _Pending | None:
        """Let the machine take a request, while the lock is held; None when it is refused."""
        now = time.monotonic_ns()
        pending = self._pending[number] = _Pending(done, now)
        self.perform(self._machine.handle(Submitted(number, wanted, cost, deadline_ns, now)))
        if number not in self._pending:
            return None
        self._payloads.place(pending.going, shapes_of(inputs), inputs)
        return pending

    def _place(self, pending: _Pending, number: int, inputs: Mapping[str, Array]) -> None:
        """Copy a request's inputs to where nodes read them, and begin the attempt that waits for that."""
        arrays = pending.going.arrays
        for name, array in inputs.items():
            if name in arrays:
                arrays[name][...] = array
            else:
                arrays[name] = np.array(array, order="C")
        with self.lock:
            pending.placed = True
            if number not in self._pending or self._stopped:
                self._payloads.release(pending.going)  # it was answered meanwhile
            elif pending.enter is not None:
                self._start(pending, pending.enter)

    def _withdraw(self, number: int) -> None:
        """Leave nothing of a request that could not be sent in, while the lock is held."""
        pending = self._pending.get(number)
        if pending is None:
            return
        pending.done = _nobody
        self.perform(self._machine.handle(GivenUp(number)))
        self._pending.pop(number, None)
        self._payloads.release(pending.going)

    def give_up(self, number: int) -> None:
        """The caller does not want an answer any more."""
        with self.lock:
            self.perform(self._machine.handle(GivenUp(number)))
        self._hand_on()

    def _hand_on(self) -> None:
        """Have what was noted delivered: by the thread that brings answers, so that no interrupt of this one loses any.

        Where that thread has ended, by this one.
        """
        if not self._answers:
            return
        if self._stopped or self._here.delivering:
            self.deliver()
        else:
            self.wakeup.ring()

    def _start(self, pending: _Pending, enter: Enter) -> None:
        """Begin an attempt, while the lock is held; a request that cannot be sent ends with the reason."""
        try:
            self._send(pending, enter)
        except Exception as error:
            self.perform(self._machine.handle(Unsendable(enter.request, unsendable(error))))

    def _send(self, pending: _Pending, enter: Enter) -> None:
        """Send a request's inputs to the nodes of its route, while the lock is held."""
        now = time.monotonic_ns()
        going = pending.going
        attempt = Attempt(
            request=enter.request,
            attempt=enter.attempt,
            view=enter.view,
            cost=enter.cost,
            budget_ns=0 if enter.deadline_ns is None else max(1, enter.deadline_ns - now),
            route=enter.route,
            wanted=enter.wanted,
        )
        wanted = self._entrances.items()
        self._sender.send(self._sender.readers(wanted, attempt, going), attempt, going, CALLER, keep=True)
        if not self._replay:
            self._payloads.release(going)

    def take_results(self, sockets: Sockets, data: Inlet) -> None:
        """Take what comes back until :meth:`stop`, or until somebody else takes it."""
        self._sockets, self._data = sockets, data
        try:
            while not (self._stopped or self._elsewhere_taken):
                ready = sockets.wait(60.0)
                if self.wakeup.fileno() in ready:
                    self.wakeup.clear()
                    self.deliver()
                self._take_one(ready)
        except BaseException as error:
            self._broken(error)
        finally:
            self._thread_ended.set()

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """End the thread that takes results, so that an event loop can: saves waking it, and then the loop, each time.

        Returns:
            a descriptor of the caller's own, to be watched, and what to call whenever it is readable.
        """
        self._elsewhere_taken = True
        self.wakeup.ring()
        self._thread_ended.wait()
        return os.dup(self._sockets.fileno()), self._take_waiting

    def _take_waiting(self) -> None:
        try:
            with self._taking:
                if self._stopped:  # the sockets may be closed
                    return
                self.wakeup.clear()
                self.deliver()
                while not self._stopped and self._take_one(self._sockets.wait(0.0)):
                    pass
        except BaseException as error:
            self._broken(error)

    def _take_one(self, ready: set[object]) -> bool:
        """Take a message of what is ready; False when there is none.

        A message that cannot be taken is dropped. Only when nothing else comes any more is that the pipeline's end.
        """
        message = self._data.receive(ready)
        if message is None:
            return False
        try:
            event = self._result(*message)
            if event is not None:
                with self.lock:
                    self._take(event)
            self._faults = 0
        except Exception:
            self._faults += 1
            if self._faults > _MOST_FAULTS:
                raise
            _log.exception("a message could not be taken")
        self.deliver()
        return True

    def _take(self, event: CoordinatorEvent | _Outputs) -> None:
        """Act on what came back, while the lock is held."""
        if not isinstance(event, _Outputs):
            self.perform(self._machine.handle(event))
            return
        fragment = event.fragment
        request, attempt = fragment.request, fragment.attempt
        held = self._payloads.hold((fragment,))
        self._payloads.give_back(fragment)
        if held and event.tensors is not None and self._machine.attempt(request) == attempt:
            self._pending[request].outputs.update(event.tensors)
            names = tuple(event.tensors)
            self.perform(self._machine.handle(Returned(request, attempt, names, fragment.history)))
        elif event.error is not None:
            self.perform(self._machine.handle(Unsendable(request, event.error, attempt)))

    def _result(self, header: codec.Buffer, frames: list[codec.Buffer]) -> CoordinatorEvent | _Outputs | None:
        try:
            said = codec.decode_data(header)
            match said:
                case Fragment():
                    return self._collect(said, frames)
                case Failed():
                    return Reported(said)
                case Receipt():
                    with self.lock:
                        self._router.told(said, time.monotonic_ns())
                case Started(request, attempt, sender):
                    self.started[sender] = request, attempt
        except ProtocolError as error:
            _drops.note(error)
        return None

    def _collect(self, fragment: Fragment, frames: list[codec.Buffer]) -> CoordinatorEvent | _Outputs:
        try:
            tensors = self._payloads.receive(fragment, frames)
        except MemoryWithdrawn:
            raise  # another attempt is made
        except Exception as error:
            return Unsendable(fragment.request, _unreadable(fragment, error), fragment.attempt)
        if self._machine.attempt(fragment.request) != fragment.attempt:
            return _Outputs(fragment, None)
        try:
            # Copied: the caller's arrays are its own, writable and not tied to a message or to a node's memory.
            return _Outputs(fragment, {name: np.array(tensor) for name, tensor in tensors.items()})
        except MemoryError as error:
            return _Outputs(fragment, None, _unreadable(fragment, error))

    def perform(self, effects: Iterable[CoordinatorEffect]) -> None:
        """Do what is to be done about requests, while the lock is held, and leave the rest to the control thread."""
        for effect in effects:
            self.answer(effect)

    def answer(self, effect: CoordinatorEffect) -> None:
        """Send, or note what to tell a caller, while the lock is held.

        :meth:`deliver` tells it, without: a caller may submit again.
        """
        match effect:
            case Enter(request):
                pending = self._pending[request]
                pending.enter = effect
                if pending.placed:
                    self._start(pending, effect)
            case Again(request, attempt, reason):
                log_event(_log, logging.INFO, "attempt over", request=request, attempt=attempt, reason=reason)
                pending = self._pending[request]
                pending.enter = None
                pending.outputs = {}
            case Resolve(request, visits):
                pending = self._end(request)
                self._answers.append((pending.done, Answer(pending.outputs, visits=visits)))
                if self._trace:
                    self.traced.append(RequestTrace(request, pending.entered_ns, visits, time.monotonic_ns()))
            case Reject(request, error):
                log_event(
                    _log, logging.INFO, "request failed", request=request, error=type(error).__name__, reason=error
                )
                self._answers.append((self._end(request).done, Answer({}, error)))
            case _:
                self._elsewhere(effect)

    def _end(self, request: int) -> _Pending:
        pending = self._pending.pop(request)
        if pending.placed:
            self._payloads.release(pending.going)
        return pending

    def deliver(self) -> None:
        """Tell callers what was noted; without the lock.

        A callback may submit, which comes here again: then the loop that called it goes on with what that noted.
        """
        if self._here.delivering:
            return
        self._here.delivering = True
        try:
            while True:
                try:
                    done, answer = self._answers.popleft()
                except IndexError:  # another thread may have delivered them
                    return
                try:
                    done(answer)
                except BaseException:  # a caller's callback, whatever it raises: others wait for this thread
                    _log.exception("a callback of a request raised")
        finally:
            self._here.delivering = False

    @property
    def delivering(self) -> bool:
        """True in a callback of a request: the present thread brings answers, so it must not wait for any."""
        return self._here.delivering

    @property
    def reason(self) -> PipelineError:
        """Why no more requests are taken."""
        return self._reason or self._machine.error or PipelineClosed("the pipeline was closed")

    @property
    def count(self) -> int:
        """Requests so far."""
        return self._count

    @property
    def oldest(self) -> int:
        """The first request that is not answered, or else the next to come: nodes may forget all before it.

        Read at once, or a request that comes in between would be forgotten as soon as it is there.
        """
        with self.lock:
            oldest = self._machine.oldest
            return self._count if oldest is None else oldest

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
        with self._taking:  # nobody is at the sockets any more
            pass

    def fail(self, reason: PipelineError) -> None:
        """Leave nobody waiting."""
        with self.lock:
            self._stopped = True
            self._reason = reason
            self._answers += [(pending.done, Answer({}, reason)) for pending in self._pending.values()]
            self._pending.clear()
            self.ended = True
            self._payloads.close()
            self.wakeup.close()
        self.deliver()


def _unreadable(fragment: Fragment, error: Exception) -> PipelineError:
    found = StageFailed(
        f"what stage {fragment.source} gave cannot be taken: {type(error).__name__}: {one_line(error, _WORDS)}"
    )
    found.__cause__ = error
    return found


def unsendable(error: BaseException) -> PipelineError:
    """Why a request could not be sent, as its caller is told."""
    if isinstance(error, PipelineError):
        return error
    found = PipelineError(f"the request could not be sent: {type(error).__name__}: {one_line(error, _WORDS)}")
    found.__cause__ = error
    return found
