"""A running plan, for Python callers."""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from onnxsplit.errors import InputError, PlanError, shown
from onnxsplit.plan_files import is_damaged
from onnxsplit.tensors import Array
from runtime.launcher import Launcher
from runtime.opening import PipelineOpening
from runtime.options import RunArguments, RunOptions
from runtime.pipeline_control import PipelineControl
from runtime.recut.door import Door
from runtime.recut.recutter import end_dropped
from runtime.recut.running_plan import RunningPlan
from runtime.requests.arrays import InputsLike
from runtime.requests.entrance import deadline_of
from runtime.requests.event_loop import EventLoopEntrance, off_the_loop
from runtime.requests.generate_options import GenerateArguments
from runtime.requests.generation import Generation
from runtime.requests.mapping import AsyncMap, Counted, Items, MapArguments, Outputs, as_they_come, in_order
from runtime.requests.normalize import normal_timeout_ns
from runtime.requests.request import Answering
from runtime.starting import PreparedPipeline, launch_nodes, wait_for_nodes
from runtime.text.text import Text

if TYPE_CHECKING:
    from onnxsplit.planning.planner import PartitionArguments


class Pipeline(PipelineControl):
    """A running plan. It is made by :meth:`launch`, :meth:`open`, :meth:`listen` or :meth:`from_model`.

    It is a context manager, also an asynchronous one, and is ended by :meth:`close` or :meth:`aclose`. When the last
    reference to it is dropped, it ends as soon as its requests are answered, with a ``ResourceWarning``. Its methods
    can be called from any number of threads and event loops, but not in a fork of the process.
    """

    def __init__(self, started: PreparedPipeline) -> None:
        first = RunningPlan(started, 1)
        door = Door(first, started.admission)
        super().__init__(door)
        self._asynchronous = EventLoopEntrance(door)
        self._finalizer = weakref.finalize(self, end_dropped, self._stops, door, self._name, os.getpid())
        self._finalizer.atexit = False  # nodes end when this process does
        self._release_plan: Callable[[], object] = lambda: None
        try:
            first.wait()
            self.address = door.address = first.address
            if self._rebalancer is not None:
                self._rebalancer.start()
        except BaseException:
            self.close()
            raise

    @classmethod
    def launch(cls, plan: str | Path, *, launcher: Launcher | None = None, **options: Unpack[RunArguments]) -> Pipeline:
        """Start a process for every node, on this host unless a launcher is given, and wait until all are ready.

        Args:
            plan: the plan directory.
            launcher: starts the nodes, and is closed with the pipeline. When None, nodes are processes on this host.
            options: the attributes of :class:`~runtime.options.RunOptions`: ``replicas``, ``mode``, ``provider``,
                ``threads``, ``inflight`` and others.

        Raises:
            PlanError: the directory holds no usable plan.
            InputError: an option is invalid or unknown.
            CustomOpsError: a library of custom ops that the plan names was not given, or is a different build.
            LaunchFailed: a node did not start; the message says which and why.
        """
        return cls(launch_nodes(plan, launcher, options))

    @classmethod
    def listen(cls, plan: str | Path, *, bind: str, **options: Unpack[RunArguments]) -> Pipeline:
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
        return cls(wait_for_nodes(plan, bind, options))

    @classmethod
    def open(
        cls,
        plan: str | Path,
        *,
        bind: str | None = None,
        launcher: Launcher | None = None,
        **options: Unpack[RunArguments],
    ) -> PipelineOpening[Pipeline]:
        """Launch a pipeline from an event loop, which goes on meanwhile.

        ``async with Pipeline.open("model.plan") as pipeline`` also closes it; ``await Pipeline.open("model.plan")``
        leaves that to :meth:`aclose`. Cancelling the task gives the launch up.

        Args:
            plan: the plan directory.
            bind: where to wait for nodes started by hand, as for :meth:`listen`; None starts the nodes.
            launcher: as for :meth:`launch`.
            options: as for :meth:`launch`.

        Raises:
            PlanError, InputError, CustomOpsError, LaunchFailed, PipelineError: as for :meth:`launch` and
                :meth:`listen`, when it is entered or awaited.
        """
        if bind is not None and launcher is not None:
            raise InputError("bind waits for nodes that are started by hand; leave out launcher")

        def start(abandoned: Callable[[], bool]) -> Pipeline:
            wanted: RunArguments = {"abandoned": abandoned, **options}
            if bind is not None:
                return cls.listen(plan, bind=bind, **wanted)
            return cls.launch(plan, launcher=launcher, **wanted)

        return PipelineOpening(start)

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        stages: int | None = None,
        cut: PartitionArguments | None = None,
        launcher: Launcher | None = None,
        **options: Unpack[RunArguments],
    ) -> Pipeline:
        """Cut a model and launch it. The plan is kept in a cache, so the same call is faster the next time.

        The plan is in ``$XDG_CACHE_HOME/onnxsplit/plans`` (``~/.cache`` without this variable). Plans that were not
        used for 30 days are removed when another is made.

        Args:
            model: the path of the model's file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
            stages: the number of stages; None for one on each device.
            cut: further options of :func:`onnxsplit.partition`, such as ``{"inputs": "example.npz"}``.
            launcher: as for :meth:`launch`.
            options: as for :meth:`launch`.

        Raises:
            PartitionError, ModelError: as for :func:`onnxsplit.partition`.
            PlanError, InputError, LaunchFailed: as for :meth:`launch`.
        """
        from onnxsplit import PlanCache

        RunOptions.of(options)  # before the model is cut
        if not isinstance(cut, Mapping | None):
            raise InputError(f"cut must map options of partition to values, not {shown(cut)}")
        wanted: PartitionArguments = {**(cut or {})}
        if stages is not None:
            wanted["stages"] = stages
        cache = PlanCache()
        try:
            folder = cache.plan(model, **wanted)
            try:
                pipeline = cls.launch(folder, launcher=launcher, **options)
            except PlanError:
                if not is_damaged(folder):
                    raise
                cache.discard(folder)
                if launcher is not None:  # it was closed
                    raise
                pipeline = cls.launch(cache.plan(model, **wanted), **options)
        except BaseException:
            cache.close()
            raise
        pipeline._release_plan = weakref.finalize(pipeline, cache.close)
        return pipeline

    # Ending

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """Stop the nodes; requests in flight fail with :class:`~runtime.errors.PipelineClosed`.

        Returns when all nodes have ended. In a callback of a request it returns at once, because closing needs the
        thread that runs the callback. In a fork of the process it does nothing.
        """
        self._finalizer.detach()
        if not self.entrance.is_own:
            return
        if self._rebalancer is not None:
            self._rebalancer.close()
        self._recutter.close()
        self.entrance.close()
        self._recutter.remove_plans()
        self._asynchronous.close()
        if (text := self.__dict__.get("text")) is not None:
            text.close()
        self._release_plan()

    async def aclose(self) -> None:
        """The same as :meth:`close`, from an event loop, which goes on meanwhile."""
        await off_the_loop(self.close)

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those in flight are answered.

        Raises:
            TimeoutError: they were not answered in ``timeout`` seconds; they continue.
            InputError: the timeout is not a number of seconds above 0.
        """
        limit_ns = normal_timeout_ns(timeout)
        self.entrance.check_process()
        for stop in self._stops:  # the plan does not change any more
            stop()
        drained = [running.coordinator.drain() for running in self.entrance.plans if running.has_served]
        if wait(drained, None if limit_ns is None else limit_ns / 1e9).not_done:
            raise TimeoutError(f"requests were not answered in {timeout} s; they go on")
        drained[-1].result()  # plans that were being replaced may have ended

    # Requests

    def run(
        self, inputs: InputsLike, *, outputs: Sequence[str] | None = None, timeout: float | None = None
    ) -> dict[str, Array]:
        """Run one request and wait for its outputs. Arguments and errors are those of :meth:`submit` and its future."""
        return self.submit(inputs, outputs=outputs, timeout=timeout).result()

    def submit(
        self,
        inputs: InputsLike,
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
            inputs: an array for each input, by name, with the type and shape that the model declares; or one array for
                a model of one input, or a table for a model of columns. An array is anything with ``__array__`` or
                ``__dlpack__`` (NumPy, PyTorch, JAX, CuPy), or Python's numbers in lists.
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
        return self.entrance.submit(inputs, outputs, deadline_of(timeout), block=block)

    async def arun(
        self, inputs: InputsLike, *, outputs: Sequence[str] | None = None, timeout: float | None = None
    ) -> dict[str, Array]:
        """Run one request from an event loop, which goes on meanwhile; otherwise as :meth:`run`.

        The inputs may be changed when it has returned. Cancelling the task ends the request.
        """
        return await self._asynchronous.run(inputs, outputs, deadline_of(timeout))

    @overload
    def map(
        self, items: Iterable[InputsLike], *, ordered: Literal[True] = True, **options: Unpack[MapArguments]
    ) -> Iterator[Outputs]: ...

    @overload
    def map(
        self, items: Iterable[InputsLike], *, ordered: Literal[False], **options: Unpack[MapArguments]
    ) -> Iterator[tuple[int, Outputs]]: ...

    @overload
    def map(
        self, items: Iterable[InputsLike], *, ordered: bool, **options: Unpack[MapArguments]
    ) -> Iterator[Outputs] | Iterator[tuple[int, Outputs]]: ...

    def map(
        self, items: Iterable[InputsLike], *, ordered: bool = True, **options: Unpack[MapArguments]
    ) -> Iterator[Outputs] | Iterator[tuple[int, Outputs]]:
        """Run a request for each item. Results come one by one, while further requests are in flight.

        Items are taken as results are taken: at most ``inflight`` of them wait, run, or have results that were not
        taken. The first request that fails ends the iteration with its error, and the others are cancelled; so does a
        reader that stops early.

        Args:
            items: the inputs of each request, as for :meth:`submit`.
            ordered: True gives the outputs in the order of the items. False gives pairs of an item's position and its
                outputs as they come.
            options: ``outputs`` and ``timeout`` of each request, as for :meth:`submit`; and ``progress``, a function
                that is called with the number of results so far, and of items (None if it is not known).

        Raises:
            InputError, PipelineError: as for :meth:`submit` and its future, when a result is taken.
        """
        counted = Counted(items, options)
        run = in_order if ordered else as_they_come
        submit = lambda item: self.submit(item, **counted.each)  # noqa: E731
        return run(iter(items), submit, self.inflight, counted, self.entrance.later)

    @overload
    def amap(
        self, items: Items[InputsLike], *, ordered: Literal[True] = True, **options: Unpack[MapArguments]
    ) -> AsyncIterator[Outputs]: ...

    @overload
    def amap(
        self, items: Items[InputsLike], *, ordered: Literal[False], **options: Unpack[MapArguments]
    ) -> AsyncIterator[tuple[int, Outputs]]: ...

    @overload
    def amap(
        self, items: Items[InputsLike], *, ordered: bool, **options: Unpack[MapArguments]
    ) -> AsyncIterator[Outputs] | AsyncIterator[tuple[int, Outputs]]: ...

    def amap(
        self, items: Items[InputsLike], *, ordered: bool = True, **options: Unpack[MapArguments]
    ) -> AsyncIterator[Outputs] | AsyncIterator[tuple[int, Outputs]]:
        """The same as :meth:`map`, for ``async for`` in an event loop, which goes on meanwhile.

        The items may also come from an asynchronous iterable.
        """
        counted = Counted(items, options)
        given = counted.each
        submit = lambda item: self._asynchronous.submit(  # noqa: E731
            item, given.get("outputs"), deadline_of(given.get("timeout"))
        )
        mapped = AsyncMap(items, submit, self.inflight, counted)
        return mapped.in_order() if ordered else mapped.as_they_come()

    def generate(
        self,
        tokens: Sequence[int] | Array,
        *,
        timeout: float | None = None,
        block: bool = True,
        **options: Unpack[GenerateArguments],
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
        return self.entrance.generate(tokens, timeout=timeout, block=block, **options)

    @cached_property
    def text(self) -> Text | None:
        """Completes texts and conversations; see :meth:`runtime.text.text.Text.open`. None without a tokenizer."""
        self.entrance.check_process()
        return Text.open(self._folder, self.plan, self.entrance.generate)
