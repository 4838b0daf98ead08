"""What a Python caller uses: a plan, running."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from onnxsplit.errors import InputError
from onnxsplit.plan import Plan, load_plan, plan_id, read_plan_file
from onnxsplit.providers import providers_by_stage
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array, check_inputs, load_npz
from runtime.admission import Admission
from runtime.coordinator import Coordinator, Setup
from runtime.errors import Busy, DeadlineExceeded, PipelineClosed
from runtime.launch import Launcher
from runtime.launch.local import LocalLauncher
from runtime.microbatch import batch_axes, batch_size, split
from runtime.options import RunOptions, memory_for_requests_bytes
from runtime.request import Asked, Request
from runtime.trace import Traced, chrome_trace
from runtime.transport import check_address, private_folder

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class NodeInfo:
    """One node: its stage and replica, its process, where it takes fragments, and its state."""

    stage: int
    replica: int
    pid: int | None
    host: str | None
    address: str | None
    state: str


@dataclass(frozen=True)
class NodeStats:
    """What one node has done.

    Attributes:
        stage: its stage.
        replica: which replica of it.
        requests: answered ones that it executed.
        failures: that could not be executed.
        outstanding: on their way to it or in it.
        wait_ns: mean time a request waited there for its turn, once the node had read it; it reads between runs.
        run_ns: mean time in the session.
        output_bytes: of all tensors it gave for them.
        shared_bytes: of those that crossed in shared memory.
    """

    stage: int
    replica: int
    requests: int
    failures: int
    outstanding: int
    wait_ns: int
    run_ns: int
    output_bytes: int
    shared_bytes: int


class Pipeline:
    """A running plan; a context manager. Made by :meth:`launch` or :meth:`listen`, ended by :meth:`close`.

    Callable from any number of threads.

    Attributes:
        plan: what it runs.
        inflight: requests, or micro-batches, that it admits at once.
        address: where nodes report.
    """

    def __init__(self, folder: Path, plan: Plan, coordinator: Coordinator, entrance: Admission, rows: int) -> None:
        self.plan = plan
        self.inflight = entrance.requests
        self._entrance = entrance
        self._rows = rows
        self._coordinator = coordinator
        self._closed = False
        self._constants = {
            name: load_npz(folder / origin.file.name)[name]
            for name, origin in plan.passthrough.items()
            if origin.file is not None
        }
        self._specs = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.inputs}
        self._asked: dict[tuple[str, ...], Asked] = {}
        self._ready = coordinator.start()

    @classmethod
    def launch(cls, plan: str | Path, **options: Any) -> Pipeline:
        """Start a process for every node on this host and wait until all are ready.

        Args:
            plan: the plan directory.
            options: the attributes of :class:`~runtime.options.RunOptions`: ``replicas``, ``mode``, ``provider``,
                ``threads``, ``inflight`` and others.

        Raises:
            PlanError: the directory holds no usable plan.
            InputError: an option makes no sense.
            LaunchFailed: a node did not come up; says which and why.
        """
        wanted = RunOptions(**options)
        wanted.check()
        folder = Path(plan)
        loaded = load_plan(folder)
        nodes = sum(wanted.counts(loaded))
        memory = wanted.inflight_bytes or memory_for_requests_bytes()
        launcher = LocalLauncher(memory_bytes=memory if wanted.shared_memory else 0)
        try:
            pipeline = cls._build(
                folder,
                loaded,
                wanted,
                memory,
                threads=wanted.threads or threads_per_node(nodes),
                control=f"ipc://{launcher.folder / 'control'}",
                data=f"ipc://{launcher.folder / 'results'}",
                home=launcher.folder,
                launcher=launcher,
                start_timeout=wanted.start_timeout or START_TIMEOUT_S,
            )
        except BaseException:
            launcher.close(keep_logs=False)
            raise
        return pipeline._wait_until_ready()

    @classmethod
    def listen(cls, plan: str | Path, *, bind: str, **options: Any) -> Pipeline:
        """Wait at an address for nodes started by hand (``onnxsplit node --connect ADDR``) until all are there.

        Args:
            plan: the plan directory.
            bind: ``tcp://127.0.0.1:PORT`` or ``ipc://PATH``.
            options: as for :meth:`launch`. A node's own provider and threads go before those given here.

        Raises:
            PipelineError: the address cannot be used.
            PlanError, InputError, LaunchFailed: as for :meth:`launch`.
        """
        check_address(bind)
        wanted = RunOptions(**options)
        wanted.check()
        folder = Path(plan)
        loaded = load_plan(folder)
        home = private_folder()
        try:
            pipeline = cls._build(
                folder,
                loaded,
                wanted,
                wanted.inflight_bytes or memory_for_requests_bytes(),
                threads=wanted.threads or 0,
                control=bind,
                data="tcp://127.0.0.1:*" if bind.startswith("tcp://") else f"{bind}.results",
                home=home,
                launcher=None,
                start_timeout=wanted.start_timeout,
            )
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        return pipeline._wait_until_ready()

    @classmethod
    def _build(
        cls,
        folder: Path,
        plan: Plan,
        wanted: RunOptions,
        memory_bytes: int,
        *,
        threads: int,
        control: str,
        data: str,
        home: Path,
        launcher: Launcher | None,
        start_timeout: float | None,
    ) -> Pipeline:
        planned = [stage.provider for stage in plan.stages]
        given = wanted.provider
        replicas = wanted.counts(plan)
        setup = Setup(
            folder=folder,
            plan=plan,
            plan_id=plan_id(read_plan_file(folder)),
            replicas=replicas,
            providers=tuple(planned) if given is None else providers_by_stage(given, len(planned), default=planned),
            threads=threads,
            trace=wanted.trace,
            profile=wanted.trace_ops,
            share_weights=tuple(
                count > 1 if wanted.share_weights is None else wanted.share_weights for count in replicas
            ),
            memory_bytes=memory_bytes if wanted.shared_memory else 0,
            control=control,
            data=data,
            home=home,
            launcher=launcher,
            start_timeout_s=start_timeout,
            progress=wanted.progress,
        )
        requests = 1 if wanted.mode == "sync" else wanted.inflight or 2 * max(1, sum(replicas))
        rows = batch_size(plan) if wanted.micro_batch is None else wanted.micro_batch
        return cls(folder, plan, Coordinator(setup), Admission(requests, memory_bytes), rows)

    def _wait_until_ready(self) -> Pipeline:
        try:
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
        """Stop the nodes; requests in flight fail with :class:`~runtime.errors.PipelineClosed`."""
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
    ) -> Future[dict[str, Array]]:
        """Send one request into the pipeline.

        Waits while as many requests are in flight as the pipeline admits. A batch that is larger than a micro-batch
        enters part by part, and its answer is put together in order. Inputs are copied, so the caller may change them
        at once; the outputs are the caller's own.

        Args:
            inputs: name -> array, typed and shaped as the model declares.
            outputs: names of outputs, or of any tensor that crosses between stages; all outputs of the model when
                None. Only the stages they need run, and only the inputs of those must be given.
            timeout: seconds from this call until the answer; then the future fails.
            block: False raises :class:`~runtime.errors.Busy` instead of waiting.

        Returns:
            A future of name -> array. It fails with StageFailed, NodeFailed, DeadlineExceeded or PipelineClosed.

        Raises:
            InputError: inputs or names do not fit the model; nothing was sent.
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        begun = time.monotonic_ns()
        wanted = tuple(outputs) if outputs is not None else self.plan.outputs
        asked = self._asked.get(wanted) or self._ask(wanted)
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        check_inputs(arrays, self._specs, asked.optional)
        if self._closed:
            raise PipelineClosed("the pipeline was closed")
        ready = {name: self._passed_through(name, arrays) for name in asked.passed}
        if not asked.computed:
            future: Future[dict[str, Array]] = Future()
            future.set_result(ready)
            return future
        parts = split(arrays, asked.axes, self._rows) if asked.axes is not None and self._rows else [arrays]
        if len(parts) > 1:  # later parts enter after this call has returned
            parts = [{name: np.array(array) for name, array in part.items()} for part in parts]
        size = sum(array.nbytes for array in parts[0].values())
        self._admit(size, timeout, block)
        deadline = None if timeout is None else begun + int(timeout * 1e9)
        request = Request(self._coordinator.flow, self._entrance, parts, asked, size, deadline, ready)
        request.enter()
        return request.future

    def _admit(self, size: int, timeout: float | None, block: bool) -> None:
        if self._entrance.enter(size, block=block, timeout=timeout):
            return
        if block:
            raise DeadlineExceeded(
                f"the request's time ran out before it was admitted: {self.inflight} requests were in flight"
            )
        raise Busy(f"{self.inflight} requests are in flight, which is all this pipeline admits; try again")

    def _ask(self, wanted: tuple[str, ...]) -> Asked:
        """Check the names asked for, and work out what that means; remembered."""
        plan = self.plan
        stage_tensors = plan.producers()
        unknown = [name for name in wanted if name not in stage_tensors and name not in plan.outputs]
        if unknown or not wanted:
            what = f"output {', '.join(map(repr, unknown))} is unknown" if unknown else "no output is asked for"
            allowed = dict.fromkeys((*plan.outputs, *stage_tensors))
            raise InputError(f"{what}; allowed: {', '.join(allowed)}")
        read = {name for stage in plan.stages_for(wanted) for name in plan.stages[stage].inputs}
        read |= {o.input for n, o in plan.passthrough.items() if n in wanted and o.input is not None}
        computed = tuple(dict.fromkeys(name for name in wanted if name not in plan.passthrough))
        self._asked[wanted] = Asked(
            names=wanted,
            computed=computed,
            passed=tuple(name for name in wanted if name in plan.passthrough),
            optional=frozenset(plan.inputs) - read,
            axes=batch_axes(plan, computed),
        )
        return self._asked[wanted]

    def _passed_through(self, name: str, inputs: Mapping[str, Array]) -> Array:
        origin = self.plan.passthrough[name]
        return np.array(inputs[origin.input] if origin.input is not None else self._constants[name])

    @property
    def traced(self) -> list[Traced]:
        """When each answered request was where, when launched with ``trace``; may be cleared."""
        return self._coordinator.flow.traced

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        return self._coordinator.flow.lent_bytes

    def trace(self) -> dict[str, Any]:
        """The run so far as a timeline, in Chrome's trace event format, when launched with ``trace``.

        Profiles of the sessions (``trace_ops``) are in it once the pipeline is closed.
        """
        readers = {
            stage.index: [other.index for other in self.plan.stages if set(stage.outputs) & set(other.inputs)]
            for stage in self.plan.stages
        }
        return chrome_trace(self.traced, readers, self._coordinator.profiles)

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """One record a node, by stage and replica."""
        pids = self._coordinator.pids
        return tuple(
            NodeInfo(
                stage=slot[0],
                replica=slot[1],
                pid=record.hello.pid if record.hello is not None else pids.get(slot),
                host=record.hello.host if record.hello is not None else None,
                address=record.hello.address if record.hello is not None else None,
                state=record.state.value,
            )
            for slot, record in self._coordinator.machine.nodes.items()
        )

    def stats(self) -> tuple[NodeStats, ...]:
        """Counts and mean times per stage and replica."""
        return tuple(
            NodeStats(
                stage=slot[0],
                replica=slot[1],
                requests=record.requests,
                failures=record.failures,
                outstanding=record.outstanding,
                wait_ns=record.wait_ns // max(1, record.requests),
                run_ns=record.run_ns // max(1, record.requests),
                output_bytes=record.output_bytes,
                shared_bytes=record.shared_bytes,
            )
            for slot, record in self._coordinator.machine.nodes.items()
        )
