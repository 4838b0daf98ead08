"""How fast a plan runs, beside what it could reach.

Contenders take turns in short slices, since a machine's speed drifts; ratios are taken slice by slice. The **ceiling**
of a cut is its stage files running at once, a process each, with no communication: the slower one's rate.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from onnxsplit.plan import Plan, Record, example_file, load_plan
from onnxsplit.session import host_cores, threads_per_node
from onnxsplit.tensors import Array, load_npz, save_npz
from onnxsplit.timed import TimedModel, run_together
from runtime.pipeline import Pipeline

_RESAMPLES = 2000


class Row(Record, frozen=True, kw_only=True):
    """One contender: requests a second with a 95 % interval, and the pipeline's rate over its rate, slice by slice."""

    name: str
    per_s: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float


class Report(Record, frozen=True, kw_only=True):
    """What :func:`bench` found. ``stages_ns`` is the sum of the stages' times, each alone."""

    rows: tuple[Row, ...]
    latency_p50_ns: int
    latency_p99_ns: int
    stages_ns: int
    slices: int
    threads: int


def bench(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    inputs: str | Path | None = None,
    threads: int | None = None,
    slices: int = 20,
    slice_seconds: float = 0.5,
    inflight: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a plan on this host's CPU.

    Args:
        folder: the plan directory.
        model: the source model, to compare with whole-model sessions too.
        inputs: an ``.npz``; the plan's example when None.
        threads: threads of a stage; this host's cores divided by the stages when None.
        slices: slices of each contender.
        slice_seconds: length of one.
        inflight: requests in flight in the pipeline.
        say: told what is being done.
    """
    folder = Path(folder)
    plan = load_plan(folder)
    example = Path(inputs) if inputs is not None else example_file(folder, plan)
    given = load_npz(example)
    threads = threads or threads_per_node(len(plan.stages))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
        say("loading stages")
        stages = [stack.enter_context(worker) for worker in _stage_workers(folder, plan, given, threads, scratch)]
        contenders: dict[str, Callable[[], float]] = {}
        pipeline = stack.enter_context(Pipeline.launch(folder, threads=threads, inflight=inflight))
        contenders["pipeline"] = lambda: _pipeline_rate(pipeline, given, slice_seconds)
        contenders["ceiling: stages at once, no communication"] = lambda: min(_rates(stages, slice_seconds))
        if model is not None:
            say("loading the whole model")
            level, cores, count = plan.costs.whole_optimization_level, host_cores(), len(plan.stages)
            one = stack.enter_context(TimedModel(Path(model), example, threads=cores, level=level, spinning=True))
            many = [
                stack.enter_context(TimedModel(Path(model), example, threads=threads, level=level))
                for _ in range(count)
            ]
            contenders[f"one session, {cores} threads"] = lambda: _rates([one], slice_seconds)[0]
            contenders[f"{count} whole-model processes"] = lambda: sum(_rates(many, slice_seconds))
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(slices + 1):
            say(f"slice {number} of {slices}")
            for name, measure in contenders.items():
                rate = measure()
                if number:  # the first warms up
                    rates[name].append(rate)
        say("latency")
        latencies = _latencies(pipeline, given, max(1.0, slice_seconds))
        alone = sum(int(statistics.median(stage.run(slice_seconds, least=3))) for stage in stages)
    return Report(
        rows=tuple(_row(name, rates[name], rates["pipeline"]) for name in contenders),
        latency_p50_ns=int(statistics.median(latencies)),
        latency_p99_ns=sorted(latencies)[int(len(latencies) * 0.99)],
        stages_ns=alone,
        slices=slices,
        threads=threads,
    )


def _stage_workers(
    folder: Path, plan: Plan, inputs: Mapping[str, Array], threads: int, scratch: Path
) -> Sequence[TimedModel]:
    """A worker for every stage, with the inputs that the stages before it give."""
    values, workers = dict(inputs), []
    for stage in plan.stages:
        feed = scratch / f"{stage.index}.npz"
        save_npz(feed, {name: values[name] for name in stage.inputs})
        worker = TimedModel(folder / stage.file, feed, threads=threads, level=stage.optimization_level)
        with TimedModel(folder / stage.file, feed, threads=threads, level=stage.optimization_level) as once:
            once.run(0.0)
            once.save_outputs(scratch / "outputs.npz")
        values.update(load_npz(scratch / "outputs.npz"))
        workers.append(worker)
    return workers


def _rates(models: Sequence[TimedModel], seconds: float) -> list[float]:
    return [len(times) / (sum(times) / 1e9) for times in run_together(models, seconds)]


def _pipeline_rate(pipeline: Pipeline, inputs: Mapping[str, Array], seconds: float) -> float:
    """Answers a second between the first and the last of a full pipeline."""
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


def _latencies(pipeline: Pipeline, inputs: Mapping[str, Array], seconds: float) -> list[int]:
    found: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(found) < 5:
        begun = time.perf_counter_ns()
        pipeline.run(inputs)
        found.append(time.perf_counter_ns() - begun)
    return found


def _row(name: str, rates: Sequence[float], own: Sequence[float]) -> Row:
    ratios = [mine / other for mine, other in zip(own, rates, strict=True)]
    low, high = _interval(rates)
    ratio_low, ratio_high = _interval(ratios)
    return Row(
        name=name,
        per_s=statistics.median(rates),
        low=low,
        high=high,
        ratio=statistics.median(ratios),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap with a fixed seed."""
    source = random.Random(0)  # noqa: S311  statistics, not secrets
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[int(_RESAMPLES * 0.025)], medians[int(_RESAMPLES * 0.975)]
