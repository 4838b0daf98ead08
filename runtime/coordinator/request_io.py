"""Sends requests to the nodes and ends them with an answer.

A request is sent in its caller's own thread, and one thread receives all results
(:mod:`runtime.coordinator.results`); no other thread handles it in between. The lock is held only to decide and to
send, never to copy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping

import numpy as np

from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import CALLER, Plan
from onnxsplit.tensors import Array
from runtime.coordinator.answers import Answer, AnswerQueue, Done
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import CoordinatorEvent, Enter, GivenUp, Returned, Submitted, Unsendable
from runtime.coordinator.inbox import Inbox
from runtime.coordinator.interpreter import RequestEffects
from runtime.coordinator.pending import Moved, Pending, attempt_of, ignore, moved_request, unsendable
from runtime.coordinator.sequence_events import Emit, EnterStep, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_io import SequenceIO
from runtime.coordinator.state import CoordinatorState
from runtime.coordinator.token_stream import TokenStream
from runtime.errors import PipelineClosed, PipelineError
from runtime.logs import log_event
from runtime.memory.layouts import OutputShapes, shapes_of
from runtime.memory.payloads import Payloads
from runtime.topology import sources
from runtime.trace import RequestTrace
from runtime.wire.messages.control import Beat
from runtime.wire.messages.data import Fragment, Visit
from runtime.wire.messages.sequences import Sampling
from runtime.wire.wakeup import Wakeup

_log = logging.getLogger("runtime.coordinator")


class RequestIO(RequestEffects):
    """The requests of one coordinator. A fault of one request ends that request alone.

    Args:
        plan: the plan that the nodes execute.
        machine: the coordinator's state machine.
        payloads: the caller's side of shared memory.
        links: the data links to the nodes.
        inbox: passes events and effects to the coordinator's thread.
        replay: whether to hold inputs until the answer has arrived, so that another attempt can be made.
        trace: whether to record the stages that each request passes, with times.

    Attributes:
        lock: protects the machine, the links, the caller's shared memory, and the pending requests.
        answers: the answers that are not delivered yet.
        sequences: the sequences.
        wakeup: wakes the thread that receives results, to deliver answers.
        traced: the recorded requests and steps.
        inbox: passes events and calls to the coordinator's thread.
        stopped: whether sending has stopped.
        ended: whether all requests have ended, and no more are accepted.
        count: the number of requests so far.
    """

    def __init__(
        self,
        plan: Plan,
        machine: CoordinatorState,
        payloads: Payloads,
        links: DataLinks,
        inbox: Inbox,
        *,
        replay: bool,
        trace: bool,
    ) -> None:
        self.lock = threading.Lock()
        self.answers = AnswerQueue()
        self.wakeup = Wakeup()
        self.traced: list[RequestTrace] = []
        self.sequences = SequenceIO(plan, links, self.answers, self.traced if trace else None)
        self.stopped = False
        self.ended = False
        self._machine = machine
        self._payloads = payloads
        self.inbox = inbox
        self._replay = replay
        self._trace = trace
        self._reason: PipelineError | None = None
        self._entrances = {
            stage.index: tuple(name for name in stage.inputs if name in plan.inputs)
            for stage in plan.stages
            if CALLER in sources(plan, stage.index)
        }
        self._sender = links.sender
        self._pending: dict[int, Pending] = {}
        self.count = 0

    def submit(
        self,
        inputs: Mapping[str, Array],
        wanted: tuple[str, ...],
        cost: int,
        deadline_ns: int | None,
        done: Done,
        shapes: OutputShapes | None = None,
    ) -> int:
        """Submit a request, and return its number. ``inputs`` are copied before this returns.

        ``done`` is called once: in a thread of the coordinator's, or in this one when the request is refused at once.
        When this raises, the request is removed, and ``done`` is not called from then on. ``shapes`` is given for
        requests that recur: the same object for all inputs of these types and shapes.
        """
        number = -1
        try:
            with self.lock:
                number = self._machine.numbers.next()
                self.count += 1
                if self.stopped:
                    self.answers.add(done, Answer({}, self.reason))
                    pending = None
                else:
                    pending = self._decide(number, wanted, cost, deadline_ns, done)
                    if pending is not None:
                        self._reserve(pending, inputs, shapes)
            if pending is not None:
                self._place(pending, number, inputs)
                if deadline_ns is not None:
                    self.inbox.expect(deadline_ns)
            self._schedule_delivery()
        except BaseException:
            with self.lock:
                self._withdraw(number)
            raise
        return number

    def _decide(
        self, number: int, wanted: tuple[str, ...], cost: int, deadline_ns: int | None, done: Done
    ) -> Pending | None:
        """Pass a request to the machine, while the lock is held; None when it is refused."""
        now = time.monotonic_ns()
        pending = self._pending[number] = Pending(done, now)
        pending.enter = self._machine.enter(number, wanted, cost, deadline_ns, now)
        if pending.enter is None:
            self.handle(Submitted(number, wanted, cost, deadline_ns, now))
        return pending if number in self._pending else None

    def _reserve(self, pending: Pending, inputs: Mapping[str, Array], shapes: OutputShapes | None) -> None:
        """Find room for a request's inputs in shared memory, while the lock is held."""
        if shapes is not None and (outgoing := self._payloads.reserve_whole(shapes)) is not None:
            pending.outgoing = outgoing
        else:
            self._payloads.place(pending.outgoing, shapes_of(inputs), inputs)

    def _place(self, pending: Pending, number: int, inputs: Mapping[str, Array]) -> None:
        """Copy a request's inputs to the memory that nodes read, and begin the attempt that waits for that."""
        arrays = pending.outgoing.arrays
        for name, array in inputs.items():
            if name in arrays:
                arrays[name][...] = array
            else:
                arrays[name] = np.array(array, order="C")
        with self.lock:
            pending.placed = True
            if number not in self._pending or self.stopped:
                pending.outgoing.release()  # it was answered meanwhile
            elif pending.enter is not None:
                self._start(pending, pending.enter)

    def _withdraw(self, number: int) -> None:
        """Remove a request that could not be submitted, while the lock is held."""
        pending = self._pending.get(number)
        if pending is not None:
            pending.done = ignore
            self.handle(GivenUp(number))
            self._pending.pop(number, None)
            pending.outgoing.drop()  # also where it was lent: perhaps nobody was told, and a reader notices
        self._mend()

    def take_out(self, outputs: Collection[str]) -> list[Moved]:
        """Give up the requests that ask for nothing but these outputs, without an answer, so that others answer them.

        Nobody may submit requests meanwhile. Those whose inputs are not held to be sent again stay.
        """
        taken = []
        with self.lock:
            for number, pending in list(self._pending.items()) if self._replay else ():
                if moved := moved_request(pending, self._machine.requests.asked(number), outputs):
                    taken.append(moved)
                    pending.done = ignore
                    self.handle(GivenUp(number))
        return taken

    def _mend(self) -> None:
        """Repair the shared memory after an interrupt, while the lock is held."""
        self._payloads.mend([block for pending in self._pending.values() for block in pending.outgoing.blocks])

    def generate(
        self,
        stream: TokenStream,
        prompt: tuple[int, ...],
        max_tokens: int,
        sampling: Sampling,
        *,
        scores: bool,
        wait: bool,
        deadline_ns: int | None,
    ) -> int:
        """Submit a sequence, and return its number. Its tokens, or the reason why it is refused, go to the stream."""
        number, now = -1, time.monotonic_ns()
        try:
            with self.lock:
                if self.stopped:
                    stream.fail(self.reason)
                    return number
                number = self._machine.numbers.next()
                self.sequences.streams[number] = stream
                self.handle(SequenceSubmitted(number, prompt, max_tokens, sampling, scores, wait, deadline_ns, now))
            if deadline_ns is not None:
                self.inbox.expect(deadline_ns)
            self._schedule_delivery()
        except BaseException:
            self.give_up_later(number)
            raise
        return number

    def give_up(self, number: int) -> None:
        """Cancel a request or a sequence for its caller."""
        with self.lock:
            self.handle(GivenUp(number))
        self._schedule_delivery()

    def give_up_later(self, number: int) -> None:
        """The same, in the coordinator's thread. This takes no lock, so any code may call it at any time."""
        self.inbox.post(GivenUp(number))

    def _schedule_delivery(self) -> None:
        """Let the thread that receives results deliver new answers, so that an interrupt of this thread loses none.

        If that thread has ended, this one delivers them.
        """
        if not self.answers:
            return
        if self.stopped or self.answers.delivering:
            self.answers.deliver()
        else:
            self.wakeup.ring()

    @property
    def delivering(self) -> bool:
        """See :attr:`.AnswerQueue.delivering`."""
        return self.answers.delivering

    # Effects

    def handle(self, event: CoordinatorEvent) -> None:
        """Pass an event to the machine, while the lock is held; effects on nodes go to the inbox."""
        on_requests, on_nodes = self._machine.handle(event)
        self.perform_all(on_requests)
        if on_nodes:
            self.inbox.leave(on_nodes)

    def enter(self, enter: Enter) -> None:
        """Begin an attempt, now or as soon as the inputs are placed."""
        pending = self._pending[enter.request]
        pending.enter = enter
        if pending.placed:
            self._start(pending, enter)

    def end_attempt(self, request: int, attempt: int, reason: str) -> None:
        """Drop the outputs received for an attempt."""
        log_event(_log, logging.INFO, "attempt over", request=request, attempt=attempt, reason=reason)
        pending = self._pending[request]
        pending.enter = None
        pending.outputs = {}

    def resolve(self, request: int, visits: tuple[Visit, ...]) -> None:
        """Queue an answer with outputs."""
        pending = self._end(request)
        self.answers.add(pending.done, Answer(pending.outputs, visits=visits))
        if self._trace:
            self.traced.append(RequestTrace(request, pending.entered_ns, visits, time.monotonic_ns()))

    def reject(self, request: int, error: OnnxsplitError) -> None:
        """Queue an answer with an error."""
        if request in self.sequences.streams:
            self.sequences.reject(request, error)
            return
        log_event(_log, logging.INFO, "request failed", request=request, error=type(error).__name__, reason=error)
        self.answers.add(self._end(request).done, Answer({}, error))

    def enter_step(self, step: EnterStep) -> None:
        """Send a step; one that cannot be sent ends with the reason."""
        try:
            self.sequences.send(step)
        except Exception as error:
            self.handle(Unsendable(step.step, unsendable(error)))

    def emit(self, emit: Emit) -> None:
        """Give a sequence its next token."""
        self.sequences.emit(emit)

    def finish(self, finish: Finish) -> None:
        """End a sequence after its last token."""
        self.sequences.finish(finish)

    def _end(self, request: int) -> Pending:
        pending = self._pending.pop(request)
        if pending.placed:
            pending.outgoing.release()
        return pending

    def _start(self, pending: Pending, enter: Enter) -> None:
        """Begin an attempt, while the lock is held. What cannot be sent ends with the reason."""
        try:
            self._send(pending, enter)
        except Exception as error:
            self.handle(Unsendable(enter.request, unsendable(error)))

    def _send(self, pending: Pending, enter: Enter) -> None:
        """Send a request's inputs to the nodes of its route, while the lock is held."""
        outgoing, attempt = pending.outgoing, attempt_of(enter, time.monotonic_ns())
        readers = self._sender.readers(self._entrances.items(), attempt, outgoing)
        self._sender.send(readers, attempt, outgoing, CALLER, keep=True)
        if not self._replay:
            outgoing.release()

    def add_outputs(self, request: int, attempt: int, tensors: dict[str, Array], history: tuple[Visit, ...]) -> None:
        """Add tensors to the outputs of a request whose attempt is under way, while the lock is held."""
        self._pending[request].outputs.update(tensors)
        if not self._machine.settled:
            self.handle(Returned(request, attempt, tuple(tensors), history))
            return
        visits = self._machine.requests.complete(request, attempt, tuple(tensors), history)
        if visits is not None:
            self.resolve(request, visits)

    def take_step(self, fragment: Fragment, scores: Mapping[int, Array]) -> None:
        """Handle a step that has come back, while the lock is held.

        Args:
            fragment: the fragment of the last stage.
            scores: copies of the scores in it, by sequence.
        """
        held = self._payloads.hold((fragment,))
        self._payloads.give_back(fragment)
        if held:
            now = time.monotonic_ns()
            self.sequences.end_step(fragment, now, scores)
            self.handle(StepReturned(fragment.request, fragment.drawn, fragment.history, now))

    # State

    @property
    def reason(self) -> PipelineError:
        """Why no more requests are taken."""
        return self._reason or self._machine.error or PipelineClosed("the pipeline was closed")

    @property
    def beat(self) -> Beat:
        """Which requests and sequences nodes may forget.

        It is made under the lock; otherwise nodes could forget a request that is submitted meanwhile.
        """
        with self.lock:
            return Beat(self._machine.work.oldest, self._machine.work.kept)

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        with self.lock:
            try:
                return self._payloads.lent_bytes
            except BaseException:
                self._mend()
                raise

    # The end

    def stop(self) -> None:
        """Send nothing more; pending requests are kept until :meth:`fail`."""
        with self.lock:
            self.stopped = True
        self.wakeup.ring()

    def fail(self, reason: PipelineError) -> None:
        """End all pending requests with an error."""
        with self.lock:
            self.stopped = True
            self._reason = reason
            for pending in self._pending.values():
                self.answers.add(pending.done, Answer({}, reason))
            self._pending.clear()
            self.sequences.fail_all(reason)
            self.ended = True
            self._payloads.close()
            self.wakeup.close()
        self.answers.deliver()
