"""The entrance of a pipeline: checks requests, admits them, and sends them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from weakref import WeakSet

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array, content_bytes
from runtime.balance.policies import cost_of
from runtime.coordinator.request_io import RequestIO
from runtime.errors import PipelineClosed
from runtime.requests.admission import Admission
from runtime.requests.checks import RequestCheck
from runtime.requests.microbatch import ordinary_bytes
from runtime.requests.normalize import normal_inputs, normal_names, normal_timeout_ns
from runtime.requests.ordinary import OrdinaryRequests, WholeRequest
from runtime.requests.request import Answering, Enterable, OutputSelection, Request

OnRequest = Callable[[Mapping[str, Array], tuple[str, ...]], None]


def deadline_of(timeout: object) -> int | None:
    """The deadline of a request that begins now, by ``time.monotonic_ns``; None for no timeout.

    Raises:
        InputError: the timeout is not a number of seconds above 0 and at most a year.
    """
    limit_ns = normal_timeout_ns(timeout)
    return None if limit_ns is None else time.monotonic_ns() + limit_ns


class Entrance:
    """Takes the requests of one pipeline. Its methods can be called from any number of threads.

    Args:
        plan: the plan that the pipeline runs.
        check: the requests that its model accepts.
        admission: limits the requests in flight.
        request_io: sends requests to the nodes.

    Attributes:
        in_parts: the futures of requests in several parts, of which later ones enter when earlier ones have ended.
        on_request: called with the inputs of each request and the names of its outputs, before it enters; None calls
            nothing.
    """

    def __init__(self, plan: Plan, check: RequestCheck, admission: Admission, request_io: RequestIO) -> None:
        self._check = check
        self._admission = admission
        self._request_io = request_io
        self._ordinary_bytes = ordinary_bytes(plan)
        self._kinds = OrdinaryRequests()
        self._closed = False
        self.in_parts: WeakSet[Future[dict[str, Array]]] = WeakSet()
        self.on_request: OnRequest | None = None

    def close(self) -> None:
        """Accept no more requests."""
        self._closed = True

    def check_open(self) -> None:
        """Check that the pipeline is open and belongs to this process.

        Raises:
            PipelineClosed, PipelineError: it is not, or it does not.
        """
        if self._closed:
            raise PipelineClosed("the pipeline was closed")
        self.check_process()

    def check_process(self) -> None:
        """Check that the pipeline belongs to this process, and not to one that this is a fork of.

        Raises:
            PipelineError: it does not.
        """
        self._request_io.inbox.check_process()

    @property
    def is_own(self) -> bool:
        """Whether the pipeline belongs to this process."""
        return os.getpid() == self._request_io.inbox.pid

    def later(self, function: Callable[[], object]) -> None:
        """Call a function soon, in a thread of the pipeline; see :meth:`.Inbox.call`."""
        self._request_io.inbox.call(function)

    def submit(self, inputs: object, outputs: object, deadline_ns: int | None, *, block: bool) -> Answering:
        """Submit a request with the arguments of its caller; see :meth:`runtime.pipeline.Pipeline.submit`."""
        return self._admit(self.prepare(inputs, outputs, deadline_ns), deadline_ns, block=block)

    def is_ordinary(self, inputs: object, outputs: object) -> bool:
        """Whether :meth:`prepare` is done in microseconds, because the like of the request was checked before."""
        return self._kinds.find(self._check.named(inputs), outputs) is not None

    def prepare(self, inputs: object, outputs: object, deadline_ns: int | None) -> Enterable:
        """Check a request with the arguments of its caller; it can then be admitted, and enter.

        Raises:
            InputError: inputs or names do not fit the model.
            PipelineClosed, PipelineError: as :meth:`check_open`.
        """
        self.check_open()
        inputs = self._check.named(inputs)
        kind = self._kinds.find(inputs, outputs)
        if kind is not None:
            assert isinstance(inputs, dict)
            if self.on_request is not None:
                self.on_request(inputs, kind.selection.names)
            return WholeRequest(self._request_io, self._admission, kind, inputs, deadline_ns)
        names = normal_names(outputs)
        arrays = normal_inputs(inputs, self._check.specs, self._check.required)
        return self._prepared(arrays, self.check(arrays, names), deadline_ns, asked=names is not None)

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...] | None = None) -> OutputSelection:
        """Check a request against the model; returns how its outputs are obtained.

        Args:
            inputs: its inputs, normalised.
            outputs: the names of its outputs; all outputs of the model when None.

        Raises:
            InputError: inputs or names do not fit the model.
        """
        return self._check.check(inputs, outputs)

    def own(self, selection: OutputSelection) -> OutputSelection:
        """What :meth:`check` returns here for a request that was checked, perhaps against another plan of the model.

        Raises:
            InputError: the request names a tensor that this plan does not send between stages.
        """
        return self._check.select(selection.names)

    def forget(self, tensors: Collection[str]) -> None:
        """Say to those that ask for one of these tensors that an earlier plan has sent it between stages."""
        self._check.former = frozenset(tensors)

    def recent_kinds(self, most: int) -> list[tuple[tuple[str, ...], dict[str, tuple[int, ...]]]]:
        """The names of outputs, and the shapes of inputs, of the kinds of requests that came first lately."""
        return [
            (kind.selection.names, {name: shape for name, (_, shape) in kind.shapes.items()})
            for kind in self._kinds.latest(most)
        ]

    def enter(
        self,
        arrays: Mapping[str, Array],
        selection: OutputSelection,
        *,
        deadline_ns: int | None,
        block: bool,
    ) -> Answering:
        """Submit inputs that are normalised (:mod:`runtime.requests.normalize`) and have passed :meth:`check`.

        Args:
            arrays: the inputs by name.
            selection: what :meth:`check` has returned.
            deadline_ns: the request's deadline, by the host's monotonic clock; None for no deadline.
            block: whether to wait for a place in the pipeline.

        Raises:
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        self.check_open()
        kind = self._kinds.find(arrays, selection.names)
        if kind is not None:
            if self.on_request is not None:
                self.on_request(arrays, selection.names)
            request: Enterable = WholeRequest(self._request_io, self._admission, kind, arrays, deadline_ns)
        else:
            request = self._prepared(arrays, selection, deadline_ns)
        return self._admit(request, deadline_ns, block=block)

    def _prepared(
        self, arrays: Mapping[str, Array], selection: OutputSelection, deadline_ns: int | None, *, asked: bool = True
    ) -> Enterable:
        """A request that was checked; ``asked`` tells whether the caller has named the outputs."""
        if self.on_request is not None:
            self.on_request(arrays, selection.names)
        parts, ready = self._check.prepare(arrays, selection)
        size = sum(map(content_bytes, parts[0].values())) if parts else 0
        cost = cost_of(sum(array.nbytes for array in parts[0].values()), self._ordinary_bytes) if parts else 0
        if len(parts) == 1 and parts[0].keys() == arrays.keys() and not ready:
            kind = self._kinds.learn(arrays, selection, asked=asked, size=size, cost=cost)
            if kind is not None:
                return WholeRequest(self._request_io, self._admission, kind, arrays, deadline_ns)
        request = Request(self._request_io, self._admission, parts, selection, size, cost, deadline_ns, ready)
        if len(parts) > 1:
            self.in_parts.add(request.future)
            request.future.add_done_callback(self.in_parts.discard)
        return request

    def _admit(self, request: Enterable, deadline_ns: int | None, *, block: bool) -> Answering:
        """Let a request enter when it is admitted."""
        if request.future.done():  # no stage needs to run
            return request.future
        waits = block and not self._request_io.delivering  # the thread of callbacks frees the places
        try:
            self._admission.admit(request.place, request.size, deadline_ns=deadline_ns, block=waits)
            request.enter()
        except BaseException:
            request.abandon()
            raise
        return request.future
