"""The entrance of a pipeline: checks requests, admits them, and sends them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from onnxsplit.plan import Plan
from onnxsplit.tensors import Array, content_bytes
from runtime.balance.policies import cost_of
from runtime.coordinator.request_io import RequestIO
from runtime.errors import PipelineClosed, PipelineError
from runtime.requests.admission import Admission
from runtime.requests.checks import RequestCheck
from runtime.requests.microbatch import ordinary_bytes
from runtime.requests.normalize import normal_inputs, normal_names
from runtime.requests.ordinary import Ordinary, OrdinaryRequests, WholeRequest
from runtime.requests.request import Answering, OutputSelection, Request


class Entrance:
    """Takes the requests of one pipeline. Its methods can be called from any number of threads.

    Args:
        plan: the plan that the pipeline runs.
        check: the requests that its model accepts.
        admission: limits the requests in flight.
        request_io: sends requests to the nodes.
    """

    def __init__(self, plan: Plan, check: RequestCheck, admission: Admission, request_io: RequestIO) -> None:
        self._check = check
        self._admission = admission
        self._request_io = request_io
        self._ordinary_bytes = ordinary_bytes(plan)
        self._kinds = OrdinaryRequests()
        self._closed = False
        self._pid = os.getpid()

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
        if os.getpid() != self._pid:
            raise PipelineError(
                f"this pipeline belongs to process {self._pid}, and this process is a fork of it; launch another here"
            )

    def submit(self, inputs: object, outputs: object, deadline_ns: int | None, *, block: bool) -> Answering:
        """Submit a request with the arguments of its caller; see :meth:`runtime.pipeline.Pipeline.submit`."""
        self.check_open()
        kind = self._kinds.find(inputs, outputs)
        if kind is not None:
            assert isinstance(inputs, dict)
            return self._enter_whole(inputs, kind, deadline_ns, block=block)
        names = normal_names(outputs)
        arrays = normal_inputs(inputs, self._check.specs)
        selection = self.check(arrays, names)
        return self.enter(arrays, selection, deadline_ns=deadline_ns, block=block, asked=names is not None)

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...] | None = None) -> OutputSelection:
        """Check a request against the model; returns how its outputs are obtained.

        Args:
            inputs: its inputs, normalised.
            outputs: the names of its outputs; all outputs of the model when None.

        Raises:
            InputError: inputs or names do not fit the model.
        """
        return self._check.check(inputs, outputs)

    def enter(
        self,
        arrays: Mapping[str, Array],
        selection: OutputSelection,
        *,
        deadline_ns: int | None,
        block: bool,
        asked: bool = True,
    ) -> Answering:
        """Submit inputs that are normalised (:mod:`runtime.requests.normalize`) and have passed :meth:`check`.

        Args:
            arrays: the inputs by name.
            selection: what :meth:`check` has returned.
            deadline_ns: the request's deadline, by the host's monotonic clock; None for no deadline.
            block: whether to wait for a place in the pipeline.
            asked: whether the caller has named the outputs.

        Raises:
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        self.check_open()
        kind = self._kinds.find(arrays, selection.names)
        if kind is not None:
            return self._enter_whole(arrays, kind, deadline_ns, block=block)
        parts, ready = self._check.prepare(arrays, selection)
        if not parts:
            future = Answering()
            future.set_result(ready)
            return future
        size = sum(map(content_bytes, parts[0].values()))
        cost = cost_of(sum(array.nbytes for array in parts[0].values()), self._ordinary_bytes)
        if len(parts) == 1 and parts[0].keys() == arrays.keys() and not ready:
            kind = self._kinds.learn(arrays, selection, asked=asked, size=size, cost=cost)
            if kind is not None:
                return self._enter_whole(arrays, kind, deadline_ns, block=block)
        request = Request(self._request_io, self._admission, parts, selection, size, cost, deadline_ns, ready)
        try:
            self._admit(request.first_place, size, deadline_ns, block=block)
            request.enter()
        except BaseException:
            request.abandon()
            raise
        return request.future

    def _enter_whole(
        self, arrays: Mapping[str, Array], kind: Ordinary, deadline_ns: int | None, *, block: bool
    ) -> Answering:
        """Submit a request of a kind that is known."""
        request = WholeRequest(self._request_io, self._admission, kind)
        try:
            self._admit(request, kind.size, deadline_ns, block=block)
            request.enter(arrays, deadline_ns)
        except BaseException:
            request.abandon()
            raise
        return request

    def _admit(self, place: object, size: int, deadline_ns: int | None, *, block: bool) -> None:
        waits = block and not self._request_io.delivering  # the thread of callbacks frees the places
        self._admission.admit(place, size, deadline_ns=deadline_ns, block=waits)
