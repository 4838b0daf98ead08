"""What a Python caller uses: a plan, running."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from onnxsplit.custom_ops import check_wanted, find_libraries, needed_libraries
from onnxsplit.errors import InputError, shown
from onnxsplit.npz import load_npz
from onnxsplit.numbers import is_whole
from onnxsplit.plan import Plan
from onnxsplit.plan_files import default_files, load_plan, plan_id, read_plan_file
from onnxsplit.providers import providers_by_stage
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array, check_inputs, content_bytes
from runtime.admission import Admission
from runtime.balance.board import PEERS
from runtime.balance.policies import cost_of
from runtime.coordinator.loop import Coordinator
from runtime.coordinator.node_record import Incident
from runtime.coordinator.setup import Setup
from runtime.coordinator.status import NodeInfo, NodeStats
from runtime.descriptors import require_descriptors
from runtime.errors import Busy, DeadlineExceeded, LaunchFailed, PipelineClosed, PipelineError
from runtime.home import private_folder
from runtime.intake import normal_inputs, normal_names, normal_timeout_ns
from runtime.launch.local import LocalLauncher
from runtime.launcher import Launcher, Rendezvous
from runtime.microbatch import batch_axes, batch_size, ordinary_bytes, split
from runtime.options import RunOptions, enough_inflight, memory_for_requests_bytes
from runtime.request import Answering, OutputSelection, Request
from runtime.trace import RequestTrace, chrome_trace
from runtime.wire.keys import Keys, default_folder
from runtime.wire.security import Security, check_address

START_TIMEOUT_S = 120.0

_LOOK_S = 0.2
_NODE_DESCRIPTORS = 8
_REMEMBERED = 256  # sets of outputs that were asked for


class Pipeline:
    """A running plan; a context manager. Made by :meth:`launch` or :meth:`listen`, ended by :meth:`close`.

    Callable from any number of threads.

    Attributes:
        plan: what it runs.
        inflight: requests, or micro-batches, that it admits at once.
        address: where nodes report.
    """

    def __init__(self, folder: Path, plan: Plan, coordinator: Coordinator, admission: Admission, rows: int) -> None:
        self.plan = plan
        self.inflight = admission.requests
        self._admission = admission
        self._rows = rows
        self._coordinator = coordinator
        self._closed = False
        self._pid = os.getpid()
        self._constants = {
            name: load_npz(folder / origin.file.name)[name]
            for name, origin in plan.passthrough.items()
            if origin.file is not None
        }
        self._defaults = {name: load_npz(file)[name] for name, file in default_files(folder, plan).items()}
        self._refused = plan.refused_inputs()
        self._ordinary_bytes = ordinary_bytes(plan)
        self._specs = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.inputs}
        self._asked: dict[tuple[str, ...], OutputSelection] = {}
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
            folder = _folder(plan)
            wanted = RunOptions(**options)
            wanted.check()
            loaded = load_plan(folder)
            nodes = sum(wanted.counts(loaded))
            require_descriptors(_NODE_DESCRIPTORS * nodes, f"a pipeline of {nodes} nodes")
            memory = wanted.inflight_bytes or memory_for_requests_bytes()
            if launcher is None:
                shared_bytes = memory if wanted.shared_memory else 0
                launcher = LocalLauncher(memory_bytes=shared_bytes, custom_ops=_custom_ops(loaded, wanted))
            else:
                _refuse_custom_ops(wanted, "the launcher that starts the nodes", "RayLauncher(custom_ops=[...])")
            shared = launcher.rendezvous.single_host
            pipeline = cls._build(
                folder,
                loaded,
                wanted,
                memory,
                launcher.rendezvous,
                threads=wanted.threads or (threads_per_node(nodes) if shared else 0),
                launcher=launcher,
                start_timeout=wanted.start_timeout or START_TIMEOUT_S,
            )
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
        _refuse_custom_ops(wanted, "each node that is started by hand", "onnxsplit node --custom-ops FILE.so")
        folder_of_keys = wanted.keys or (None if wanted.insecure else default_folder())
        keys = Keys(folder_of_keys) if folder_of_keys is not None and bind.startswith("tcp://") else None
        security = Security(
            pair=keys.pair if keys else None,
            allows=lambda key: keys is not None and key in keys.allowed,
            insecure=wanted.insecure,
        )
        check_address(bind, security)
        folder = _folder(plan)
        loaded = load_plan(folder)
        home = private_folder()
        any_port = f"{bind.rpartition(':')[0]}:*" if bind.startswith("tcp://") else None
        rendezvous = Rendezvous(
            control=bind,
            data=any_port or f"{bind}.results",
            files=any_port or f"{bind}.files",
            home=home,
            security=security,
            trusted=(lambda: keys.allowed) if keys is not None else None,
        )
        try:
            pipeline = cls._build(
                folder,
                loaded,
                wanted,
                wanted.inflight_bytes or memory_for_requests_bytes(),
                rendezvous,
                threads=wanted.threads or 0,
                launcher=None,
                start_timeout=wanted.start_timeout,
            )
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        return pipeline._wait_until_ready(wanted.abandoned)

    @classmethod
    def _build(
        cls,
        folder: Path,
        plan: Plan,
        wanted: RunOptions,
        memory_bytes: int,
        rendezvous: Rendezvous,
        *,
        threads: int,
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
            balance=wanted.balance,
            attempts=wanted.attempts,
            timings=wanted.timings,
            memory_bytes=memory_bytes if wanted.shared_memory else 0,
            elastic=wanted.elastic,
            rendezvous=rendezvous,
            launcher=launcher,
            start_timeout_s=start_timeout,
            progress=wanted.progress,
        )
        requests = 1 if wanted.mode == "sync" else wanted.inflight or enough_inflight(plan, replicas)
        rows = batch_size(plan) if wanted.micro_batch is None else wanted.micro_batch
        return cls(folder, plan, Coordinator(setup), Admission(requests, memory_bytes), rows)

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

        Returns when all is gone; in a callback of a request at once, since the thread that runs it is needed for that.
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
            inputs: name -> array, typed and shaped as the model declares.
            outputs: names of outputs, or of any tensor that crosses between stages; all outputs of the model when
                None. Only the stages they need run, and only the inputs of those must be given.
            timeout: seconds from this call until the answer, above 0 and a year at most; then the future fails.
            block: False raises :class:`~runtime.errors.Busy` instead of waiting.

        Returns:
            A future of name -> array, which also says where the request was (``visits``). It fails with StageFailed,
            NodeFailed, StageUnavailable, DeadlineExceeded or PipelineClosed; ``cancel()`` gives the request up.

        Raises:
            InputError: inputs, names or the timeout are not as said above; nothing was sent.
            Busy, DeadlineExceeded, PipelineClosed: the request was not admitted.
        """
        begun = time.monotonic_ns()
        limit = normal_timeout_ns(timeout)
        names = normal_names(outputs)
        arrays = normal_inputs(inputs, self._specs)
        deadline = None if limit is None else begun + limit
        return self.enter(arrays, self.check(arrays, names), deadline_ns=deadline, block=block)

    def enter(
        self, arrays: Mapping[str, Array], asked: OutputSelection, *, deadline_ns: int | None, block: bool
    ) -> Answering:
        """Send in what is normal (:mod:`runtime.intake`) and :meth:`check` has passed; otherwise as :meth:`submit`."""
        if self._closed:
            raise PipelineClosed("the pipeline was closed")
        if os.getpid() != self._pid:
            raise PipelineError(
                f"this pipeline belongs to process {self._pid}, of which this one is a fork; launch another here"
            )
        # That rows are independent was proven with the defaults: with other values they may not be.
        splits = self._rows and asked.axes is not None and self._defaults.keys().isdisjoint(arrays)
        arrays = {**{name: self._defaults[name] for name in asked.defaults}, **arrays}
        ready = {name: self._passed_through(name, arrays) for name in asked.passed}
        if not asked.computed:
            future = Answering()
            future.set_result(ready)
            return future
        parts = split(arrays, asked.axes or {}, self._rows) if splits else [dict(arrays)]
        if len(parts) > 1:  # later parts enter after this call has returned
            axes = asked.axes or {}
            whole = {name: np.array(array) for name, array in arrays.items() if axes[name] is None}
            parts = [{n: whole[n] if n in whole else np.array(array) for n, array in part.items()} for part in parts]
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
        """Hold a request against the model, as :meth:`submit` does; and what it means.

        Raises:
            InputError: inputs or names do not fit the model.
        """
        wanted = outputs if outputs is not None else self.plan.outputs
        asked = self._asked.get(wanted) or self._ask(wanted)
        check_inputs(inputs, self._specs, asked.optional, refused=self._refused)
        return asked

    def _admit(self, place: object, size: int, deadline_ns: int | None, block: bool) -> None:
        """Take a place for a part of ``size`` bytes. A callback does not wait for one: it brings those who leave."""
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

    def _ask(self, wanted: tuple[str, ...]) -> OutputSelection:
        """Check the names asked for, and work out what that means; remembered."""
        plan = self.plan
        stage_tensors = plan.producers()
        unknown = [name for name in wanted if name not in stage_tensors and name not in plan.outputs]
        if unknown or not wanted:
            what = f"output {shown(unknown[0])} is unknown" if unknown else "no output is asked for"
            allowed = dict.fromkeys((*plan.outputs, *stage_tensors))
            raise InputError(f"{what}; allowed: {', '.join(allowed)}")
        read = {name for stage in plan.stages_for(wanted) for name in plan.stages[stage].inputs}
        read |= {o.input for n, o in plan.passthrough.items() if n in wanted and o.input is not None}
        computed = tuple(dict.fromkeys(name for name in wanted if name not in plan.passthrough))
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        asked = self._asked[wanted] = OutputSelection(
            names=wanted,
            computed=computed,
            passed=tuple(name for name in wanted if name in plan.passthrough),
            optional=frozenset(plan.inputs) - (read - plan.defaults.keys()),
            defaults=tuple(name for name in plan.defaults if name in read),
            axes=batch_axes(plan, computed),
        )
        return asked

    def _passed_through(self, name: str, inputs: Mapping[str, Array]) -> Array:
        origin = self.plan.passthrough[name]
        return np.array(inputs[origin.input] if origin.input is not None else self._constants[name])

    def take_in_loop(self) -> tuple[int, Callable[[], None]]:
        """Let an event loop take results, and call what futures call, in place of a thread of this pipeline's.

        Returns:
            a descriptor that is to be watched until :meth:`close` and then closed by the caller, and what to call
            whenever it is readable. Requests are only answered by that.
        """
        return self._coordinator.take_in_loop()

    @property
    def admission(self) -> Admission:
        """Counts the requests in flight; tells a caller that was refused when another try makes sense."""
        return self._admission

    @property
    def traced(self) -> list[RequestTrace]:
        """When each answered request was where, when launched with ``trace``; may be cleared."""
        return self._coordinator.requests.traced

    @property
    def lent_bytes(self) -> int:
        """Bytes of inputs in shared memory that nodes have not returned yet."""
        return self._coordinator.requests.lent_bytes

    def trace(self) -> dict[str, Any]:
        """The run so far as a timeline, in Chrome's trace event format, when launched with ``trace``.

        Profiles of the sessions (``trace_ops``) are in it once the pipeline is closed.
        """
        readers = {
            stage.index: [other.index for other in self.plan.stages if set(stage.outputs) & set(other.inputs)]
            for stage in self.plan.stages
        }
        return chrome_trace(self.traced, readers, self._coordinator.profiles)

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those in flight are answered.

        Raises:
            TimeoutError: they were not, in ``timeout`` seconds; they go on.
            InputError: the timeout is no number of seconds above 0.
        """
        limit_ns = normal_timeout_ns(timeout)
        self._coordinator.drain().result(None if limit_ns is None else limit_ns / 1e9)

    @property
    def ended(self) -> bool:
        """True when nobody looks after its requests any more: it was closed, or a thread of it has failed."""
        return self._coordinator.ended

    @property
    def trouble(self) -> str | None:
        """Why this pipeline serves nobody, as when a thread of it has failed; None when it does, or may soon."""
        return self._coordinator.trouble

    def scale(self, stage: int, replicas: int) -> None:
        """Have so many nodes of a stage from now on, while requests go on.

        New nodes take requests as soon as they are ready; nodes that are not needed any more first finish what they
        have.

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
        """Attempts that were made again."""
        return self._coordinator.retries


def _folder(plan: object) -> Path:
    """A plan directory as callers name it."""
    if isinstance(plan, str | os.PathLike):
        return Path(plan)
    raise InputError(f"a plan is named by its folder, a text or a path, not by {shown(plan)}")


def _custom_ops(plan: Plan, wanted: RunOptions) -> dict[int, tuple[str, ...]]:
    """By stage, the libraries of custom ops that nodes on this host are to be told of.

    Raises:
        CustomOpsError: the plan needs another one, or names none of those given.
    """
    given = find_libraries(wanted.custom_ops)
    needed_libraries(given, plan)
    check_wanted(given, (plan,))
    stages = [stage.index for stage in plan.stages if stage.custom_ops]
    return {stage: tuple(library.path for library in needed_libraries(given, plan, stage)) for stage in stages}


def _refuse_custom_ops(wanted: RunOptions, who: str, how: str) -> None:
    """Raise where libraries of custom ops are given to a pipeline that does not start its nodes itself."""
    if wanted.custom_ops:
        raise InputError(f"custom_ops are named to {who}, not to the pipeline: {how}")
