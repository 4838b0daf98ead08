"""Runs ways to serve a model under load, in turns, and measures what each gives.

All of them get the same requests from this process, without a network between. A pipeline is what ``serve`` starts; its
requests wait in its admission or, where they are joined, in the gateway's queue. A session alone is called by one
thread of this process, and its requests wait in a queue before that. First, a closed loop finds the limit of each. Then
requests come at random times (an open loop), at the rate that is asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onnxsplit.custom_ops import find_libraries
from onnxsplit.errors import OnnxsplitError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.plan_base import PlanStruct
from onnxsplit.plan_files import load_plan
from onnxsplit.providers import provider_here
from onnxsplit.session import open_session
from onnxsplit.tensors import Array
from runtime.load.batched import BatchedTarget
from runtime.load.loop import measure
from runtime.load.patterns import ClosedLoop, OpenLoop, Pattern
from runtime.load.pipeline import PipelineTarget
from runtime.load.point import LoadPoint
from runtime.load.rate_search import RateSearch
from runtime.load.session import SessionTarget
from runtime.load.target import LoadTarget
from runtime.load.windows import AGREEING, Measuring
from runtime.pipeline import Pipeline

_SESSION_QUEUE = 2  # requests in flight that keep one session busy
_FREE_SHARE = 0.5  # the share of the free memory that contenders may take together
_WARM_UP = 0.2  # of a slice
_LEAST_RUNS = 6  # requests alone, one after the other, that a slice is as long as at least
_LATE_ENDS_S = 10.0


class Contender(PlanStruct, frozen=True, kw_only=True):
    """A way to serve a model.

    Attributes:
        name: its name.
        folder: the plan's folder.
        replicas: number of nodes of each stage; empty for one session in this process.
        threads: threads of each session.
        max_batch: the most requests that are joined into one run.
        total_bytes: estimated memory of all sessions.
        alone_ns: about the time of one request alone.
    """

    name: str
    folder: Path
    replicas: tuple[int, ...]
    threads: int
    max_batch: int
    total_bytes: int
    alone_ns: int


class LoadPlan(PlanStruct, frozen=True, kw_only=True):
    """How contenders are loaded.

    Attributes:
        rate_per_s: the rate at which latencies are taken; None for another one for each contender.
        p99_ns: without a rate: the p99 for which the highest rate is searched; None for a share of the limit.
        share: this share.
        turns: number of turns of each measurement.
        closed_s: length of a slice of a closed loop.
        open_s: length of a slice of an open loop.
        steps: the most slices that the search takes of each contender; it takes fewer of those that are far behind.
    """

    rate_per_s: float | None
    p99_ns: int | None
    share: float
    turns: int
    closed_s: float
    open_s: float
    steps: int

    @property
    def searches(self) -> bool:
        """Whether the highest rate that keeps the p99 is searched."""
        return self.rate_per_s is None and self.p99_ns is not None

    def most_s(self, contender: Contender) -> float:
        """The longest time that a contender is under load, in seconds."""
        least_s = _LEAST_RUNS * contender.alone_ns / 1e9
        opens = self.steps if self.searches else self.turns
        return (1 + _WARM_UP) * (self.turns * max(least_s, self.closed_s) + opens * max(least_s, self.open_s))


class LoadResult(PlanStruct, frozen=True, kw_only=True):
    """What a contender gave.

    Attributes:
        limit_per_s: answers per second with as many requests in flight as it takes; the median of all turns.
        limit_low: the lowest of a turn.
        limit_high: the highest of a turn.
        rate_per_s: the rate of the next two figures; 0 where no rate keeps the p99 that was asked for.
        p50_ns: median time of a request at that rate; None where it cannot keep the rate.
        p99_ns: the 99th percentile of it; where the rate was searched, that of a line through all slices.
        requests: number of requests that these two are of.
        node_bytes: memory of all node processes; None for a session in this process.
        problem: why it could not be run; empty where it was.
    """

    limit_per_s: float = 0.0
    limit_low: float = 0.0
    limit_high: float = 0.0
    rate_per_s: float = 0.0
    p50_ns: int | None = None
    p99_ns: int | None = None
    requests: int = 0
    node_bytes: int | None = None
    problem: str = ""


def load_in_turns(
    contenders: Sequence[Contender],
    inputs: Mapping[str, Array],
    load: LoadPlan,
    *,
    custom_ops: Sequence[str | Path] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[LoadResult]:
    """Measure contenders in turns: first the limit of each, then its latencies.

    Args:
        contenders: what is run. All of them are open at once if memory allows it, else one at a time.
        inputs: the inputs of every request.
        load: how they are loaded.
        custom_ops: libraries of custom ops that the plans name.
        say: called with each step.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything is closed.
    """
    with ExitStack() as stack:
        together = sum(one.total_bytes for one in contenders) < _FREE_SHARE * free_memory_bytes()
        runs = [_Run(one, inputs, load, custom_ops, stack if together else None) for one in contenders]
        for turn in range(load.turns):
            for run in runs:
                say(f"turn {turn + 1} of {load.turns}: the limit of {run.contender.name}")
                run.find_limit()
        turns = load.steps if load.searches else load.turns
        for turn in range(turns):
            best = max(runs, key=lambda run: run.kept_per_s, default=None)
            for run in runs:
                if best is not None and run.is_clearly_behind(best):
                    continue
                say(f"turn {turn + 1} of {turns}: latencies of {run.contender.name}")
                if load.searches:
                    run.search_rate(turn)
                else:
                    run.take_latency(turn)
        return [run.result() for run in runs]


class _Run:
    """One contender, and what was measured of it."""

    def __init__(
        self,
        contender: Contender,
        inputs: Mapping[str, Array],
        load: LoadPlan,
        custom_ops: Sequence[str | Path],
        stack: ExitStack | None,
    ) -> None:
        self.contender = contender
        self._inputs, self._load, self._custom_ops, self._stack = inputs, load, custom_ops, stack
        self._open: tuple[LoadTarget, int, Pipeline | None] | None = None
        self._limits: list[float] = []
        self._points: list[LoadPoint] = []
        self._search = RateSearch(load.p99_ns) if load.searches and load.p99_ns is not None else None
        self._node_bytes: int | None = None
        self._problem = ""

    @property
    def _limit(self) -> float:
        return statistics.median(self._limits) if self._limits else 0.0

    @property
    def kept_per_s(self) -> float:
        """The highest rate that keeps the p99, as far as a search has found it."""
        if self._problem or self._search is None or not self._points or not self._search.keeps:
            return 0.0
        return self._search.share * self._limit

    def is_clearly_behind(self, other: _Run) -> bool:
        """Whether further slices would hardly show that a contender keeps a higher rate than another one."""
        if self._search is None or other._search is None:
            return False
        return self._search.is_clearly_behind(self._limit, other._search, other._limit)

    def find_limit(self) -> None:
        """Add a slice of a closed loop."""
        point = self._slice(None, self._load.closed_s)
        if point is not None:
            self._limits.append(point.answered_per_s)

    def take_latency(self, turn: int) -> None:
        """Add a slice of an open loop at the rate that is asked for, unless that is above the limit."""
        rate = self._load.rate_per_s or self._load.share * self._limit
        if 0 < rate <= self._limit and (point := self._at(rate, turn)) is not None:
            self._points.append(point)

    def search_rate(self, turn: int) -> None:
        """Add a slice near the highest rate that keeps the p99. All contenders get the same requests in a turn."""
        assert self._search is not None
        if self._limit <= 0:
            return
        share = self._search.next_share
        if (point := self._at(share * self._limit, turn)) is not None and point.latency.count:
            self._points.append(point)
            self._search.note(share, point.latency.p99_ns, keeps_up=point.keeps_up)

    def result(self) -> LoadResult:
        """What was measured."""
        if self._problem or not self._limits:
            return LoadResult(problem=self._problem or "it answered no request in time")
        rate_per_s, p50_ns, p99_ns = self._latencies()
        return LoadResult(
            limit_per_s=self._limit,
            limit_low=min(self._limits),
            limit_high=max(self._limits),
            rate_per_s=rate_per_s,
            p50_ns=p50_ns,
            p99_ns=p99_ns,
            requests=sum(point.latency.count for point in self._points),
            node_bytes=self._node_bytes,
        )

    def _latencies(self) -> tuple[float, int | None, int | None]:
        """The rate that latencies are of, and the median and the 99th percentile of them."""
        points = [point for point in self._points if point.latency.count]
        if (search := self._search) is not None:
            if not points:
                return 0.0, None, None
            rate, asked_ns = search.share * self._limit, self._load.p99_ns or 0
            nearest = min(points, key=lambda point: abs((point.rate_per_s or 0.0) - rate))
            if not search.keeps:
                return 0.0, nearest.latency.p50_ns, max(search.p99_ns, asked_ns + 1)
            return rate, nearest.latency.p50_ns, min(search.p99_ns, asked_ns)
        rate = self._load.rate_per_s or self._load.share * self._limit
        if not points or not all(point.keeps_up for point in points):
            return rate, None, None
        p50_ns = statistics.median(point.latency.p50_ns for point in points)
        p99_ns = statistics.median(point.latency.p99_ns for point in points)
        return rate, round(p50_ns), round(p99_ns)

    def _at(self, rate: float, seed: int) -> LoadPoint | None:
        return self._slice(OpenLoop(per_s=rate, poisson=True, seed=seed), self._load.open_s)

    def _slice(self, pattern: Pattern | None, seconds: float) -> LoadPoint | None:
        """Load the contender for a while; as many requests as it takes when the pattern is None."""
        if self._problem:
            return None
        seconds = max(seconds, _LEAST_RUNS * self.contender.alone_ns / 1e9)
        rules = Measuring(
            warmup_s=_WARM_UP * seconds,
            window_s=seconds / AGREEING,
            most_windows=AGREEING,
            stability=10,
            drain_s=max(_LATE_ENDS_S, seconds),
        )
        try:
            with ExitStack() as once:
                target, most, pipeline = self._open or self._opened(self._stack or once)
                if self._stack is not None:
                    self._open = target, most, pipeline
                point = measure(target, pattern or ClosedLoop(concurrency=most), rules)
                if pipeline is not None:
                    self._node_bytes = memory_of_bytes([node.pid for node in pipeline.nodes if node.pid is not None])
        except OnnxsplitError as error:
            self._problem = str(error)
            return None
        if point.interrupted:
            raise KeyboardInterrupt
        if point.failures:
            kind = next(iter(point.failures))
            self._problem = f"requests failed: {point.messages.get(kind) or kind}"
            return None
        return point

    def _opened(self, stack: ExitStack) -> tuple[LoadTarget, int, Pipeline | None]:
        return stack.enter_context(_opened(self.contender, self._inputs, self._custom_ops))


@contextmanager
def _opened(
    contender: Contender, inputs: Mapping[str, Array], custom_ops: Sequence[str | Path]
) -> Iterator[tuple[LoadTarget, int, Pipeline | None]]:
    """Start a contender; yields it, the requests in flight that keep it busy, and its pipeline if it has one."""
    if not contender.replicas:
        stage = load_plan(contender.folder).stages[0]
        session = open_session(
            contender.folder / stage.file,
            threads=contender.threads,
            level=stage.optimization_level,
            provider=provider_here(stage.provider),
            spinning=contender.threads > 1,  # as programs have it that call ONNX Runtime
            custom_ops=find_libraries(custom_ops),
        )
        yield SessionTarget(session, [inputs]), _SESSION_QUEUE, None
        return
    batch = contender.max_batch
    with Pipeline.launch(
        contender.folder,
        replicas=dict(enumerate(contender.replicas)),
        threads=contender.threads,
        micro_batch=batch if batch > 1 else None,
        custom_ops=custom_ops,
    ) as pipeline:
        if batch > 1:
            yield BatchedTarget(pipeline, [inputs], max_batch=batch), batch * pipeline.inflight, pipeline
        else:
            yield PipelineTarget(pipeline, [inputs]), pipeline.inflight, pipeline


def memory_of_bytes(pids: Sequence[int]) -> int | None:
    """Memory of processes, where shared pages count once among them; None where the system does not tell."""
    try:
        files = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for text in files for line in text.splitlines() if line.startswith("Pss:"))
