"""Receives the nodes' results: outputs, failures and load."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from onnxsplit.errors import one_line
from onnxsplit.tensors import Array
from runtime.balance.router import Router
from runtime.coordinator.data_links import DataLinks
from runtime.coordinator.events import Reported, Unsendable
from runtime.coordinator.inbox import Inbox
from runtime.coordinator.request_io import RequestIO
from runtime.coordinator.state import CoordinatorState
from runtime.errors import MemoryWithdrawn, PipelineError, ProtocolError, StageFailed
from runtime.logs import DropLog
from runtime.memory.lanes import Taken
from runtime.memory.payloads import Payloads
from runtime.memory.signatures import visits_of
from runtime.wire import codec
from runtime.wire.links import Inlet
from runtime.wire.messages.data import Failed, Fragment, Receipt, Started
from runtime.wire.sockets import Sockets

_log = logging.getLogger("runtime.coordinator")
_drops = DropLog(_log)
_WORDS = 500
_MOST_AT_ONCE = 64  # entries of each lane that are taken before answers are delivered, and rounds of an event loop
_LOOK_S = 0.2  # after this time the thread looks at its lanes, in case that a doorbell was lost
_MOST_FAULTS = 100  # messages in a row that cannot be handled, after which the pipeline ends


class ResultTaker:
    """Receives results in a thread of its own, or in an event loop of the caller's.

    Args:
        requests: the requests that wait for them.
        links: records what nodes on other hosts have begun.
        machine: the coordinator's state machine. It is read here, and changed only through ``requests``.
        payloads: the caller's side of shared memory.
        router: records the load of nodes.
        inbox: is told when results can no longer be received.
        sockets: the sockets for results.
        data: the inlet for results.
    """

    def __init__(
        self,
        requests: RequestIO,
        links: DataLinks,
        machine: CoordinatorState,
        payloads: Payloads,
        router: Router,
        inbox: Inbox,
        sockets: Sockets,
        data: Inlet,
    ) -> None:
        self._requests = requests
        self._links = links
        self._machine = machine
        self._payloads = payloads
        self._router = router
        self._inbox = inbox
        self._sockets = sockets
        self._data = data
        self._faults = 0
        self._is_handed_over = False  # whether an event loop receives results
        self._taking = threading.Lock()  # held by an event loop while it uses the sockets
        self._thread_ended = threading.Event()
        self._thread = threading.Thread(target=self._take_results, name="results", daemon=True)
        sockets.watch(requests.wakeup.fileno())

    def start(self) -> None:
        """Receive results in a thread, until :meth:`end` or :meth:`hand_over`."""
        self._thread.start()

    def end(self) -> None:
        """Wait until no thread uses the sockets. The requests must have been stopped before."""
        with self._taking:
            pass
        self._thread.join()

    def hand_over(self) -> tuple[int, Callable[[], None]]:
        """End the thread, so that an event loop receives results. That saves waking the thread and then the loop.

        Returns:
            a descriptor, which the caller watches and closes, and a function to call whenever it is readable.
        """
        self._is_handed_over = True
        self._requests.wakeup.ring()
        self._thread_ended.wait()
        self._requests.wakeup.ring()  # so that the loop looks at the lanes, and asks for a doorbell
        return os.dup(self._sockets.fileno()), self._take_waiting

    def _take_results(self) -> None:
        requests = self._requests
        try:
            while not (requests.stopped or self._is_handed_over):
                ready = self._sockets.wait(_LOOK_S if self._payloads.lanes.fall_asleep() else 0.0)
                self._payloads.lanes.wake_up()
                self._take_and_deliver(ready)
        except BaseException as error:
            self._inbox.fail(error)
        finally:
            self._thread_ended.set()

    def _take_waiting(self) -> None:
        """Receive all messages that have arrived, in the thread of an event loop."""
        requests = self._requests
        try:
            with self._taking:
                if requests.stopped:  # the sockets may be closed
                    return
                self._payloads.lanes.wake_up()
                for _ in range(_MOST_AT_ONCE):
                    found = self._take_and_deliver(self._sockets.wait(0.0))
                    if requests.stopped or (not found and self._payloads.lanes.fall_asleep()):
                        return
                requests.wakeup.ring()  # there may be more, but the loop has other work, too
        except BaseException as error:
            self._inbox.fail(error)

    def _take_and_deliver(self, ready: set[object]) -> bool:
        """Take one message and the entries that wait, and deliver all answers; False when there was no message.

        Nothing that was taken is a local variable here: an error that a caller's function raises, and keeps, keeps the
        variables of all functions that called it.
        """
        wakeup, answers = self._requests.wakeup, self._requests.answers
        if wakeup.fileno() in ready:
            wakeup.clear()
        found = self._take_one(ready)
        self._take_from_lanes()
        if answers:
            answers.deliver()
        return found

    def _take_one(self, ready: set[object]) -> bool:
        """Receive one message from the ready sockets; False when there is none.

        A message that cannot be handled is dropped. After many such messages in a row, the pipeline ends.
        """
        message = self._data.receive(ready)
        if message is None:
            return False
        try:
            self._take(*message)
            self._faults = 0
        except Exception:
            self._faults += 1
            if self._faults > _MOST_FAULTS:
                raise
            _log.exception("a message could not be handled")
        return True

    def _take_from_lanes(self) -> None:
        """Take the entries that wait in lanes, all of them under one lock."""
        batch: list[tuple[Taken, dict[str, Array] | None]] = []
        for lane in self._payloads.lanes.incoming:
            try:
                for _ in range(_MOST_AT_ONCE):
                    taken = lane.take()
                    if taken is None:
                        break
                    try:
                        batch.append((taken, self._copies(taken)))
                    except MemoryError:
                        self._copy(*self._payloads.lift(taken))
            except ProtocolError as error:
                _drops.note(error)
        if batch:
            with self._requests.lock:
                for taken, copies in batch:
                    self._end_entry(taken, copies)

    def _copies(self, taken: Taken) -> dict[str, Array] | None:
        """Copies of the tensors of an entry; None if no request waits for them."""
        if not self._is_under_way(taken.entry.request, taken.entry.attempt):
            return None
        return {name: tensor.copy() for name, tensor in taken.known.tensors(taken.entry).items()}

    def _is_under_way(self, request: int, attempt: int) -> bool:
        return self._machine.requests.attempt(request) == attempt

    def _end_entry(self, taken: Taken, copies: dict[str, Array] | None) -> None:
        """Give a request the copies that were made of an entry, while the lock is held."""
        entry, known = taken.entry, taken.known
        held = known.holds(entry)
        self._payloads.return_slot(known.sender, entry)
        if held and copies is not None and self._is_under_way(entry.request, entry.attempt):
            try:
                self._requests.add_outputs(entry.request, entry.attempt, copies, visits_of(entry.visits))
            except ProtocolError as error:
                _drops.note(error)

    def _take(self, header: codec.Buffer, frames: list[codec.Buffer]) -> None:
        requests = self._requests
        try:
            said = codec.decode_data(header)
            match said:
                case Fragment():
                    if said.rows:
                        self._collect_step(said, frames)
                    else:
                        self._collect(said, frames)
                case Failed():
                    with requests.lock:
                        requests.handle(Reported(said))
                case Receipt():
                    with requests.lock:
                        self._router.told(said, time.monotonic_ns())
                case Started(request, attempt, sender):
                    self._links.started[sender] = request, attempt
        except ProtocolError as error:
            _drops.note(error)

    def _collect(self, fragment: Fragment, frames: list[codec.Buffer]) -> None:
        """Copy the tensors of a fragment: the caller's arrays are its own, and not tied to a node's memory."""
        requests = self._requests
        try:
            tensors = self._payloads.receive(fragment, frames)
        except MemoryWithdrawn:
            raise  # the attempt is repeated
        except Exception as error:
            with requests.lock:
                requests.handle(Unsendable(fragment.request, _unreadable(fragment, error), fragment.attempt))
            return
        self._payloads.lanes.learn(fragment)
        self._copy(fragment, tensors)

    def _copy(self, fragment: Fragment, tensors: Mapping[str, Array]) -> None:
        """Give a request copies of the tensors of a fragment."""
        requests = self._requests
        copies, problem = None, None
        if self._is_under_way(fragment.request, fragment.attempt):
            try:
                copies = {name: np.array(tensor) for name, tensor in tensors.items()}
            except MemoryError as error:
                problem = _unreadable(fragment, error)
        with requests.lock:
            held = self._payloads.hold((fragment,))
            self._payloads.give_back(fragment)
            if held and copies is not None and self._is_under_way(fragment.request, fragment.attempt):
                requests.add_outputs(fragment.request, fragment.attempt, copies, fragment.history)
            elif problem is not None:
                requests.handle(Unsendable(fragment.request, problem, fragment.attempt))

    def _collect_step(self, fragment: Fragment, frames: list[codec.Buffer]) -> None:
        """Take a step that has come back. It has tensors only where callers asked for scores."""
        requests = self._requests
        try:
            tensors = self._payloads.receive(fragment, frames)
            scores = requests.sequences.scores_of(fragment, tensors) if tensors else {}
        except MemoryWithdrawn:
            raise  # the sequences are replayed
        except Exception as error:
            with requests.lock:
                requests.handle(Unsendable(fragment.request, _unreadable(fragment, error), fragment.attempt))
            return
        with requests.lock:
            requests.take_step(fragment, scores)


def _unreadable(fragment: Fragment, error: Exception) -> PipelineError:
    """The error for a request when the outputs of a stage cannot be read."""
    told = StageFailed(
        f"the outputs of stage {fragment.source} cannot be read: {type(error).__name__}: {one_line(error, _WORDS)}"
    )
    told.__cause__ = error
    return told
