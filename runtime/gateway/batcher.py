"""The way from the gateway into one pipeline: requests wait in line, are joined, run, and taken apart again.

All of it is called in the event loop's thread; only the copying of large tensors is done beside it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array, content_bytes
from runtime.errors import Busy, DeadlineExceeded, NodeFailed, NotSeparable, PipelineClosed, StageFailed
from runtime.gateway.counters import Counters
from runtime.gateway.errors import NotLoaded
from runtime.gateway.queue import Limits, QueuedRequest, RequestQueue
from runtime.microbatch import BatchAxes, join
from runtime.pipeline import Pipeline
from runtime.request import Answering, OutputSelection
from runtime.wire.messages.data import Visit

_LARGE_BYTES = 4 << 20  # copied beside the event loop
_AGAIN_S = 0.005
_log = logging.getLogger("runtime.gateway")


class Inference(Struct, eq=False):
    """A request on its way through.

    Attributes:
        inputs: name -> array.
        asked: what it means to the pipeline.
        rows: along the batch axis.
        answer: its outputs, to come.
        entered_ns: it went into the pipeline.
        ended_ns: its outputs were there.
        visits: where it was in the pipeline, and when.
    """

    inputs: Mapping[str, Array]
    asked: OutputSelection
    rows: int
    answer: asyncio.Future[dict[str, Array]]
    entered_ns: int = 0
    ended_ns: int = 0
    visits: tuple[Visit, ...] = ()


@dataclass(eq=False)
class _Execution:
    """Requests that went in together."""

    requests: list[QueuedRequest]
    entered_ns: int
    future: Answering | None = None
    rows: list[int] = field(default_factory=list)


class Batcher:
    """The line before one pipeline, and what is in the pipeline.

    Args:
        pipeline: a running one; nobody else should send much into it.
        limits: of the line.
        counters: counts executions.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, counters: Counters) -> None:
        self.queue = RequestQueue(limits)
        self._pipeline = pipeline
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._inside: set[_Execution] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.get_ident()
        self._results, take = pipeline.take_in_loop()
        self._loop.add_reader(self._results, take)
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed: OnnxsplitError | None = None

    @property
    def inside(self) -> int:
        """Executions in the pipeline."""
        return len(self._inside)

    async def run(
        self, inputs: Mapping[str, Array], outputs: tuple[str, ...], arrived_ns: int, deadline_ns: int | None
    ) -> tuple[dict[str, Array], Inference]:
        """Wait in line, run, and give the outputs.

        Args:
            inputs: name -> array; may be views of the message they came in.
            outputs: names of outputs.
            arrived_ns: when the request came.
            deadline_ns: it is worth nothing after.

        Raises:
            InputError: inputs or names do not fit the model.
            Busy: refused, with the reason.
            PipelineError: as for a pipeline.
        """
        asked = self._pipeline.check(inputs, outputs)
        if self._closed is not None:
            raise self._closed
        if (trouble := self._pipeline.trouble) is not None:
            raise NotLoaded(f"the model takes no requests: {trouble}")
        inference = Inference(inputs, asked, _rows(inputs, asked.axes), self._loop.create_future())
        request = QueuedRequest(
            key=self._key(inputs, outputs, asked),
            rows=inference.rows,
            size_bytes=sum(map(content_bytes, inputs.values())),
            arrived_ns=arrived_ns,
            deadline_ns=deadline_ns,
            subject=inference,
        )
        self._pump()  # what came before goes first, if there is room
        self.queue.join(request, alone=not self._inside)
        self._idle.clear()
        self._pump()
        expiry = None
        if deadline_ns is not None and not inference.answer.done():
            left_s = max(0, deadline_ns - time.monotonic_ns()) / 1e9
            expiry = self._loop.call_later(left_s, self._expire, request)
        try:
            return await inference.answer, inference
        except asyncio.CancelledError:
            self._give_up(request)
            raise
        finally:
            inference.inputs = {}  # an error that is the answer would hold them
            if expiry is not None:
                expiry.cancel()

    async def empty(self) -> None:
        """Wait until nobody is in line or in the pipeline."""
        await self._idle.wait()

    def refuse(self, reason: OnnxsplitError) -> None:
        """Take nothing more; who waits in line is told why."""
        self._closed = reason
        for request in list(self.queue):
            self._fail(request, reason)
        self._settle()

    def close(self) -> None:
        """Leave the pipeline, which may then be closed."""
        self._loop.remove_reader(self._results)
        os.close(self._results)

    def _key(self, inputs: Mapping[str, Array], outputs: tuple[str, ...], asked: OutputSelection) -> object:
        axes = asked.axes
        if self.queue.limits.max_batch < 2 or axes is None or not all(axes[name] is not None for name in inputs):
            return None
        if len({array.shape[axes[name] or 0] for name, array in inputs.items()}) > 1:  # the pipeline says what is wrong
            return None
        return outputs, tuple(
            (name, array.dtype, *(size for axis, size in enumerate(array.shape) if axis != axes[name]))
            for name, array in sorted(inputs.items())
        )

    def _pump(self) -> None:
        """Let requests in while there is room."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self.queue):
            now = time.monotonic_ns()
            for request in self.queue.late(now, alone=not self._inside):
                self._fail(
                    request, DeadlineExceeded("the answer could not have been there in the time the request had")
                )
            if len(self._inside) >= self._pipeline.inflight:
                break
            together = self.queue.next(now)
            if not together:
                due = self.queue.due_ns()
                if due is not None:
                    self._timer = self._loop.call_later(max(0, due - now) / 1e9, self._pump)
                break
            if not self._enter(together):
                self.queue.back(together)
                if not self._inside:  # what was given up has not left the pipeline yet
                    self._timer = self._loop.call_later(_AGAIN_S, self._pump)
                break
        self._settle()

    def _settle(self) -> None:
        if not len(self.queue) and not self._inside:
            self._idle.set()

    def _enter(self, requests: list[QueuedRequest]) -> bool:
        """Send requests into the pipeline as one; False when there is no room."""
        first: Inference = requests[0].subject
        passages: list[Inference] = [request.subject for request in requests]
        inside = _Execution(requests, time.monotonic_ns(), rows=[request.rows for request in requests])
        deadlines = [request.deadline_ns for request in requests]
        # The last one's: earlier ones are told at theirs.
        deadline = None if None in deadlines else max(deadline or 0 for deadline in deadlines)
        large = sum(request.size_bytes for request in requests) > _LARGE_BYTES
        send = functools.partial(self._submit, [inference.inputs for inference in passages], first.asked, deadline)
        self._inside.add(inside)
        if large:
            sending = self._loop.run_in_executor(None, send)
            sending.add_done_callback(lambda done: self._sent(inside, done))
            return True
        try:
            future = send()
        except Busy:
            self._inside.discard(inside)
            return False
        except Exception as error:  # whatever it is, those who wait hear of it
            self._loop.call_soon(self._ended, inside, error)
            return True
        self._await(inside, future)
        return True

    def _submit(self, inputs: list[Mapping[str, Array]], asked: OutputSelection, deadline_ns: int | None) -> Answering:
        return self._pipeline.enter(join(inputs, asked.axes or {}), asked, deadline_ns=deadline_ns, block=False)

    def _sent(self, inside: _Execution, sending: asyncio.Future[Answering]) -> None:
        """Large tensors were copied, or there was no room for them."""
        error = sending.exception()
        if isinstance(error, Busy):
            self._inside.discard(inside)
            self.queue.back([request for request in inside.requests if not request.subject.answer.done()])
            self._timer = self._timer or self._loop.call_later(_AGAIN_S, self._pump)
        elif error is not None:
            self._ended(inside, error)
        else:
            self._await(inside, sending.result())

    def _await(self, inside: _Execution, future: Answering) -> None:
        inside.future = future
        for request in inside.requests:
            request.subject.entered_ns = inside.entered_ns
        if all(request.subject.answer.done() for request in inside.requests):  # given up while they were copied
            future.cancel()
        future.add_done_callback(lambda _: self._heard(inside))

    def _heard(self, inside: _Execution) -> None:
        """An answer is there, in any thread."""
        if threading.get_ident() == self._thread:
            self._loop.call_soon(self._ended, inside, None)
        else:
            self._loop.call_soon_threadsafe(self._ended, inside, None)

    def _ended(self, inside: _Execution, error: BaseException | None) -> None:
        """The pipeline has answered, or not taken it. Everybody who went in together is answered, or goes in again."""
        if inside not in self._inside:
            return
        self._inside.discard(inside)
        try:
            self._settle_up(inside, error)
        except Exception as problem:
            _log.exception("an answer could not be given")
            for request in inside.requests:
                self._fail(request, problem)
        self._pump()

    def _settle_up(self, inside: _Execution, error: BaseException | None) -> None:
        now = time.monotonic_ns()
        rows = sum(inside.rows)
        future = inside.future
        if future is not None:
            error = PipelineClosed("given up") if future.cancelled() else future.exception()
        together = len(inside.requests) > 1
        if error is None and future is not None:
            self.queue.came_out(rows, inside.entered_ns, now)
            self._counters.ran(rows, now - inside.entered_ns)
            if not together or _separable(future.result(), inside, rows):
                self._deal(inside, future, now)
                return
            error = NotSeparable("the answer to a joined batch does not have the batch's rows")
        assert error is not None
        if together and isinstance(error, StageFailed | NodeFailed | NotSeparable):
            again = [request for request in inside.requests if not request.subject.answer.done()]
            for request in again:  # one of them is to blame: each by itself
                request.key = None
            self.queue.back(again)
            return
        for request in inside.requests:
            self._fail(request, error)

    def _deal(self, inside: _Execution, future: Answering, now: int) -> None:
        """Give everybody the rows that are theirs."""
        outputs = future.result()
        start = 0
        for request, rows in zip(inside.requests, inside.rows, strict=True):
            inference: Inference = request.subject
            inference.ended_ns = now
            inference.visits = future.visits
            mine = outputs
            if len(inside.requests) > 1:
                axes: BatchAxes = inference.asked.axes or {}
                mine = {
                    name: array if (axis := axes.get(name)) is None else _rows_of(array, axis, start, start + rows)
                    for name, array in outputs.items()
                }
            start += rows
            if not inference.answer.done():
                inference.answer.set_result(mine)

    def _fail(self, request: QueuedRequest, error: BaseException) -> None:
        self.queue.leave(request)
        if not request.subject.answer.done():
            request.subject.answer.set_exception(error)

    def _expire(self, request: QueuedRequest) -> None:
        """A request's time is up; what it runs with may go on for others."""
        if request.subject.answer.done():
            return
        if self.queue.leave(request):
            self._fail(request, DeadlineExceeded("the request's time ran out while it waited for the pipeline"))
            self._settle()
        elif any(request in inside.requests and len(inside.requests) > 1 for inside in self._inside):
            self._fail(request, DeadlineExceeded("the request's time ran out while it ran in a batch with others"))

    def _give_up(self, request: QueuedRequest) -> None:
        """Nobody waits for the answer any more."""
        if self.queue.leave(request):
            self._settle()
            return
        for inside in self._inside:
            alone = all(other is request or other.subject.answer.done() for other in inside.requests)
            if request in inside.requests and alone and inside.future is not None:
                inside.future.cancel()
                return


def _separable(outputs: Mapping[str, Array], inside: _Execution, rows: int) -> bool:
    """True when every output of a joined batch has the batch's rows, so that each request can be given its own."""
    axes: BatchAxes = inside.requests[0].subject.asked.axes or {}
    return all(
        (axis := axes.get(name)) is None or (axis < array.ndim and array.shape[axis] == rows)
        for name, array in outputs.items()
    )


def _rows_of(array: Array, axis: int, start: int, stop: int) -> Array:
    """Some rows along the batch axis."""
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _rows(inputs: Mapping[str, Array], axes: BatchAxes | None) -> int:
    """Along the batch axis; 1 without one."""
    for name, array in inputs.items():
        axis = axes[name] if axes is not None else None
        if axis is not None:
            return int(array.shape[axis])
    return 1
