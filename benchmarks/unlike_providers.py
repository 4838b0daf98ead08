"""Measuring a pipeline of two stages, one on the CPU and one on another provider, in the order that the search chose.

The search gets both as devices of a cluster, whose speeds are measured on the model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import example_models, harness
from onnxsplit.cluster import Cluster, Device
from onnxsplit.errors import OnnxsplitError
from onnxsplit.plan import Plan
from onnxsplit.planning.calibrate import measured
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify
from onnxsplit.timed import TimedModel
from runtime import Pipeline

COLUMNS: dict[str, str] = {
    "model": "15", "cpu_ms": "6.2f", "other_ms": "8.2f", "refused_ops": "11", "ops": "17", "left": "4", "equal": "5",
    "difference": "10.1e", "predicted_per_s": "15.1f", "measured_per_s": "14.1f", "two_cpu_stages": "14.1f",
    "cpu_session": "11.1f", "cpu_2_threads": "13.1f", "other_session": "13.1f",
}  # fmt: skip
"""The columns of a report: times of the whole model with one thread; ops that the provider cannot run; ops of each
stage; ops that it left to the CPU in its stage; `verify`; and requests per second of the pipeline as predicted and as
measured, of two stages on the CPU, and of whole-model sessions with one thread, two threads, and on the provider."""


def compare(given: argparse.Namespace, report: harness.Report, provider: str) -> bool:
    """Print a row for each model.

    Args:
        given: the command line, with ``names``, ``slices`` and ``seconds``.
        report: prints the rows; has :data:`COLUMNS`.
        provider: the provider beside the CPU, as ``--provider`` names it.

    Returns:
        Whether all stages gave the answers of their model.
    """
    good = True
    for name in given.names:
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
            model, dims = example_models.named(name, Path(folder))
            try:
                row = _row(model, dims, Path(folder), provider, given)
            except OnnxsplitError as error:
                report.note(f"{name}: {error}")
                good = False
                continue
            report.row({"model": name, **row})
            good = good and bool(row["equal"])
    return good


def _row(model: Path, dims: dict[str, int], folder: Path, provider: str, given: argparse.Namespace) -> dict[str, Any]:
    mixed, plain = folder / "mixed.plan", folder / "plain.plan"
    devices = Cluster((Device(name="cpu"), Device(name="other", provider=provider)), {})
    (folder / "cluster.toml").write_text(measured(devices, model, dims=dims).to_toml())
    plan = partition(model, stages=2, out=mixed, dims=dims, cluster=folder / "cluster.toml")
    partition(model, stages=2, out=plain, dims=dims, provider="cpu")
    comparisons = verify(mixed, model)
    inputs = harness.example(mixed)
    with ExitStack() as stack:
        one, other = (stack.enter_context(Pipeline.launch(place)) for place in (mixed, plain))
        wanted, found = (pipeline.run(inputs) for pipeline in (other, one))
        contenders: dict[str, Callable[[], float]] = {
            "measured_per_s": lambda: harness.rate(one, inputs, given.seconds),
            "two_cpu_stages": lambda: harness.rate(other, inputs, given.seconds),
        }
        for title, session in _sessions(model, harness.example_path(mixed), plan, provider, stack):
            contenders[title] = lambda session=session: 1e9 / statistics.mean(session.run(given.seconds).wall_ns)
        rates = harness.in_turns(contenders, given.slices)
    use = {use.provider: use for use in plan.providers}
    return {
        "cpu_ms": _ms(use["cpu"].whole_time_ns),
        "other_ms": _ms(use[provider].whole_time_ns),
        "refused_ops": " ".join(f"{count}*{kind}" for kind, count in use[provider].left_to_cpu.items()) or "none",
        "ops": " ".join(f"{stage.device}:{stage.ops}" for stage in plan.stages),
        "left": str(sum(sum(stage.left_to_cpu.values()) for stage in plan.stages)),
        "equal": all(comparison.good for comparison in comparisons),
        "difference": max(_apart(found[name], array) for name, array in wanted.items()),
        "predicted_per_s": plan.prediction.throughput_per_s,
        **{title: statistics.median(values) for title, values in rates.items()},
    }


def _sessions(
    model: Path, inputs: Path, plan: Plan, provider: str, stack: ExitStack
) -> Iterator[tuple[str, TimedModel]]:
    """Sessions of the whole model, each in a process; the provider may not run it."""
    for title, text, threads in (
        ("cpu_session", "cpu", 1),
        ("cpu_2_threads", "cpu", 2),
        ("other_session", provider, 1),
    ):
        timed = TimedModel(model, inputs, threads=threads, level=plan.costs.whole_optimization_level, provider=text)
        try:
            yield title, stack.enter_context(timed)
        except OnnxsplitError:
            continue


def _apart(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the scale."""
    if wanted.dtype.kind not in "fc" or not wanted.size:
        return 0.0 if np.array_equal(found, wanted) else 1.0
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def _ms(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / 1e6
