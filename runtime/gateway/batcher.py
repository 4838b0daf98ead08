"""Requests on their way into one pipeline: they wait in a queue, are joined into batches, run, and are split again.

    run()  -> queue -> _dispatch -> _start -> pipeline -> _finish -> the rows of each request
                ^                     | Busy                 | a joined batch failed
                `--- put back --------+----------------------'

Every method is called in the event loop's thread. Only copies of large tensors are made in other threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Hashable, Mapping
from contextlib import suppress

from msgspec import Struct

from onnxsplit.errors import OnnxsplitError
from onnxsplit.tensors import Array, content_bytes
from runtime.errors import Busy, DeadlineExceeded, NodeFailed, NotSeparable, PipelineClosed, StageFailed
from runtime.gateway.counters import Counters
from runtime.gateway.errors import NotLoaded
from runtime.gateway.queue import Limits, QueuedRequest, RequestQueue
from runtime.gateway.threads import takes_long
from runtime.pipeline import Pipeline
from runtime.requests.microbatch import has_rows, join, row_count, rows_of
from runtime.requests.request import Answering, OutputSelection
from runtime.wire.messages.data import Visit

_log = logging.getLogger("runtime.gateway")


class Checked(Struct, frozen=True):
    """What the batcher knows of a request that fits the model, beside its tensors.

    Requests whose inputs have the same names, types and shapes, none of them strings, and that ask for the same
    outputs, have all of it in common.

    Attributes:
        selection: What the pipeline computes for the requested outputs.
        key: Requests with equal keys can be joined; None joins with nothing.
        rows: Rows along the batch axis; 1 without one.
        size_bytes: Bytes of the inputs.
    """

    selection: OutputSelection
    key: Hashable | None
    rows: int
    size_bytes: int


class Inference(Struct, eq=False):
    """A request that the batcher has accepted.

    Attributes:
        inputs: Arrays by input name.
        checked: What else is known of it.
        outputs: Arrays by output name, once there.
        refused_ns: Time at which the pipeline first had no room for the request; 0 if it always had.
        entered_ns: Time at which the request entered the pipeline.
        ended_ns: Time at which its outputs were there.
        visits: The nodes that executed it, with times.
    """

    inputs: Mapping[str, Array]
    checked: Checked
    outputs: asyncio.Future[dict[str, Array]]
    refused_ns: int = 0
    entered_ns: int = 0
    ended_ns: int = 0
    visits: tuple[Visit, ...] = ()


class _Execution(Struct, eq=False):
    """Requests that run in the pipeline as one batch of ``rows``."""

    requests: list[QueuedRequest]
    rows: int
    entered_ns: int
    future: Answering | None = None


class Batcher:
    """The queue before one pipeline, and the executions in the pipeline.

    Args:
        pipeline: A running pipeline. Its results are taken in this event loop from now on.
        limits: Limits of the queue and of batches.
        counters: Counters of the executions.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, counters: Counters) -> None:
        self.queue = RequestQueue(limits)
        self._pipeline = pipeline
        self._admission = pipeline.admission
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._executions: set[_Execution] = set()
        self._batch_timer: asyncio.TimerHandle | None = None
        self._waits_for_release = False  # one wait serves every refused request
        self._thread = threading.get_ident()
        self._results, take = pipeline.take_in_loop()
        self._loop.add_reader(self._results, take)
        self._emptied: asyncio.Event | None = None  # somebody waits for it
        self._closed: OnnxsplitError | None = None
        self._is_starting = False

    @property
    def executing(self) -> int:
        """Number of executions in the pipeline."""
        return len(self._executions)

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Checked:
        """Check a request against the model.

        Args:
            inputs: Arrays by input name.
            outputs: Names of the requested outputs.

        Raises:
            InputError: The inputs or names do not fit the model.
        """
        selection = self._pipeline.entrance.check(inputs, outputs)
        return Checked(
            selection,
            self._key(inputs, outputs, selection),
            row_count(inputs, selection.axes),
            sum(map(content_bytes, inputs.values())),
        )

    async def run(
        self, inputs: Mapping[str, Array], checked: Checked, arrived_ns: int, deadline_ns: int | None, priority: int = 0
    ) -> tuple[dict[str, Array], Inference]:
        """Run one request and return its outputs.

        Args:
            inputs: Arrays by input name. They may be views of the message that carried them.
            checked: What :meth:`check` returned for this request or its like.
            arrived_ns: Time at which the request arrived.
            deadline_ns: Time after which the answer is useless; None for no limit.
            priority: Priority of the request, as its client gave it.

        Raises:
            NotLoaded: The pipeline executes no requests now.
            Busy: The queue is full, or the deadline cannot be met.
            PipelineError: As for :meth:`runtime.Pipeline.submit`.
        """
        if self._closed is not None:
            raise self._closed
        if (trouble := self._pipeline.trouble) is not None:
            raise NotLoaded(f"the model takes no requests: {trouble}")
        inference = Inference(inputs, checked, self._loop.create_future())
        level = self.queue.limits.level(priority)
        request = QueuedRequest(
            checked.key, checked.rows, checked.size_bytes, arrived_ns, deadline_ns, inference, level
        )
        if len(self.queue):
            self._dispatch()  # requests that arrived earlier enter first, if there is room
        for other in self.queue.join(request, idle=not self._executions):
            self._fail(other, Busy("the queue is full, and a more important request has arrived; try again later"))
        self._dispatch()
        expiry = None
        if deadline_ns is not None and not inference.outputs.done():
            left_s = max(0, deadline_ns - time.monotonic_ns()) / 1e9
            expiry = self._loop.call_later(left_s, self._expire, request)
        try:
            return await inference.outputs, inference
        except asyncio.CancelledError:
            self._give_up(request)
            raise
        finally:
            inference.inputs = {}  # the traceback of an error would keep them
            if expiry is not None:
                expiry.cancel()

    async def empty(self) -> None:
        """Wait until no request is in the queue or in the pipeline."""
        while len(self.queue) or self._executions:
            self._emptied = self._emptied or asyncio.Event()
            await self._emptied.wait()

    def refuse(self, reason: OnnxsplitError) -> None:
        """Accept nothing more, and fail the queued requests with ``reason``."""
        self._closed = reason
        for request in list(self.queue):
            self._fail(request, reason)
        self._update_idle()

    def close(self) -> None:
        """Take no more results from the pipeline, which may then be closed."""
        self._loop.remove_reader(self._results)
        os.close(self._results)

    def _key(
        self, inputs: Mapping[str, Array], outputs: tuple[str, ...], selection: OutputSelection
    ) -> Hashable | None:
        """Requests with equal keys may be joined; None joins with nothing."""
        axes = selection.axes
        if self.queue.limits.max_batch < 2 or axes is None or not all(axes[name] is not None for name in inputs):
            return None
        if len({array.shape[axes[name] or 0] for name, array in inputs.items()}) > 1:  # the pipeline reports the error
            return None
        return outputs, tuple(
            (name, array.dtype, *(size for axis, size in enumerate(array.shape) if axis != axes[name]))
            for name, array in sorted(inputs.items())
        )

    def _dispatch(self) -> None:
        """Start executions while requests wait and the pipeline has room."""
        if self._batch_timer is not None:
            self._batch_timer.cancel()
            self._batch_timer = None
        while len(self.queue):
            now = time.monotonic_ns()
            for request in self.queue.late(now, idle=not self._executions):
                self._fail(request, DeadlineExceeded("the pipeline cannot answer in the time the request had left"))
            if len(self._executions) >= self._pipeline.inflight:
                break
            batch = self.queue.next(now)
            if not batch:
                due = self.queue.due_ns()
                if due is not None:
                    self._batch_timer = self._loop.call_later(max(0, due - now) / 1e9, self._dispatch)
                break
            if not self._start(batch):
                self.queue.put_back(batch)
                break
        self._update_idle()

    def _update_idle(self) -> None:
        if self._emptied is not None and not len(self.queue) and not self._executions:
            self._emptied.set()
            self._emptied = None

    def _start(self, requests: list[QueuedRequest]) -> bool:
        """Send requests into the pipeline as one; False when it has no room, and then its next release dispatches."""
        execution = _Execution(requests, sum([request.rows for request in requests]), time.monotonic_ns())
        releases = self._admission.releases
        self._executions.add(execution)
        inputs = [request.item.inputs for request in requests]  # taken here: a request that is given up loses its own
        if takes_long(copied_bytes=sum([request.size_bytes for request in requests])):
            sending = self._loop.run_in_executor(None, self._submit, requests, inputs)
            sending.add_done_callback(lambda done: self._sent(execution, done, releases))
            return True
        try:
            future = self._submit(requests, inputs)
        except Busy:
            self._executions.discard(execution)
            self._wait_for_release(execution, releases)
            return False
        except Exception as error:  # every waiting request gets the error
            self._loop.call_soon(self._finish, execution, error)
            return True
        self._await(execution, future)
        return True

    def _submit(self, requests: list[QueuedRequest], inputs: list[Mapping[str, Array]]) -> Answering:
        """Send requests into the pipeline as one."""
        first: Inference = requests[0].item
        selection = first.checked.selection
        joined, deadline_ns = inputs[0], requests[0].deadline_ns
        if len(requests) > 1:
            joined = join(inputs, selection.axes or {})
            deadlines = [request.deadline_ns for request in requests]
            # The latest deadline of all; requests with an earlier one expire by themselves.
            deadline_ns = None if None in deadlines else max(deadline or 0 for deadline in deadlines)
        return self._pipeline.entrance.enter(joined, selection, deadline_ns=deadline_ns, block=False)

    def _wait_for_release(self, refused: _Execution, releases: int) -> None:
        """Dispatch again once there have been more than ``releases`` releases, unless a wait is already under way."""
        for request in refused.requests:
            request.item.refused_ns = request.item.refused_ns or refused.entered_ns
        if not self._waits_for_release:
            self._waits_for_release = True
            self._admission.when_released(releases, self._released)

    def _released(self) -> None:
        """Called in any thread when the pipeline has room again."""
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._dispatch_released)

    def _dispatch_released(self) -> None:
        self._waits_for_release = False
        self._dispatch()

    def _sent(self, execution: _Execution, sending: asyncio.Future[Answering], releases: int) -> None:
        """Called when large tensors were copied into the pipeline, or it had no room for them."""
        error = sending.exception()
        if isinstance(error, Busy):
            self._executions.discard(execution)
            self.queue.put_back([request for request in execution.requests if not request.item.outputs.done()])
            self._wait_for_release(execution, releases)
            self._update_idle()
        elif error is not None:
            self._finish(execution, error)
        else:
            self._await(execution, sending.result())

    def _await(self, execution: _Execution, future: Answering) -> None:
        execution.future = future
        for request in execution.requests:
            request.item.entered_ns = execution.entered_ns
        if all(request.item.outputs.done() for request in execution.requests):  # given up while they were copied
            future.cancel()
        self._is_starting = True  # it may have been answered already
        future.add_done_callback(lambda _: self._answered(execution))
        self._is_starting = False

    def _answered(self, execution: _Execution) -> None:
        """Called in any thread when the pipeline has answered."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self._finish, execution, None)
        elif self._is_starting:
            self._loop.call_soon(self._finish, execution, None)
        else:
            self._finish(execution, None)

    def _finish(self, execution: _Execution, error: BaseException | None) -> None:
        """Answer the requests of an execution that has ended, or queue them again, and start the next one."""
        if execution not in self._executions:
            return
        self._executions.discard(execution)
        try:
            self._deliver(execution, error)
        except Exception as problem:
            _log.exception("an answer could not be given")
            for request in execution.requests:
                self._fail(request, problem)
        self._dispatch()

    def _deliver(self, execution: _Execution, error: BaseException | None) -> None:
        now = time.monotonic_ns()
        rows, future = execution.rows, execution.future
        if future is not None:
            error = PipelineClosed("given up") if future.cancelled() else future.exception()
        joined = len(execution.requests) > 1
        if error is None and future is not None:
            self.queue.completed(rows, execution.entered_ns, now)
            self._counters.ran(rows, now - execution.entered_ns)
            if not joined or has_rows(future.result(), execution.requests[0].item.checked.selection.axes, rows):
                self._split(execution, future, now)
                return
            error = NotSeparable("the answer to a joined batch does not have the batch's rows")
        assert error is not None
        if joined and isinstance(error, StageFailed | NodeFailed | NotSeparable):
            remaining = [request for request in execution.requests if not request.item.outputs.done()]
            for request in remaining:  # one of them is the cause, so each runs alone now
                request.key = None
            self.queue.put_back(remaining)
            return
        for request in execution.requests:
            self._fail(request, error)

    def _split(self, execution: _Execution, future: Answering, now: int) -> None:
        """Give each request its rows of the outputs."""
        outputs = future.result()
        self._counters.slowest.ran(future.visits)
        start = 0
        for request in execution.requests:
            inference: Inference = request.item
            rows = request.rows
            inference.ended_ns = now
            inference.visits = future.visits
            own = outputs
            if len(execution.requests) > 1:
                axes = inference.checked.selection.axes or {}
                own = {name: rows_of(array, axes.get(name), start, start + rows) for name, array in outputs.items()}
            start += rows
            if not inference.outputs.done():
                inference.outputs.set_result(own)

    def _fail(self, request: QueuedRequest, error: BaseException) -> None:
        self.queue.leave(request)
        if not request.item.outputs.done():
            request.item.outputs.set_exception(error)

    def _expire(self, request: QueuedRequest) -> None:
        """Fail a request at its deadline. Its batch may continue for the other requests."""
        if request.item.outputs.done():
            return
        if self.queue.leave(request):
            self._fail(request, DeadlineExceeded("the request's time ran out while it waited for the pipeline"))
            self._update_idle()
        elif any(request in execution.requests and len(execution.requests) > 1 for execution in self._executions):
            self._fail(request, DeadlineExceeded("the request's time ran out while it ran in a batch with others"))

    def _give_up(self, request: QueuedRequest) -> None:
        """Cancel a request whose client no longer waits."""
        if self.queue.leave(request):
            self._update_idle()
            return
        for execution in self._executions:
            alone = all(other is request or other.item.outputs.done() for other in execution.requests)
            if request in execution.requests and alone and execution.future is not None:
                execution.future.cancel()
                return
