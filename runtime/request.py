"""One request of a caller: the parts it runs as, and its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from onnxsplit.tensors import Array
from runtime.admission import Admission
from runtime.coordinator.answers import Answer
from runtime.coordinator.request_io import RequestIO, unsendable
from runtime.errors import PipelineError
from runtime.microbatch import BatchAxes, join
from runtime.wire.messages.data import Visit


@dataclass(frozen=True)
class OutputSelection:
    """What asking for some outputs means.

    Attributes:
        names: as asked.
        computed: those that stages compute.
        passed: those that pass through.
        optional: inputs that need not be given.
        defaults: those of them that have their default then.
        axes: to split and join along; None when such a request cannot be split.
    """

    names: tuple[str, ...]
    computed: tuple[str, ...]
    passed: tuple[str, ...]
    optional: frozenset[str]
    defaults: tuple[str, ...]
    axes: BatchAxes | None


class Answering(Future[dict[str, Array]]):
    """A caller's future; giving it up ends the request's work in the pipeline.

    Attributes:
        visits: where the request was, and when, once it is answered.
    """

    def __init__(self, give_up: Callable[[], None] = lambda: None, flow: RequestIO | None = None) -> None:
        super().__init__()
        self.visits: tuple[Visit, ...] = ()
        self._give_up = give_up
        self._flow = flow

    def cancel(self) -> bool:
        """Give the request up; False when it is answered already."""
        if not super().cancel():
            return False
        self._give_up()
        return True

    def result(self, timeout: float | None = None) -> dict[str, Array]:
        """The outputs, as soon as they are there.

        Raises:
            PipelineError: the request failed; or this is a callback of the pipeline, which would wait for itself.
        """
        self._check_waiting()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """How the request failed, as soon as it is known; None when it did not. Raises as :meth:`result` does."""
        self._check_waiting()
        return super().exception(timeout)

    def _check_waiting(self) -> None:
        if self._flow is not None and self._flow.delivering and not self.done():
            raise PipelineError(
                "a callback of a request cannot wait for another request: the thread that runs it brings the answers. "
                "Add a callback to that one, or wait in a thread of your own"
            )


class Request:
    """A request of one or more parts. The first was admitted; the others enter while there is room, or as parts leave.

    A part that is done hands its place to the next, so that a batch always goes on. Whatever goes wrong, every place
    that was taken is given back, and the future ends once.
    """

    def __init__(
        self,
        flow: RequestIO,
        entrance: Admission,
        parts: list[dict[str, Array]],
        asked: OutputSelection,
        size: int,
        cost: int,
        deadline_ns: int | None,
        ready: dict[str, Array],
    ) -> None:
        self.future = Answering(self._give_up, flow)
        self._flow = flow
        self._entrance = entrance
        self._parts = parts
        self._asked = asked
        self._size = size
        self._cost = cost
        self._deadline_ns = deadline_ns
        self._ready = ready
        self._lock = threading.Lock()
        self._entered = 0
        self._numbers: list[int] = []
        self.first_place = object()
        self._places = [self.first_place]
        self._place_of: dict[int, object] = {}  # parts that are under way
        self._ended = False
        self._answers: dict[int, Answer] = {}

    def enter(self) -> None:
        """Let the first part in, which has ``first_place``, and as many more as there is room for."""
        place = self.first_place
        while True:
            self._send_into(place)
            with self._lock:
                if self._ended or self._entered == len(self._parts):
                    return
            place = object()
            self._places.append(place)
            if not self._entrance.enter(place, self._size, block=False):
                return

    def abandon(self) -> None:
        """Leave nothing of a request whose caller was interrupted while it entered."""
        self._give_up()
        for place in self._places:
            self._entrance.leave(place)

    def _next(self) -> int | None:
        """The number of the part that enters next; None when there is none."""
        with self._lock:
            number = self._entered
            if self._ended or number == len(self._parts):
                return None
            self._entered += 1
            return number

    def _send_into(self, place: object) -> None:
        """Send the next part into a place that is taken; give that back when there is none, or it cannot be sent."""
        number = self._next()
        if number is None:
            self._entrance.leave(place)
            return
        self._place_of[number] = place
        done = lambda answer: self._done(number, answer)  # noqa: E731
        try:
            sent = self._flow.submit(self._parts[number], self._asked.computed, self._cost, self._deadline_ns, done)
            self._numbers.append(sent)
            if self.future.cancelled():
                self._flow.give_up(sent)
        except Exception as error:
            self._entrance.leave(place)
            self._end(unsendable(error))

    def _give_up(self) -> None:
        with self._lock:
            self._ended = True
        for number in list(self._numbers):
            self._flow.give_up(number)

    def _done(self, number: int, answer: Answer) -> None:
        """A part is over: its place goes on, and with the last one, or the first that failed, the future ends."""
        with self._lock:
            place = self._place_of.pop(number, None)
            if place is None:
                return  # it is over already
            if answer.error is None:
                self._answers[number] = answer
            whole = len(self._answers) == len(self._parts)
        if answer.error is None and not whole:
            self._send_into(place)
            return
        self._entrance.leave(place)  # no other part enters: all have, or this one has failed
        self._end(answer.error)

    def _end(self, error: BaseException | None) -> None:
        """End the future, with the joined outputs or an error, unless that has been done."""
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
        """The outputs asked for, of all parts, in order."""
        answers = [self._answers[position] for position in range(len(self._parts))]
        self.future.visits = tuple(visit for answer in answers for visit in answer.visits)
        found = join([answer.outputs for answer in answers], self._asked.axes or {})
        found.update(self._ready)
        return {name: found[name] for name in self._asked.names}
