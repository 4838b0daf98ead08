"""Measures how fast a plan runs, compared with its ceiling and with other ways to run the model.

The contenders take turns in short slices, because the speed of a machine drifts, and ratios are computed slice by
slice. All ratios are relative to one contender: one session of the whole model, if that is measured. The **ceiling** of
a plan is the rate of its slowest stage when all stage files run at once, each in a process of its own, without any
communication. Latencies under load are measured after the rates.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec.structs

from onnxsplit.custom_ops import Library, find_libraries, needed_libraries
from onnxsplit.errors import InputError, ModelError
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_base import PlanStruct
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.providers import providers_by_stage
from onnxsplit.session import Session, host_cores, open_session, threads_per_node
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel, run_together
from runtime.bench_load import LoadLatency, latencies_under_load
from runtime.bench_rates import Row, compare
from runtime.load.call import CallTarget
from runtime.load.pipeline import PipelineTarget
from runtime.load.target import LoadTarget
from runtime.options import RunOptions
from runtime.pipeline import Pipeline

PIPELINE = "pipeline"
"""The name of the contender that runs the plan."""

_LATENCY_SLICES = 8

RateMeasure = Callable[[float], float]
"""Measures a contender for some seconds; returns its rate in requests per second."""


class BenchReport(PlanStruct, frozen=True, kw_only=True):
    """The result of :func:`bench`.

    Attributes:
        rows: the contenders, the pipeline first.
        basis: the name of the contender that all ratios are relative to: one session of the whole model, or the
            pipeline where the whole model was not measured.
        loads: latencies of the pipeline and of one session of the whole model under the same loads.
        latency_p50_ns: median latency of the pipeline with one request at a time.
        stages_ns: median time of the same stage files, called one after the other in one process.
        whole_ns: median time of the whole model in one session with all cores; None when it was not measured.
        without_whole: why the whole model was not measured; empty when it was, or was not asked for.
        slices: number of slices of each contender.
        threads: threads of each stage's session.
    """

    rows: tuple[Row, ...]
    basis: str
    loads: tuple[LoadLatency, ...]
    latency_p50_ns: int
    stages_ns: int
    whole_ns: int | None
    without_whole: str
    slices: int
    threads: int


def bench(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    merged: bool = False,
    inputs: str | Path | None = None,
    slices: int = 20,
    slice_seconds: float = 0.5,
    peers: Mapping[str, RateMeasure] | None = None,
    closed: Callable[[Pipeline], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> BenchReport:
    """Measure a plan on this host.

    Args:
        folder: the plan directory.
        model: the whole model, for a comparison with sessions of it; None for no comparison.
        merged: whether ``model`` was merged from the plan's stages. Then the report says why if it does not run.
        inputs: an ``.npz`` with the inputs; the plan's example when None.
        slices: number of slices of each contender.
        slice_seconds: length of a slice.
        peers: further contenders, by name.
        closed: called with the pipeline after it has been closed.
        say: called with a description of each step.
        options: how to run the plan; the attributes of :class:`~runtime.options.RunOptions`.

    Raises:
        InputError: an option is wrong, or the plan leaves out outputs of ``model``.
        PlanError: the folder holds no valid plan.
        PipelineError: the plan does not run.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    _check_outputs(folder, plan, None if merged else model)
    given = load_npz(example := Path(inputs) if inputs is not None else example_file(folder, plan))
    wanted = RunOptions(**options)
    plan = _on_providers(plan, wanted.provider)
    replicas, libraries = wanted.counts(plan), find_libraries(wanted.custom_ops)
    threads = options["threads"] = options.get("threads") or threads_per_node(sum(replicas))
    contenders, without_whole = dict[str, RateMeasure](), ""
    with ExitStack() as stack:
        pipeline = stack.enter_context(Pipeline.launch(folder, **options))
        contenders[PIPELINE] = lambda seconds: _pipeline_rate(pipeline, given, seconds)
        say("loading stages")
        stages = _stage_workers(stack, folder, plan, given, threads, replicas, libraries)
        contenders["ceiling: stages at once, no communication"] = lambda seconds: _ceiling(stages, seconds)
        if model is not None:
            say("loading the whole model")
            try:
                contenders |= _whole_model(stack, Path(model), example, plan, threads, sum(replicas), libraries)
            except ModelError as error:
                model, without_whole = None, _reason(error, merged)
        contenders.update(peers or {})
        rates = _in_turns(contenders, slices, slice_seconds, say)
        chain, whole = _sessions(folder, plan, model, libraries, threads)
        times = _latencies(pipeline, chain, whole, given, 4 * slice_seconds)
        loads = _under_load(pipeline, whole, given, statistics.median(rates[PIPELINE]), slice_seconds, say)
    closed(pipeline)
    return _report(rates, times, loads, slices=slices, threads=threads, without_whole=without_whole)


def _check_outputs(folder: Path, plan: Plan, model: str | Path | None) -> None:
    """Refuse a model that computes more than the plan."""
    if model is not None and plan.dropped_outputs:
        raise InputError(
            f"{folder} leaves out the output {', '.join(plan.dropped_outputs)}, so {model} computes more and cannot "
            "be compared; measure the plan without --model"
        )


def _reason(error: ModelError, merged: bool) -> str:
    """Why a merged model does not run; a model that was given must run."""
    if not merged:
        raise error
    return str(error)


def _report(
    rates: Mapping[str, Sequence[float]],
    times: tuple[list[int], list[int], list[int]],
    loads: tuple[LoadLatency, ...],
    *,
    slices: int,
    threads: int,
    without_whole: str,
) -> BenchReport:
    through, chained, alone = times
    basis = one_session() if one_session() in rates else PIPELINE
    return BenchReport(
        rows=compare(rates, basis),
        basis=basis,
        loads=loads,
        latency_p50_ns=int(statistics.median(through)),
        stages_ns=int(statistics.median(chained)),
        whole_ns=int(statistics.median(alone)) if alone else None,
        without_whole=without_whole,
        slices=slices,
        threads=threads,
    )


def one_session() -> str:
    """The name of the contender that runs the whole model in one session with all cores."""
    return f"one session, {host_cores()} threads"


def _under_load(
    pipeline: Pipeline,
    whole: Session | None,
    inputs: Mapping[str, Array],
    per_s: float,
    slice_seconds: float,
    say: Callable[[str], None],
) -> tuple[LoadLatency, ...]:
    """Latencies of the pipeline, and of one session in this process, at shares of the pipeline's rate."""
    targets: dict[str, LoadTarget] = {PIPELINE: PipelineTarget(pipeline, [inputs])}
    if whole is not None:
        given = {name: inputs[name] for name, _ in whole.inputs}
        targets[one_session()] = CallTarget(lambda: whole.run(given))
    return latencies_under_load(targets, per_s, 2 * slice_seconds, say)


def _whole_model(
    stack: ExitStack,
    model: Path,
    example: Path,
    plan: Plan,
    threads: int,
    processes: int,
    libraries: Sequence[Library],
) -> dict[str, RateMeasure]:
    """The contenders that run the whole model: one session with all cores, and as many processes as the plan has."""
    level, cores = plan.costs.whole_optimization_level, host_cores()

    def start(threads: int, *, spinning: bool) -> TimedModel:
        timed = TimedModel(model, example, threads=threads, level=level, spinning=spinning, custom_ops=libraries)
        return stack.enter_context(timed)

    one = start(cores, spinning=True)
    many = [start(threads, spinning=False) for _ in range(processes)]
    return {
        one_session(): lambda seconds: _rates([one], seconds)[0],
        f"{processes} whole-model processes": lambda seconds: sum(_rates(many, seconds)),
    }


def _sessions(
    folder: Path, plan: Plan, model: str | Path | None, libraries: Sequence[Library], threads: int
) -> tuple[list[tuple[Session, Sequence[str]]], Session | None]:
    """Sessions in this process: one for each stage, with the names of its inputs, and one for the model if given.

    That of the model has as many threads as the host has cores.
    """
    chain: list[tuple[Session, Sequence[str]]] = []
    for stage in plan.stages:
        needed = needed_libraries(libraries, plan, stage.index)
        level = stage.optimization_level
        session = open_session(
            folder / stage.file, threads=threads, level=level, provider=stage.provider, custom_ops=needed
        )
        chain.append((session, stage.inputs))
    if model is None:
        return chain, None
    level = plan.costs.whole_optimization_level
    return chain, open_session(Path(model), threads=host_cores(), level=level, custom_ops=libraries)


def _in_turns(
    contenders: Mapping[str, RateMeasure], slices: int, slice_seconds: float, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """The rates of all contenders in all slices; each contender runs one slice in turn."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(slices + 1):
        say(f"slice {number} of {slices}")
        for name, measure in contenders.items():
            rate = measure(slice_seconds)
            if number:  # the first slice is a warm-up
                rates[name].append(rate)
    return rates


def _on_providers(plan: Plan, provider: str | None) -> Plan:
    """The plan on other providers, as ``--provider`` names them; on its own if None."""
    if provider is None:
        return plan
    planned = [stage.provider for stage in plan.stages]
    named = providers_by_stage(provider, len(planned), default=planned)
    stages = (msgspec.structs.replace(stage, provider=text) for stage, text in zip(plan.stages, named, strict=True))
    return msgspec.structs.replace(plan, stages=tuple(stages))


def _stage_workers(
    stack: ExitStack,
    folder: Path,
    plan: Plan,
    inputs: Mapping[str, Array],
    threads: int,
    replicas: Sequence[int],
    custom_ops: Sequence[Library],
) -> list[list[TimedModel]]:
    """Workers for every replica of every stage, with inputs computed by the stages before it."""
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
    values, workers = dict(inputs), []
    for stage, count in zip(plan.stages, replicas, strict=True):
        feed = scratch / f"{stage.index}.npz"
        save_npz(feed, {name: values[name] for name in stage.inputs})
        needed = needed_libraries(custom_ops, plan, stage.index)
        workers.append(
            [
                stack.enter_context(
                    TimedModel(
                        folder / stage.file,
                        feed,
                        threads=threads,
                        level=stage.optimization_level,
                        provider=stage.provider,
                        custom_ops=needed,
                    )
                )
                for _ in range(count)
            ]
        )
        workers[-1][0].run(0.0)
        workers[-1][0].save_outputs(scratch / "outputs.npz")
        values.update(load_npz(scratch / "outputs.npz"))
    return workers


def _ceiling(stages: Sequence[Sequence[TimedModel]], seconds: float) -> float:
    """The rate of the slowest stage, while all replicas of all stages run."""
    rates = iter(_rates([worker for replicas in stages for worker in replicas], seconds))
    return min(sum(next(rates) for _ in replicas) for replicas in stages)


def _rates(models: Sequence[TimedModel], seconds: float) -> list[float]:
    """The rates of workers that run at the same time."""
    return [len(runs.wall_ns) / (sum(runs.wall_ns) / 1e9) for runs in run_together(models, seconds)]


def _pipeline_rate(pipeline: Pipeline, inputs: Mapping[str, Array], seconds: float) -> float:
    """Answers per second, counted from when the pipeline is full."""
    done: list[float] = []
    end = time.monotonic() + seconds
    pending = []
    while time.monotonic() < end or len(done) < 3:
        future = pipeline.submit(inputs)
        future.add_done_callback(lambda _: done.append(time.monotonic()))
        pending.append(future)
    steady = done[pipeline.inflight :] if len(done) > 2 * pipeline.inflight else list(done)
    rate = (len(steady) - 1) / (steady[-1] - steady[0])
    for future in pending:
        future.result()
    return rate


def _latencies(
    pipeline: Pipeline,
    chain: Sequence[tuple[Session, Sequence[str]]],
    whole: Session | None,
    inputs: Mapping[str, Array],
    seconds: float,
) -> tuple[list[int], list[int], list[int]]:
    """Times in ns of single requests: in the pipeline, in its stages in this process, and in the whole model."""

    def in_turn() -> None:
        values = dict(inputs)
        for session, names in chain:
            values.update(session.run({name: values[name] for name in names}))

    contenders: list[Callable[[], object]] = [lambda: pipeline.run(inputs), in_turn]
    if whole is not None:
        given = {name: inputs[name] for name, _ in whole.inputs}
        contenders.append(lambda: whole.run(given))
    times: list[list[int]] = [[], [], []]
    for _ in range(_LATENCY_SLICES):
        for measured, run in zip(times, contenders, strict=False):  # without the whole model, its list stays empty
            run()  # fills the caches
            end = time.monotonic() + seconds / _LATENCY_SLICES
            while True:
                begun = time.perf_counter_ns()
                run()
                measured.append(time.perf_counter_ns() - begun)
                if time.monotonic() >= end:
                    break
    through, chained, alone = times
    return through, chained, alone
