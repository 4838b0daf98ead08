"""What a Python caller uses: a plan, running."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from onnxsplit.errors import InputError, PlanError
from onnxsplit.plan import Plan, load_plan, plan_id, read_plan_file
from onnxsplit.providers import providers_by_stage
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array, check_inputs, load_npz
from runtime.coordinator import Answer, Coordinator, Setup
from runtime.errors import Busy, DeadlineExceeded, PipelineClosed
from runtime.launch.local import LocalLauncher
from runtime.transport import check_address

START_TIMEOUT_S = 120.0

Mode = Literal["sync", "async"]


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
        requests: executed.
        failures: that could not be executed.
        outstanding: on their way to it or in it.
        wait_ns: mean time a request waited there for its turn.
        run_ns: mean time in the session.
    """

    stage: int
    replica: int
    requests: int
    failures: int
    outstanding: int
    wait_ns: int
    run_ns: int


class Pipeline:
    """A running plan; a context manager. Made by :meth:`launch` or :meth:`listen`, ended by :meth:`close`.

    Callable from any number of threads.
    """

    def __init__(
        self, folder: Path, plan: Plan, coordinator: Coordinator, *, inflight: int, replicas: tuple[int, ...]
    ) -> None:
        self.plan = plan
        self.inflight = inflight
        self._replicas = replicas
        self._coordinator = coordinator
        self._room = threading.BoundedSemaphore(inflight)
        self._closed = False
        self._constants = {
            name: load_npz(folder / origin.file.name)[name]
            for name, origin in plan.passthrough.items()
            if origin.file is not None
        }
        self._specs = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.inputs}
        self._optional: dict[tuple[str, ...], frozenset[str]] = {}
        self._stage_tensors = frozenset(plan.producers())
        self._ready = coordinator.start()

    @classmethod
    def launch(
        cls,
        plan: str | Path,
        *,
        replicas: int | Mapping[int, int] | None = None,
        mode: Mode = "async",
        provider: str | None = None,
        threads: int | None = None,
        inflight: int | None = None,
        start_timeout: float = START_TIMEOUT_S,
    ) -> Pipeline:
        """Start a process for every node on this host and wait until all are ready.

        Args:
            plan: the plan directory.
            replicas: nodes of every stage: a number, or stage -> number; the plan's when None.
            mode: ``async`` keeps requests in flight in every stage; ``sync`` lets one in when the one before is out.
            provider: as ``--provider``; the plan's when None.
            threads: threads of every node's session; this host's cores divided by the nodes when None.
            inflight: requests in flight at most; two a node when None. ``sync`` has one.
            start_timeout: seconds until all nodes must be ready.

        Raises:
            PlanError: the directory holds no usable plan.
            LaunchFailed: a node did not come up; says which and why.
        """
        folder, loaded, counts = _opened(plan, replicas)
        launcher = LocalLauncher()
        try:
            pipeline = cls._build(
                folder,
                loaded,
                counts,
                mode,
                provider,
                inflight,
                threads=threads or threads_per_node(sum(counts)),
                control=f"ipc://{launcher.folder / 'control'}",
                data=f"ipc://{launcher.folder / 'results'}",
                launcher=launcher,
                start_timeout_s=start_timeout,
            )
        except BaseException:
            launcher.close(keep_logs=False)
            raise
        return pipeline._wait_until_ready()

    @classmethod
    def listen(
        cls,
        plan: str | Path,
        *,
        bind: str,
        replicas: int | Mapping[int, int] | None = None,
        mode: Mode = "async",
        provider: str | None = None,
        threads: int | None = None,
        inflight: int | None = None,
        start_timeout: float | None = None,
    ) -> Pipeline:
        """Wait at an address for nodes started by hand (``onnxsplit node --connect ADDR``) until all are there.

        Args:
            plan: the plan directory.
            bind: ``tcp://127.0.0.1:PORT`` or ``ipc://PATH``.
            replicas: as for :meth:`launch`.
            mode: as for :meth:`launch`.
            provider: as for :meth:`launch`; a node's own choice goes before it.
            threads: threads of every node's session; the plan's when None, and a node's own choice goes before it.
            inflight: as for :meth:`launch`.
            start_timeout: seconds until all nodes must be ready; None waits for ever.

        Raises:
            PipelineError: the address cannot be used.
            PlanError, LaunchFailed: as for :meth:`launch`.
        """
        check_address(bind)
        folder, loaded, counts = _opened(plan, replicas)
        data = "tcp://127.0.0.1:*" if bind.startswith("tcp://") else f"{bind}.results"
        return cls._build(
            folder,
            loaded,
            counts,
            mode,
            provider,
            inflight,
            threads=threads or 0,
            control=bind,
            data=data,
            launcher=None,
            start_timeout_s=start_timeout,
        )._wait_until_ready()

    @classmethod
    def _build(
        cls,
        folder: Path,
        plan: Plan,
        replicas: tuple[int, ...],
        mode: Mode,
        provider: str | None,
        inflight: int | None,
        **links: Any,
    ) -> Pipeline:
        if mode not in ("sync", "async"):
            raise InputError(f"mode {mode!r} is unknown; allowed: sync, async")
        if inflight is not None and inflight < 1:
            raise InputError(f"inflight must be at least 1, not {inflight}")
        planned = [stage.provider for stage in plan.stages]
        providers = tuple(planned) if provider is None else providers_by_stage(provider, len(planned), default=planned)
        setup = Setup(
            folder=folder,
            plan=plan,
            plan_id=plan_id(read_plan_file(folder)),
            replicas=replicas,
            providers=providers,
            **links,
        )
        admitted = 1 if mode == "sync" else inflight or 2 * max(1, sum(replicas))
        return cls(folder, plan, Coordinator(setup), inflight=admitted, replicas=replicas)

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

        Waits while as many requests are in flight as the pipeline admits. Inputs are copied, so the caller may change
        them at once; the outputs are the caller's own.

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
        wanted = tuple(dict.fromkeys(outputs)) if outputs is not None else self.plan.outputs
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        check_inputs(arrays, self._specs, self._optional_inputs(wanted))
        if self._closed:
            raise PipelineClosed("the pipeline was closed")
        ready = {name: self._passed_through(name, arrays) for name in wanted if name in self.plan.passthrough}
        computed = tuple(name for name in wanted if name not in ready)
        future: Answer = Future()
        future.set_running_or_notify_cancel()
        if not computed:
            future.set_result(ready)
            return future
        self._admit(timeout, block)
        inner: Answer = Future()
        inner.add_done_callback(lambda done: self._deliver(done, ready, wanted, future))
        deadline = None if timeout is None else begun + int(timeout * 1e9)
        copies = {name: np.array(array, order="C") for name, array in arrays.items()}
        self._coordinator.submit(copies, computed, deadline, inner)
        return future

    def _admit(self, timeout: float | None, block: bool) -> None:
        if self._room.acquire(blocking=block, timeout=timeout if block and timeout is not None else None):
            return
        if block:
            raise DeadlineExceeded(
                f"the request's time ran out before it was admitted: {self.inflight} requests were in flight"
            )
        raise Busy(f"{self.inflight} requests are in flight, which is all this pipeline admits; try again")

    def _deliver(self, done: Answer, ready: dict[str, Array], wanted: tuple[str, ...], future: Answer) -> None:
        self._room.release()
        error = done.exception()
        if error is not None:
            future.set_exception(error)
            return
        found = {**ready, **done.result()}
        future.set_result({name: found[name] for name in wanted})

    def _optional_inputs(self, wanted: tuple[str, ...]) -> frozenset[str]:
        """Inputs that nothing reads which is asked for; also checks the names asked for."""
        known = self._optional.get(wanted)
        if known is not None:
            return known
        plan = self.plan
        unknown = [name for name in wanted if name not in self._stage_tensors and name not in plan.outputs]
        if unknown or not wanted:
            what = f"output {', '.join(map(repr, unknown))} is unknown" if unknown else "no output is asked for"
            allowed = dict.fromkeys((*plan.outputs, *self._stage_tensors))
            raise InputError(f"{what}; allowed: {', '.join(allowed)}")
        read = {name for stage in plan.stages_for(wanted) for name in plan.stages[stage].inputs}
        read |= {o.input for n, o in plan.passthrough.items() if n in wanted and o.input is not None}
        self._optional[wanted] = frozenset(plan.inputs) - read
        return self._optional[wanted]

    def _passed_through(self, name: str, inputs: Mapping[str, Array]) -> Array:
        origin = self.plan.passthrough[name]
        return np.array(inputs[origin.input] if origin.input is not None else self._constants[name])

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
            )
            for slot, record in self._coordinator.machine.nodes.items()
        )


def _opened(plan: str | Path, replicas: int | Mapping[int, int] | None) -> tuple[Path, Plan, tuple[int, ...]]:
    """The plan, with its files checked, and the number of nodes of every stage."""
    folder = Path(plan)
    loaded = load_plan(folder)
    counts = {stage.index: stage.replicas for stage in loaded.stages}
    if isinstance(replicas, int):
        counts = dict.fromkeys(counts, replicas)
    elif replicas is not None:
        unknown = [stage for stage in replicas if stage not in counts]
        if unknown:
            raise PlanError(f"replicas for stage {unknown[0]}; the plan has the stages 0 to {len(counts) - 1}")
        counts.update(replicas)
    if any(count < 1 for count in counts.values()):
        raise InputError("every stage needs at least 1 replica")
    return folder, loaded, tuple(counts[stage] for stage in sorted(counts))
