"""The models a server has: plans by name and version, each with a pipeline of its own while it is loaded.

model.plan/                      model "model", version 1
models/resnet/1/, .../2/         given as ``models/resnet``: model "resnet", versions 1 and 2
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError, OnnxsplitError, shown
from onnxsplit.plan import PLAN_FILE, Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.tensors import Array
from runtime.errors import Busy, Cancelled, DeadlineExceeded, PipelineClosed, StageUnavailable
from runtime.gateway.batcher import Batcher, Inference
from runtime.gateway.counters import Counters
from runtime.gateway.errors import GatewayError, NotLoaded, UnknownModel, words
from runtime.gateway.protocol import DATATYPES, InferRequest, RequestedOutput
from runtime.gateway.queue import Limits
from runtime.logs import log_event
from runtime.microbatch import batch_axes
from runtime.pipeline import Pipeline

_LOOK_S = 0.5
_RESTART_WAIT_S, _MOST_RESTART_WAIT_S = 1.0, 60.0
_log = logging.getLogger("runtime.gateway")

StartPipeline = Callable[[Path, Callable[[], bool]], Pipeline]
"""Starts the pipeline of a plan; blocks until its nodes are ready, or until the function says that nobody waits."""


class VersionState(Enum):
    """Of a version. The values are the protocol's."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(eq=False)
class Version:
    """One version of a model.

    Attributes:
        model: its name.
        number: of the version, as the protocol has it: text.
        folder: of the plan.
        plan: what it says.
        state: whether it takes requests.
        reason: why it does not.
        counters: what it did since it was loaded.
        pipeline: while it is loaded.
        batcher: the way into that.
    """

    model: str
    number: str
    folder: Path
    plan: Plan
    state: VersionState = VersionState.UNAVAILABLE
    reason: str = "it was not loaded"
    counters: Counters = field(default_factory=Counters)
    pipeline: Pipeline | None = None
    batcher: Batcher | None = None

    @property
    def batched(self) -> bool:
        """True when the first axis of every input and output is proven to be the batch axis."""
        names = (*self.plan.inputs, *self.plan.outputs)
        return bool(self.plan.inputs) and all(self.plan.tensors[name].batch_axis == 0 for name in names)

    @property
    def ready(self) -> bool:
        """True when a request would be executed now."""
        return self.why_not() is None

    def why_not(self) -> str | None:
        """Why a request would not be executed now; None when it would.

        The pipeline is asked whether the threads that look after it do so: what its nodes were last known to be says
        nothing when they do not.
        """
        if self.state is not VersionState.READY or self.pipeline is None:
            return self.reason or "it is not loaded"
        if (trouble := self.pipeline.trouble) is not None:
            return trouble
        up = {node.stage for node in self.pipeline.nodes if node.state == "ready"}
        down = [stage.index for stage in self.plan.stages if stage.index not in up]
        if down:
            return f"stage {', '.join(map(str, down))} has no node that is ready"
        return self.pipeline.unreachable

    def wanted(self, request: InferRequest) -> tuple[RequestedOutput, ...]:
        """The outputs of a request, in the order it names them.

        Raises:
            InputError: the model has no such output, or one is named twice.
        """
        if not request.wanted:
            return tuple(RequestedOutput(name, request.all_binary) for name in self.plan.outputs)
        names = [output.name for output in request.wanted]
        unknown = [name for name in names if name not in self.plan.outputs]
        if unknown or len(set(names)) < len(names):
            what = f"has no output {shown(unknown[0])}" if unknown else "is asked for an output twice"
            raise InputError(f"model {self.model!r} {what}; it has {', '.join(self.plan.outputs)}")
        return request.wanted

    async def infer(
        self, request: InferRequest, wanted: Sequence[RequestedOutput], arrived_ns: int, deadline_ns: int | None
    ) -> tuple[dict[str, Array], Inference]:
        """Run a request; the stages that no wanted output needs do not run."""
        if self.batcher is None:
            raise NotLoaded(f"model {self.model!r} version {self.number} is not loaded: {self.reason}")
        names = {output.name for output in wanted}
        outputs = tuple(name for name in self.plan.outputs if name in names)
        return await self.batcher.run(request.inputs, outputs, arrived_ns, deadline_ns)


def why(error: BaseException) -> str:
    """The kind of a failure, as metrics name it."""
    if isinstance(error, Busy | StageUnavailable | PipelineClosed | NotLoaded):
        return "REJECTED"
    if isinstance(error, asyncio.CancelledError | Cancelled):
        return "CANCELED"
    if isinstance(error, DeadlineExceeded):
        return "TIMEOUT"
    return "INVALID" if isinstance(error, InputError | GatewayError) else "OTHER"


def find_versions(places: Iterable[Path]) -> list[Version]:
    """The versions that lie at some places.

    Raises:
        OnnxsplitError: there is no plan, one cannot be used, or two have the same name.
    """
    found: list[Version] = []
    for place in places:
        name = place.resolve().name.removesuffix(".plan") or "model"
        numbered = sorted(
            (path for path in (place.iterdir() if place.is_dir() else ()) if path.name.isdecimal() and path.is_dir()),
            key=lambda path: int(path.name),
        )
        folders = [place] if (place / PLAN_FILE).exists() or not numbered else numbered
        if any(version.model == name for version in found):
            raise InputError(f"two plans would be served as model {name!r}; rename a folder, or make them versions")
        for folder in folders:
            plan = load_plan(folder)
            _check_types(name, plan)
            found.append(Version(name, "1" if folder is place else folder.name, folder, plan))
    return found


def _check_types(name: str, plan: Plan) -> None:
    for tensor in (*plan.inputs, *plan.outputs):
        dtype = plan.tensors[tensor].dtype
        if dtype not in DATATYPES:
            raise InputError(
                f"model {name!r}: tensor {tensor!r} has type {dtype}, which the Open Inference Protocol lacks; "
                f"allowed: {', '.join(DATATYPES)}"
            )


@dataclass
class _Restart:
    """When a version whose pipeline has ended is started again: after each failure twice as long."""

    at_s: float
    wait_s: float
    cause: str


class Repository:
    """Versions by model. A version whose pipeline has ended by itself is started again (:meth:`watch`).

    Args:
        versions: all there are.
        start: starts a pipeline.
        limits: of the line before each.
        newest: so many of the newest versions of a model are loaded.
    """

    def __init__(self, versions: Iterable[Version], start: StartPipeline, limits: Limits, *, newest: int = 1) -> None:
        self._models: dict[str, dict[str, Version]] = {}
        for version in versions:
            self._models.setdefault(version.model, {})[version.number] = version
        self._start = start
        self._limits = limits
        self._newest = newest
        self._changing = asyncio.Lock()
        self._restarts: dict[Version, _Restart] = {}
        self._ended = asyncio.Event()  # the server is to end, with so much patience for what was accepted
        self._patience_s = 0.0
        self.ending = False

    def __iter__(self) -> Iterator[Version]:
        for versions in self._models.values():
            yield from versions.values()

    @property
    def models(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self._models)

    @property
    def ready(self) -> bool:
        """True when every model that is to be loaded takes requests and executes them."""
        wanted = self.wanted
        return not self.ending and bool(wanted) and all(version.ready for version in wanted)

    @property
    def wanted(self) -> tuple[Version, ...]:
        """The versions that are to take requests: those that do, that are loading, or that are started again."""
        return tuple(
            version
            for version in self
            if version.state is not VersionState.UNAVAILABLE or version.batcher is not None or version in self._restarts
        )

    def find(self, model: str, number: str = "") -> Version:
        """A version; the newest that is loaded, or else the newest, when none is named.

        Raises:
            UnknownModel: there is none.
        """
        versions = self._models.get(model)
        if versions is None:
            raise UnknownModel(f"model {shown(model)} is unknown; this server has {', '.join(self._models)}")
        if not number:
            loaded = [version for version in versions.values() if version.batcher is not None]
            return (loaded or list(versions.values()))[-1]
        if number not in versions:
            raise UnknownModel(f"model {model!r} has no version {shown(number)}; it has {', '.join(versions)}")
        return versions[number]

    def loaded(self, model: str, number: str = "") -> Version:
        """A version that takes requests.

        Raises:
            UnknownModel: there is none such.
            NotLoaded: it takes none.
        """
        version = self.find(model, number)
        if self.ending:
            raise NotLoaded("the server is ending and takes no more requests")
        if version.batcher is None:
            raise NotLoaded(f"model {model!r} version {version.number} takes no requests: {version.reason}")
        return version

    def versions(self, model: str) -> tuple[Version, ...]:
        """All of a model.

        Raises:
            UnknownModel: there is none such.
        """
        self.find(model)
        return tuple(self._models[model].values())

    async def watch(self) -> None:
        """Start again what has ended by itself, until this is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for version in self:
                pipeline = version.pipeline
                if pipeline is not None and version.state is VersionState.READY and pipeline.ended:
                    self._restarts[version] = _Restart(time.monotonic(), _RESTART_WAIT_S, pipeline.trouble or "")
            for version, again in list(self._restarts.items()):
                if time.monotonic() >= again.at_s and not self.ending:
                    await self._start_again(version, again)

    async def _start_again(self, version: Version, again: _Restart) -> None:
        """End what is left of a version's pipeline, and start another."""
        async with self._changing:
            if version not in self._restarts:  # somebody has unloaded or loaded it meanwhile
                return
            cause = f"its pipeline ended and is started again: {again.cause}"
            if version.pipeline is not None:
                log_event(_log, logging.ERROR, "pipeline ended", model=version.model, reason=again.cause)
                await self._drop(version, NotLoaded(f"model {version.model!r} takes no requests: {cause}"))
            try:
                await self._load(version, cause)
                del self._restarts[version]
            except Exception as error:
                version.reason = f"{cause}; {version.reason}"
                again.at_s, again.wait_s = time.monotonic() + again.wait_s, min(2 * again.wait_s, _MOST_RESTART_WAIT_S)
                log_event(_log, logging.ERROR, "not started again yet", model=version.model, reason=words(error))

    async def _drop(self, version: Version, reason: OnnxsplitError) -> None:
        """Take leave of a pipeline; who still waits is told why."""
        pipeline, batcher = version.pipeline, version.batcher
        version.pipeline, version.batcher = None, None
        version.state, version.reason = VersionState.UNAVAILABLE, str(reason)
        if batcher is not None:
            batcher.refuse(reason)
            batcher.close()
        if pipeline is not None:
            await asyncio.get_running_loop().run_in_executor(None, pipeline.close)

    async def load(self, model: str) -> None:
        """Start the newest versions of a model, those that are not running; what fails says so in its state.

        Raises:
            UnknownModel: there is none such.
            OnnxsplitError: a pipeline did not come up.
        """
        versions = self.versions(model)
        await self._to_the_end(self._load_all(versions[-self._newest :]))

    async def _load_all(self, versions: Sequence[Version]) -> None:
        async with self._changing:
            for version in versions:
                if version.batcher is None and not self.ending:
                    self._restarts.pop(version, None)
                    await self._load(version)

    @staticmethod
    async def _to_the_end(change: Coroutine[Any, Any, None]) -> None:
        """Make a change whole, also when the client that asked for it goes away."""
        await asyncio.shield(asyncio.ensure_future(change))

    async def _load(self, version: Version, reason: str = "it is being loaded") -> None:
        version.state, version.reason = VersionState.LOADING, reason
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            version.plan = await loop.run_in_executor(None, load_plan, version.folder)
            version.pipeline = await loop.run_in_executor(None, self._start, version.folder, lambda: self.ending)
        except Exception as error:
            version.state, version.reason = VersionState.UNAVAILABLE, words(error)
            raise
        version.counters = Counters()
        version.batcher = Batcher(version.pipeline, self._limits, version.counters)
        version.state, version.reason = VersionState.READY, ""
        if self._limits.max_batch > 1 and batch_axes(version.plan, version.plan.outputs) is None:
            log_event(_log, logging.WARNING, "not batched: it has no proven batch axis", model=version.model)
        log_event(
            _log,
            logging.INFO,
            "loaded",
            model=version.model,
            version=version.number,
            seconds=round(time.monotonic() - begun, 2),
        )

    async def unload(self, model: str) -> None:
        """Finish what the versions of a model have, and end their pipelines.

        Raises:
            UnknownModel: there is none such.
        """
        await self._to_the_end(self._unload_all(self.versions(model)))

    async def _unload_all(self, versions: Sequence[Version]) -> None:
        async with self._changing:
            for version in versions:
                self._restarts.pop(version, None)
                await self._unload(version, "it was unloaded; load it with the repository API")

    async def _unload(self, version: Version, reason: str, patience_s: float | None = None) -> None:
        pipeline, batcher = version.pipeline, version.batcher
        if pipeline is None or batcher is None:
            return
        version.state, version.reason = VersionState.UNLOADING, reason
        version.batcher = None
        if not await self._emptied(batcher, patience_s):
            batcher.refuse(PipelineClosed("the server ended before the request's turn came"))
        batcher.close()
        await asyncio.get_running_loop().run_in_executor(None, pipeline.close)
        version.pipeline = None
        version.state = VersionState.UNAVAILABLE

    async def _emptied(self, batcher: Batcher, patience_s: float | None) -> bool:
        """Wait until nobody is in line or inside; without a patience of its own, as long as the server lives."""
        emptied = asyncio.ensure_future(batcher.empty())
        try:
            if patience_s is None:
                ended = asyncio.ensure_future(self._ended.wait())
                await asyncio.wait((emptied, ended), return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                patience_s = self._patience_s
            return bool((await asyncio.wait((emptied,), timeout=patience_s))[0])
        finally:
            emptied.cancel()

    async def close(self, patience_s: float) -> None:
        """Finish what is accepted, at most so long, and end all pipelines; nothing more is accepted."""
        self.ending = True
        self._patience_s = patience_s
        self._ended.set()
        async with self._changing:
            await asyncio.gather(*(self._unload(v, "the server is ending", patience_s) for v in self))
