"""A running plan, as Python callers use it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxsplit.errors import InputError, shown
from onnxsplit.numbers import is_whole
from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array, content_bytes
from runtime.admission import Admission
from runtime.balance.board import PEERS
from runtime.balance.policies import cost_of
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.node_record import Incident
from runtime.coordinator.setup import Setup
from runtime.coordinator.status import NodeInfo, NodeStats
from runtime.descriptors import require_descriptors
from runtime.errors import Busy, DeadlineExceeded, LaunchFailed, PipelineClosed, PipelineError
from runtime.intake import normal_inputs, normal_names, normal_timeout_ns
from runtime.launch.local import LocalLauncher
from runtime.launcher import Launcher
from runtime.launching import custom_ops_of, meeting_point, plan_folder, refuse_custom_ops, security_of, setup_of
from runtime.microbatch import batch_size, ordinary_bytes
from runtime.options import RunOptions, enough_inflight, memory_for_requests_bytes
from runtime.request import Answering, OutputSelection, Request
from runtime.request_check import RequestCheck
from runtime.trace import RequestTrace, chrome_trace

START_TIMEOUT_S = 120.0

_LOOK_S = 0.2
_NODE_DESCRIPTORS = 8


class Pipeline:
    """A running plan; a context manager. Made by :meth:`launch` or :meth:`listen`, ended by :meth:`close`.

    Callable from any number of threads.

    Attributes:
        plan: what it runs.
        inflight: requests, or micro-batches, that it admits at once.
        address: where nodes report.
    """

    def __init__(self, plan: Plan, coordinator: Coordinator, admission: Admission, check: RequestCheck) -> None:
        self.plan = plan
        self.inflight = admission.requests
        self.address = ""
        self._admission = admission
        self._check = check
        self._coordinator = coordinator
        self._closed = False
        self._pid = os.getpid()
        self._ordinary_bytes = ordinary_bytes(plan)
        self._ready = coordinator.start()

    @classmethod
    def launch(cls, plan: str | Path, *, launcher: Launcher | None = None, **options: Any) -> Pipeline:
        """Start a process for every node, on this host unless the launcher has others, and wait until all are ready.

        Args:
            plan: the plan directory.
            launcher: what starts the nodes, and ends with the pipeline; processes of this host when None.
            options: the attributes of :class:`~runtime.options.RunOptions`: ``replicas``, ``mode``, ``provider``,
                ``threads``, ``inflight`` and others.

        Raises:
            PlanError: the directory holds no usable plan.
            InputError: an option makes no sense.
            CustomOpsError: a library of custom ops that the plan names was not given, or is another build.
            LaunchFailed: a node did not come up; says which and why.
        """
        try:
            folder = plan_folder(plan)
            wanted = RunOptions(**options)
            wanted.check()
            loaded = load_plan(folder)
            nodes = sum(wanted.counts(loaded))
            require_descriptors(_NODE_DESCRIPTORS * nodes, f"a pipeline of {nodes} nodes")
            memory_bytes = wanted.inflight_bytes or memory_for_requests_bytes()
            if launcher is None:
                shared_bytes = memory_bytes if wanted.shared_memory else 0
                launcher = LocalLauncher(memory_bytes=shared_bytes, custom_ops=custom_ops_of(loaded, wanted))
            else:
                refuse_custom_ops(wanted, "the launcher that starts the nodes", "RayLauncher(custom_ops=[...])")
            shares_cores = launcher.rendezvous.single_host
            setup = setup_of(
                folder,
                loaded,
                wanted,
                launcher.rendezvous,
                memory_bytes=memory_bytes,
                threads=wanted.threads or (threads_per_node(nodes) if shares_cores else 0),
                launcher=launcher,
                start_timeout_s=wanted.start_timeout or START_TIMEOUT_S,
            )
            pipeline = cls._build(setup, wanted, memory_bytes)
        except BaseException:
            if launcher is not None:
                launcher.close(keep_logs=False)
            raise
        return pipeline._wait_until_ready(wanted.abandoned)

    @classmethod
    def listen(cls, plan: str | Path, *, bind: str, **options: Any) -> Pipeline:
        """Wait at an address for nodes started by hand (``onnxsplit node --connect ADDR``) until all are there.

        Args:
            plan: the plan directory.
            bind: ``tcp://HOST:PORT`` or ``ipc://PATH``. By tcp, links are encrypted with ``keys``; without any, HOST
                must be of this host alone, or ``insecure`` be said.
            options: as for :meth:`launch`. A node's own provider and threads go before those given here.

        Raises:
            PipelineError: the address cannot be used.
            PlanError, InputError, LaunchFailed: as for :meth:`launch`.
        """
        wanted = RunOptions(**options)
        wanted.check()
        refuse_custom_ops(wanted, "each node that is started by hand", "onnxsplit node --custom-ops FILE.so")
        security, keys = security_of(bind, wanted)
        folder = plan_folder(plan)
        loaded = load_plan(folder)
        rendezvous = meeting_point(bind, security, keys)
        try:
            memory_bytes = wanted.inflight_bytes or memory_for_requests_bytes()
            setup = setup_of(
                folder,
                loaded,
                wanted,
                rendezvous,
                memory_bytes=memory_bytes,
                threads=wanted.threads or 0,
                launcher=None,
                start_timeout_s=wanted.start_timeout,
            )
            pipeline = cls._build(setup, wanted, memory_bytes)
        except BaseException:
            shutil.rmtree(rendezvous.home, ignore_errors=True)
            raise
        return pipeline._wait_until_ready(wanted.abandoned)

    @classmethod
    def _build(cls, setup: Setup, options: RunOptions, memory_bytes: int) -> Pipeline:
        plan = setup.plan
        inflight = 1 if options.mode == "sync" else options.inflight or enough_inflight(plan, setup.replicas)
        rows = batch_size(plan) if options.micro_batch is None else options.micro_batch
        check = RequestCheck(setup.folder, plan, rows)
        return cls(plan, Coordinator(setup), Admission(inflight, memory_bytes), check)

    def _wait_until_ready(self, abandoned: Callable[[], bool] | None) -> Pipeline:
        try:
            while not wait((self._ready,), None if abandoned is None else _LOOK_S).done:
                if abandoned is not None and abandoned():
                    raise LaunchFailed("the launch was given up before all nodes were ready")
            self.address = self._ready.result()
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the nodes; requests in flight fail with :class:`~runtime.errors.PipelineClosed`.

        Returns when everything is gone. In a callback of a request it returns at once, since the thread that runs the
        callback is needed for that.
        """
        self._closed = True
        self._coordinator.close()

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Array]:
        """Run one request and wait for its outputs. As :meth:`submit`."""
        return self.submit(inputs, outputs=outputs, timeout=timeout).result()

    def submit(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        block: bool = True,
    ) -> Answering:
        """Send one request into the pipeline.

        Waits while as many requests are in flight as the pipeline admits. A batch that is larger than a micro-batch
        enters part by part, and its answer is put together in order. Inputs are copied, so the caller may change them
        at once; the outputs are the caller's own.

        Args:
            inputs: an array for each input, by name, with the type and shape that the model declares.
            outputs: names of outputs, or of any tensor that crosses between stages; all outputs of the model when
                None. Only the stages that they need run, and only the inputs of those must be given.
            timeout: seconds from this call until the answer, above 0 and at most a year. Then the future fails.
            block: False raises :class:`~runtime.errors.Busy` instead of waiting.

        Returns:
            A future of the outputs, by name, which also says where the request was (``visits``). It fails with
            StageFailed, NodeFailed, StageUnavailable, DeadlineExceeded or PipelineClosed; ``cancel()`` gives the
            request up.

        Raises:
            InputError: inputs, names or the timeout are not as said above; nothing was sent.
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        begun = time.monotonic_ns()
        limit = normal_timeout_ns(timeout)
        names = normal_names(outputs)
        arrays = normal_inputs(inputs, self._check.specs)
        deadline = None if limit is None else begun + limit
        return self.enter(arrays, self.check(arrays, names), deadline_ns=deadline, block=block)

    def enter(
        self, arrays: Mapping[str, Array], asked: OutputSelection, *, deadline_ns: int | None, block: bool
    ) -> Answering:
        """As :meth:`submit`, for inputs that are normal (:mod:`runtime.intake`) and have passed :meth:`check`."""
        if self._closed:
            raise PipelineClosed("the pipeline was closed")
        if os.getpid() != self._pid:
            raise PipelineError(
                f"this pipeline belongs to process {self._pid}, of which this one is a fork; launch another here"
            )
        parts, ready = self._check.prepare(arrays, asked)
        if not parts:
            future = Answering()
            future.set_result(ready)
            return future
        size = sum(map(content_bytes, parts[0].values()))
        cost = cost_of(sum(array.nbytes for array in parts[0].values()), self._ordinary_bytes)
        request = Request(self._coordinator.requests, self._admission, parts, asked, size, cost, deadline_ns, ready)
        try:
            self._admit(request.first_place, size, deadline_ns, block)
            request.enter()
        except BaseException:
            request.abandon()
            raise
        return request.future

    def check(self, inputs: Mapping[str, Array], outputs: tuple[str, ...] | None = None) -> OutputSelection:
        """Check a request against the model, as :meth:`submit` does; returns what it means.

        Raises:
            InputError: inputs or names do not fit the model.
        """
        return self._check.check(inputs, outputs)

    def _admit(self, place: object, size: int, deadline_ns: int | None, block: bool) -> None:
        """Take a place for a part of ``size`` bytes. A callback does not wait for one, since its thread frees them."""
        waits = block and not self._coordinator.requests.delivering
        timeout = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        if self._admission.enter(place, size, block=waits, timeout=timeout):
            return
        if waits:
            raise DeadlineExceeded(
                "the request's time ran out before it was admitted: it waited for a place among the "
                f"{self.inflight} requests in flight that this pipeline admits"
            )
        raise Busy(f"{self.inflight} requests are in flight, which is all this pipeline admits; try again")

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Have an event loop take results, and run callbacks, instead of a thread of this pipeline.

        Returns:
            a descriptor, to be watched until :meth:`close` and then closed by the caller, and what to call whenever it
            is readable. From now on, requests are answered by these calls alone.
        """
        return self._coordinator.take_in_loop()

    @property
    def admission(self) -> Admission:
        """Counts the requests in flight; tells a caller that was refused when another try makes sense."""
        return self._admission

    @property
    def traced(self) -> list[RequestTrace]:
        """Where each answered request was, and when, for pipelines launched with ``trace``. The list may be cleared."""
        return self._coordinator.requests.traced

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        return self._coordinator.requests.lent_bytes

    def trace(self) -> dict[str, Any]:
        """The run so far as a timeline, in Chrome's trace event format, for pipelines launched with ``trace``.

        Once the pipeline is closed, it contains the profiles of the sessions (``trace_ops``).
        """
        readers = {
            stage.index: [other.index for other in self.plan.stages if set(stage.outputs) & set(other.inputs)]
            for stage in self.plan.stages
        }
        return chrome_trace(self.traced, readers, self._coordinator.profiles)

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those in flight are answered.

        Raises:
            TimeoutError: they were not answered in ``timeout`` seconds; they go on.
            InputError: the timeout is not a number of seconds above 0.
        """
        limit_ns = normal_timeout_ns(timeout)
        self._coordinator.drain().result(None if limit_ns is None else limit_ns / 1e9)

    @property
    def ended(self) -> bool:
        """True when nobody looks after its requests any more: it was closed, or one of its threads has failed."""
        return self._coordinator.ended

    @property
    def trouble(self) -> str | None:
        """Why this pipeline answers no requests, as when a thread has failed; None when it does, or may soon."""
        return self._coordinator.trouble

    def scale(self, stage: int, replicas: int) -> None:
        """Have this number of nodes of a stage from now on, while requests go on.

        New nodes take requests as soon as they are ready. Nodes that are not needed any more finish their requests and
        end.

        Raises:
            InputError: there is no such stage, or it would have no node.
        """
        if not is_whole(stage) or not 0 <= stage < len(self.plan.stages):
            raise InputError(
                f"stage {shown(stage)} is unknown; the plan has the stages 0 to {len(self.plan.stages) - 1}"
            )
        if not is_whole(replicas) or not 1 <= replicas < PEERS:
            raise InputError(f"stage {stage} needs from 1 to {PEERS - 1} replicas, not {shown(replicas)}")
        self._coordinator.scale(int(stage), int(replicas))

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes as they are now, by stage and replica."""
        return self._coordinator.nodes()

    def stats(self) -> tuple[NodeStats, ...]:
        """Counts and times per stage and replica, since the pipeline was launched."""
        return self._coordinator.stats()

    @property
    def unreachable(self) -> str | None:
        """Why no request can get through although every stage has a node, naming the dead links; None when all is well.

        A pipeline for which this is not None is not ready to serve.
        """
        return self._coordinator.unreachable

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The nodes that were lost and the links that died, the first one first, at most a hundred."""
        return self._coordinator.incidents

    @property
    def retries(self) -> int:
        """The number of attempts that were made again."""
        return self._coordinator.retries
