"""One request of a caller: the parts it runs as, and its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from onnxsplit.tensors import Array
from runtime.admission import Admission
from runtime.flow import Answer, Flow
from runtime.messages import Visit
from runtime.microbatch import Axes, join


@dataclass(frozen=True)
class Asked:
    """What asking for some outputs means.

    Attributes:
        names: as asked.
        computed: those that stages compute.
        passed: those that pass through.
        optional: inputs that need not be given.
        axes: to split and join along; None when such a request cannot be split.
    """

    names: tuple[str, ...]
    computed: tuple[str, ...]
    passed: tuple[str, ...]
    optional: frozenset[str]
    axes: Axes | None


class Answering(Future[dict[str, Array]]):
    """A caller's future; giving it up ends the request's work in the pipeline.

    Attributes:
        visits: where the request was, and when, once it is answered.
    """

    def __init__(self, give_up: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.visits: tuple[Visit, ...] = ()
        self._give_up = give_up

    def cancel(self) -> bool:
        """Give the request up; False when it is answered already."""
        if not super().cancel():
            return False
        self._give_up()
        return True


class Request:
    """A request of one or more parts. The first was admitted; the others enter while there is room, or as parts leave.

    A part that is done hands its place to the next, so that a batch always goes on.
    """

    def __init__(
        self,
        flow: Flow,
        entrance: Admission,
        parts: list[dict[str, Array]],
        asked: Asked,
        size: int,
        cost: int,
        deadline_ns: int | None,
        ready: dict[str, Array],
    ) -> None:
        self.future = Answering(self._give_up)
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
        self._failed = False
        self._answers: dict[int, Answer] = {}

    def enter(self) -> None:
        """Let the first part in, and as many more as there is room for."""
        self._next()
        while self._entered < len(self._parts) and self._entrance.enter(self._size, block=False):
            if not self._next():
                self._entrance.leave(self._size)

    def _next(self) -> bool:
        """Send the next part into the place that is held for it; False when there is none."""
        with self._lock:
            number = self._entered
            if self._failed or number == len(self._parts):
                return False
            self._entered += 1
        done = lambda answer: self._done(number, answer)  # noqa: E731
        sent = self._flow.submit(self._parts[number], self._asked.computed, self._cost, self._deadline_ns, done)
        self._numbers.append(sent)
        if self.future.cancelled():
            self._flow.give_up(sent)
        return True

    def _give_up(self) -> None:
        with self._lock:
            self._failed = True
        for number in list(self._numbers):
            self._flow.give_up(number)

    def _done(self, number: int, answer: Answer) -> None:
        with self._lock:
            if answer.error is not None:
                first, self._failed = not self._failed, True
            else:
                self._answers[number] = answer
                first = not self._failed and len(self._answers) == len(self._parts)
        if not self._next():
            self._entrance.leave(self._size)
        if not first or not self.future.set_running_or_notify_cancel():
            return
        if answer.error is not None:
            self.future.set_exception(answer.error)
            return
        answers = [self._answers[position] for position in range(len(self._parts))]
        self.future.visits = tuple(visit for answer in answers for visit in answer.visits)
        parts = [answer.outputs for answer in answers]
        found = parts[0] if len(parts) == 1 else join(parts, self._asked.axes or {})
        found.update(self._ready)
        self.future.set_result({name: found[name] for name in self._asked.names})
