"""One request of a caller: its parts and its future."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from onnxsplit.tensors import Array
from runtime.coordinator.answers import Answer
from runtime.coordinator.pending import unsendable
from runtime.coordinator.request_io import RequestIO
from runtime.errors import PipelineError
from runtime.requests.admission import Admission
from runtime.requests.microbatch import BatchAxes, join
from runtime.wire.messages.data import Visit


@dataclass(frozen=True)
class OutputSelection:
    """The outputs that a request asks for, and how each is obtained.

    Attributes:
        names: the outputs, as the caller named them.
        computed: those of them that stages compute.
        passed: those of them that are an input of the model or a constant.
        optional: the inputs that need not be given.
        defaults: those of the optional inputs that have their default when they are not given.
        axes: the axes along which to split and join; None when such a request cannot be split.
    """

    names: tuple[str, ...]
    computed: tuple[str, ...]
    passed: tuple[str, ...]
    optional: frozenset[str]
    defaults: tuple[str, ...]
    axes: BatchAxes | None


class _FutureCondition(threading._CRLock):  # type: ignore[name-defined,misc]
    """The condition of a future, which no interrupt of a thread that waits can leave locked.

    :class:`threading.Condition` is entered by a function in Python, and a signal handler that raises there, such as
    Ctrl-C, leaves it locked for ever. The thread that delivers answers would then wait for it. This one is entered by a
    function in C.
    """

    def __init__(self) -> None:
        self._waiting: threading.Condition | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until :meth:`notify_all` is called; the condition must be locked."""
        if self._waiting is None:
            self._waiting = threading.Condition(self)
        return self._waiting.wait(timeout)

    def notify_all(self) -> None:
        """Wake all that wait; the condition must be locked."""
        waiting, self._waiting = self._waiting, None  # also breaks the circle of references
        if waiting is not None:
            waiting.notify_all()


class Answering(Future[dict[str, Array]]):
    """The future of one request. Cancelling it ends the request's work in the pipeline.

    Attributes:
        visits: the stages that the request passed, with times; empty before it is answered.
    """

    def __init__(self, give_up: Callable[[], None] = lambda: None, request_io: RequestIO | None = None) -> None:
        super().__init__()
        self._condition = _FutureCondition()
        self.visits: tuple[Visit, ...] = ()
        self._on_cancel = give_up
        self._request_io = request_io

    def cancel(self) -> bool:
        """Cancel the request; returns False if it was already answered."""
        if self._request_io is not None:
            self._request_io.inbox.check_process()
        if not super().cancel():
            return False
        self._give_up()
        return True

    def _give_up(self) -> None:
        """End the work of the request, because the future was cancelled."""
        self._on_cancel()

    def result(self, timeout: float | None = None) -> dict[str, Array]:
        """Wait for the outputs.

        Raises:
            PipelineError: the request failed, or this was called in a callback of the pipeline, which would wait for
                itself.
            TimeoutError: there was no answer in ``timeout`` seconds.
        """
        self._check_waiting()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the answer; returns the request's error, or None. It raises as :meth:`result` does."""
        self._check_waiting()
        return super().exception(timeout)

    def _check_waiting(self) -> None:
        if self._request_io is None or self.done():
            return
        self._request_io.inbox.check_process()
        if self._request_io.delivering:
            raise PipelineError(
                "a callback of a request cannot wait for another request: its thread delivers the answers. "
                "Add a callback to that one, or wait in a thread of your own"
            )


class Enterable(Protocol):
    """A request that was checked, and is not admitted yet.

    Attributes:
        future: gets the outputs, or the error. It is done already where no stage needs to run.
        place: what the admission knows the request by.
        size: bytes of the tensors that it needs room for at first.
    """

    @property
    def future(self) -> Answering: ...  # noqa: D102

    @property
    def place(self) -> object: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def whole_size(self) -> int:
        """Bytes of all tensors, of which :meth:`enter` may copy all at once."""

    def enter(self) -> None:
        """Send the request; its place has been admitted."""

    def abandon(self) -> None:
        """End the request, and give its place back, because its caller was interrupted before it had entered."""


class Request:
    """A request of one or more parts. The caller admits the first; others enter while there is room, or as parts end.

    A part that has ended passes its place to the next, so a batch always makes progress. Whatever fails, every place is
    given back, and the future is resolved once.

    Args:
        request_io: sends parts to the nodes.
        admission: gives places to parts.
        parts: the inputs of each part, by name; without parts, the future is done at once.
        selection: the outputs that the caller asks for.
        size: as below.
        cost: cost of one part, in thousandths of an ordinary request.
        deadline_ns: the request's deadline; None for no deadline.
        ready: the outputs that pass through.

    Attributes:
        future: gets the outputs, or the error.
        place: the place of the first part.
        size: bytes of the tensors of one part.
    """

    def __init__(
        self,
        request_io: RequestIO,
        admission: Admission,
        parts: list[dict[str, Array]],
        selection: OutputSelection,
        size: int,
        cost: int,
        deadline_ns: int | None,
        ready: dict[str, Array],
    ) -> None:
        self.future = Answering(self._give_up, request_io)
        self._request_io = request_io
        self._admission = admission
        self._parts = parts
        self._selection = selection
        self.size = size
        self._cost = cost
        self._deadline_ns = deadline_ns
        self._ready = ready
        self._lock = threading.Lock()
        self._entered = 0
        self._numbers: list[int] = []
        self.place = object()
        self._places = [self.place]
        self._place_of: dict[int, object] = {}  # parts that are under way
        self._ended = False
        self._answers: dict[int, Answer] = {}
        if not parts:
            self._end(None)

    @property
    def whole_size(self) -> int:
        """Bytes of the tensors of all parts."""
        return self.size * len(self._parts)

    def enter(self) -> None:
        """Send the first part, which has been admitted, and further parts while there is room."""
        place = self.place
        while True:
            self._send_into(place)
            with self._lock:
                if self._ended or self._entered == len(self._parts):
                    return
            place = object()
            self._places.append(place)
            if not self._admission.enter(place, self.size, block=False):
                return

    def abandon(self) -> None:
        """End a request whose caller was interrupted while it entered, and give all its places back."""
        self._give_up()
        for place in self._places:
            self._admission.leave(place)

    def _next(self) -> int | None:
        """The number of the part that enters next; None when there is none."""
        with self._lock:
            number = self._entered
            if self._ended or number == len(self._parts):
                return None
            self._entered += 1
            return number

    def _send_into(self, place: object) -> None:
        """Send the next part, on a place that was taken; give the place back if there is none or sending fails."""
        number = self._next()
        if number is None:
            self._admission.leave(place)
            return
        self._place_of[number] = place
        done = lambda answer: self._done(number, answer)  # noqa: E731
        try:
            sent = self._request_io.submit(
                self._parts[number], self._selection.computed, self._cost, self._deadline_ns, done
            )
            self._numbers.append(sent)
            with self._lock:
                ended = self._ended
            if ended:  # the future was cancelled, or another part has failed
                self._request_io.give_up(sent)
        except Exception as error:
            self._admission.leave(place)
            self._end(unsendable(error))

    def _give_up(self) -> None:
        with self._lock:
            self._ended = True
        for number in list(self._numbers):
            self._request_io.give_up(number)

    def _done(self, number: int, answer: Answer) -> None:
        """A part has ended: the next one gets its place. The last part, or the first that failed, ends the future."""
        with self._lock:
            place = self._place_of.pop(number, None)
            if place is None:
                return  # the request has already ended
            if answer.error is None:
                self._answers[number] = answer
            whole = len(self._answers) == len(self._parts)
        if answer.error is None and not whole:
            self._send_into(place)
            return
        self._admission.leave(place)  # no other part enters: all have entered, or this one has failed
        self._end(answer.error)

    def _end(self, error: BaseException | None) -> None:
        """End the future, with the joined outputs or an error; nothing happens when it has ended."""
        with self._lock:
            first, self._ended = not self._ended, True
        if not first or not self.future.set_running_or_notify_cancel():
            return
        try:
            outputs = self._joined() if error is None else {}
        except Exception as problem:
            error = problem
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(outputs)

    def _joined(self) -> dict[str, Array]:
        """The outputs that the caller asked for, of all parts, in order."""
        answers = [self._answers[position] for position in range(len(self._parts))]
        self.future.visits = tuple(visit for answer in answers for visit in answer.visits)
        outputs = join([answer.outputs for answer in answers], self._selection.axes or {}) if answers else {}
        outputs.update(self._ready)
        return {name: outputs[name] for name in self._selection.names}
