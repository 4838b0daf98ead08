"""A running plan, for Python callers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from functools import cached_property
from pathlib import Path
from typing import Any

from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.node_record import Incident
from runtime.coordinator.setup import Setup
from runtime.coordinator.status import NodeInfo, NodeStats, SequenceStats
from runtime.descriptors import require_descriptors
from runtime.errors import LaunchFailed
from runtime.launch.local import LocalLauncher
from runtime.launcher import Launcher
from runtime.launching import custom_ops_of, meeting_point, plan_folder, refuse_custom_ops, security_of, setup_of
from runtime.options import RunOptions, check_scale, enough_inflight, memory_for_requests_bytes
from runtime.requests.admission import Admission
from runtime.requests.checks import RequestCheck
from runtime.requests.entrance import Entrance
from runtime.requests.generate_options import GenerateOptions
from runtime.requests.generation import Generation
from runtime.requests.generator import start_generation
from runtime.requests.microbatch import batch_size
from runtime.requests.normalize import normal_timeout_ns
from runtime.requests.request import Answering
from runtime.text.text import Text
from runtime.topology import StageGraph
from runtime.trace import RequestTrace, chrome_trace

START_TIMEOUT_S = 120.0
_LOOK_S = 0.2
_GROUPS = 4  # a caller that submits one request after another is woken when this part of them has been answered
_NODE_DESCRIPTORS = 8


class Pipeline:
    """A running plan; a context manager. Made by :meth:`launch` or :meth:`listen`, ended by :meth:`close`.

    Its methods can be called from any number of threads.

    Attributes:
        plan: the plan that it runs.
        inflight: number of requests, or micro-batches, that it admits at once.
        address: the address to which nodes connect.
        entrance: checks and admits requests.
        max_length: the most tokens of a sequence, prompt included; None where the plan has no decoder.
    """

    def __init__(
        self, plan: Plan, folder: Path, coordinator: Coordinator, admission: Admission, check: RequestCheck
    ) -> None:
        self.plan = plan
        self.inflight = admission.requests
        self.address = ""
        self.max_length = None if coordinator.limits is None else coordinator.limits.length
        self._admission = admission
        self._coordinator = coordinator
        self._folder = folder
        self.entrance = Entrance(plan, check, admission, coordinator.requests)
        self._ready = coordinator.start()

    @classmethod
    def launch(cls, plan: str | Path, *, launcher: Launcher | None = None, **options: Any) -> Pipeline:
        """Start a process for every node, on this host unless a launcher is given, and wait until all are ready.

        Args:
            plan: the plan directory.
            launcher: starts the nodes, and is closed with the pipeline. When None, nodes are processes on this host.
            options: the attributes of :class:`~runtime.options.RunOptions`: ``replicas``, ``mode``, ``provider``,
                ``threads``, ``inflight`` and others.

        Raises:
            PlanError: the directory holds no usable plan.
            InputError: an option is invalid.
            CustomOpsError: a library of custom ops that the plan names was not given, or is a different build.
            LaunchFailed: a node did not start; the message says which and why.
        """
        try:
            folder, wanted = plan_folder(plan), RunOptions(**options)
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
            bind: ``tcp://HOST:PORT`` or ``ipc://PATH``. Links over tcp are encrypted with ``keys``. Without keys, HOST
                must be a loopback address, or ``insecure`` must be set.
            options: as for :meth:`launch`. A node's own provider and threads take precedence over those given here.

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
        rows = batch_size(plan) if options.micro_batch is None else options.micro_batch
        enough = enough_inflight(plan, setup.replicas, batches=max(1, rows // batch_size(plan)))
        inflight = 1 if options.mode == "sync" else options.inflight or enough
        check = RequestCheck(setup.folder, plan, rows)
        group = 1 if options.inflight else max(1, inflight // _GROUPS)
        return cls(plan, setup.folder, Coordinator(setup), Admission(inflight, memory_bytes, group), check)

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the nodes; requests in flight fail with :class:`~runtime.errors.PipelineClosed`.

        Returns when all nodes have ended. In a callback of a request it returns at once, because closing needs the
        thread that runs the callback.
        """
        self.entrance.close()
        self._coordinator.close()
        if (text := self.__dict__.get("text")) is not None:
            text.close()

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Array]:
        """Run one request and wait for its outputs. Arguments and errors are those of :meth:`submit` and its future."""
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

        Waits while the pipeline has no room for another request. A batch that is larger than a micro-batch is sent in
        parts, and its outputs are joined in order. Inputs are copied, so the caller may change them at once; the
        outputs belong to the caller.

        Args:
            inputs: an array for each input, by name, with the type and shape that the model declares.
            outputs: names of outputs, or of any tensor that is sent between stages; all outputs of the model when
                None. Only the stages that they need run, and only the inputs of those must be given.
            timeout: seconds from this call until the answer, above 0 and at most a year. Then the future fails.
            block: False raises :class:`~runtime.errors.Busy` instead of waiting.

        Returns:
            A future of the outputs, by name, which also lists the stages that the request passed (``visits``). It fails
            with StageFailed, NodeFailed, StageUnavailable, DeadlineExceeded or PipelineClosed; ``cancel()`` ends the
            request.

        Raises:
            InputError: inputs, names or the timeout are invalid; nothing was sent.
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        begun = time.monotonic_ns()
        limit = normal_timeout_ns(timeout)
        return self.entrance.submit(inputs, outputs, None if limit is None else begun + limit, block=block)

    def generate(
        self, tokens: Sequence[int] | Array, *, timeout: float | None = None, block: bool = True, **options: Any
    ) -> Generation:
        """Continue a sequence, with a plan that has a decoder. Returns at once; each token comes once and in order.

        Args:
            tokens: the numbers of the prompt's tokens.
            timeout: seconds from this call until the last token, as for :meth:`submit`.
            block: False raises :class:`~runtime.errors.Busy` where the sequence would wait for room.
            options: the attributes of :class:`~runtime.requests.generate_options.GenerateOptions`: ``max_tokens``,
                ``temperature``, ``stop_tokens``, ``seed``, ``logprobs`` and others.

        Returns:
            An iterator and asynchronous iterator of tokens. It fails as the future of :meth:`submit` does.

        Raises:
            InputError: an argument is invalid or unknown, the plan has no decoder, or the tokens can never fit.
            Busy, PipelineClosed: it was not admitted.
        """
        self.entrance.check_open()
        wanted = GenerateOptions.of(options)
        return start_generation(self._coordinator, self.plan, tokens, wanted, timeout=timeout, block=block)

    @cached_property
    def text(self) -> Text | None:
        """Completes texts and conversations; see :meth:`runtime.text.text.Text.open`. None without a tokenizer."""
        return Text.open(self._folder, self.plan, self.generate)

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Receive results and run callbacks in an event loop, instead of a thread of this pipeline.

        Returns:
            A descriptor and a function. The caller watches the descriptor until :meth:`close` and calls the function
            whenever it is readable, then closes the descriptor. From now on, only these calls answer requests.
        """
        return self._coordinator.take_in_loop()

    @property
    def admission(self) -> Admission:
        """Counts the requests in flight; tells a caller that was refused when another try makes sense."""
        return self._admission

    @property
    def traced(self) -> list[RequestTrace]:
        """The answered requests with their visits, for pipelines launched with ``trace``. The list may be cleared."""
        return self._coordinator.requests.traced

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        return self._coordinator.requests.lent_bytes

    def trace(self) -> dict[str, Any]:
        """The run so far as a timeline, in Chrome's trace event format, for pipelines launched with ``trace``.

        Once the pipeline is closed, it contains the profiles of the sessions (``trace_ops``).
        """
        return chrome_trace(self.traced, StageGraph(self.plan).readers, self._coordinator.profiles)

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those in flight are answered.

        Raises:
            TimeoutError: they were not answered in ``timeout`` seconds; they continue.
            InputError: the timeout is not a number of seconds above 0.
        """
        limit_ns = normal_timeout_ns(timeout)
        self._coordinator.drain().result(None if limit_ns is None else limit_ns / 1e9)

    @property
    def ended(self) -> bool:
        """True when it no longer processes requests: it was closed, or one of its threads has failed."""
        return self._coordinator.ended

    @property
    def trouble(self) -> str | None:
        """Why this pipeline answers no requests, for example a failed thread; None when it does, or may soon."""
        return self._coordinator.trouble

    def scale(self, stage: int, replicas: int) -> None:
        """Set the number of a stage's nodes while requests continue.

        New nodes take requests as soon as they are ready. Nodes no longer needed finish their requests and end.

        Raises:
            InputError: there is no such stage, or it would have no node.
        """
        check_scale(self.plan, stage, replicas)
        self._coordinator.scale(int(stage), int(replicas))

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """The present nodes, by stage and replica."""
        return self._coordinator.nodes()

    def stats(self) -> tuple[NodeStats, ...]:
        """Counts and times per stage and replica, since the pipeline was launched."""
        return self._coordinator.stats()

    @property
    def sequences(self) -> SequenceStats | None:
        """Counts of the sequences that :meth:`generate` continues; None where the plan has no decoder."""
        return self._coordinator.sequences()

    @property
    def unreachable(self) -> str | None:
        """Why no request can pass although every stage has a node, naming the dead links; None when requests can pass.

        A pipeline for which this is not None is not ready to serve.
        """
        return self._coordinator.unreachable

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """The lost nodes and dead links, oldest first, at most a hundred."""
        return self._coordinator.incidents

    @property
    def retries(self) -> int:
        """The number of attempts that were repeated."""
        return self._coordinator.retries
