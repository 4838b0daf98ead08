"""The model, the plan and the prompts that the benchmarks of decoding share."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from onnxsplit.planning.planner import partition
from runtime import Pipeline


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the model and its plan."""
    parser.add_argument("--model", type=Path, required=True, help="model.onnx, as models/smollm2.py makes it")
    parser.add_argument("--plan", type=Path, help="its plan; cut in --stages when not given")
    parser.add_argument("--stages", type=int, default=2)


@contextmanager
def plan_of(given: argparse.Namespace) -> Iterator[Path]:
    """The plan's folder; a plan that is made here is removed at the end."""
    if given.plan is not None:
        yield given.plan
        return
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        folder = Path(scratch) / "model.plan"
        partition(given.model, stages=given.stages, out=folder)
        yield folder


def prompt(length: int, seed: int = 0, *, below: int = 40_000) -> list[int]:
    """Random tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, below, length)]


def first_token_s(pipeline: Pipeline, tokens: list[int]) -> float:
    """Seconds from the call to the first token."""
    begun = time.perf_counter()
    pipeline.generate(tokens, max_tokens=1, stop_tokens=()).result()
    return time.perf_counter() - begun


def decode_rate(pipeline: Pipeline, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Tokens per second of all sequences together, from when all have a token until the first ends."""
    generations = [pipeline.generate(one, max_tokens=count, stop_tokens=()) for one in prompts]
    times = [one.result().times_ns for one in generations]
    begun, ended = max(one[0] for one in times), min(one[-1] for one in times)
    return sum(begun < time_ns <= ended for one in times for time_ns in one) / (ended - begun) * 1e9


def processor_s(pids: Sequence[int]) -> float:
    """Processor time of all threads of processes so far, in seconds, from the scheduler's own count."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)
