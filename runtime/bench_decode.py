"""Measures how fast a plan continues sequences, compared with other ways to run its model.

The contenders take turns, because the speed of a machine drifts, and ratios are computed turn by turn. In each turn a
contender continues the same sequences by the same number of tokens, and the time of each token is taken.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError
from onnxsplit.plan import Plan
from onnxsplit.plan_base import PlanStruct
from onnxsplit.plan_decoder import Decoder
from onnxsplit.plan_files import load_plan
from onnxsplit.session import threads_per_node
from runtime.bench_rates import Row, compare
from runtime.options import RunOptions
from runtime.pipeline import Pipeline

Prompts = Sequence[Sequence[int]]
"""The tokens of each sequence at its beginning."""


@dataclass(frozen=True)
class TokenTimes:
    """When the tokens of some sequences came, in nanoseconds.

    Attributes:
        begun_ns: when all sequences were begun.
        times_ns: for each sequence, the times of its new tokens.
    """

    begun_ns: int
    times_ns: tuple[tuple[int, ...], ...]

    @property
    def per_s(self) -> float:
        """New tokens of all sequences per second, from the beginning to the last token."""
        last = max(times[-1] for times in self.times_ns)
        return sum(map(len, self.times_ns)) / max(1e-9, (last - self.begun_ns) / 1e9)


DecodeMeasure = Callable[[Prompts, int], TokenTimes]
"""Continues sequences by a number of tokens, and takes the times."""


class DecodeRow(PlanStruct, frozen=True, kw_only=True):
    """One contender.

    Attributes:
        rate: its rate in tokens per second, with intervals; the ratio is relative to the basis of the report.
        first_ns: median time from the beginning to the first token of a text.
        between_ns: median time between two tokens of a text.
        between_p99_ns: 99th percentile of that time.
    """

    rate: Row
    first_ns: int
    between_ns: int
    between_p99_ns: int


class DecodeReport(PlanStruct, frozen=True, kw_only=True):
    """The result of :func:`bench_decode`.

    Attributes:
        rows: the contenders, the pipeline first.
        basis: the name of the contender that all ratios are relative to: the first one of ``peers``, or the pipeline.
        sequences: the number of sequences at once.
        tokens: the number of new tokens of each.
        context: the number of tokens at the beginning of each.
        turns: the number of turns of each contender.
        threads: threads of each session.
    """

    rows: tuple[DecodeRow, ...]
    basis: str
    sequences: int
    tokens: int
    context: int
    turns: int
    threads: int


def bench_decode(
    folder: str | Path,
    *,
    sequences: int,
    tokens: int,
    context: int | None = None,
    turns: int = 5,
    peers: Callable[[Plan, int], Mapping[str, DecodeMeasure]] = lambda _plan, _threads: {},
    closed: Callable[[Pipeline], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> DecodeReport:
    """Measure how fast a plan continues sequences, which begin with random tokens, on this host's CPU.

    Args:
        folder: the plan directory.
        sequences: the number of sequences at once.
        tokens: the number of tokens to add to each.
        context: the number of tokens at the beginning of each; a quarter of the length, at most 64, when None.
        turns: the number of turns of each contender, after one that is not counted.
        peers: gives further contenders, by name, for the plan and the number of threads of each session.
        closed: called with the pipeline after it has been closed.
        say: called with a description of each step.
        options: how to run the plan; the attributes of :class:`~runtime.options.RunOptions`.

    Raises:
        InputError: an option is wrong, or the plan has no decoder.
        PlanError: the folder holds no valid plan.
        PipelineError: the plan does not run.
    """
    plan = load_plan(folder)
    if plan.decoder is None:
        raise InputError(f"{folder} has no decoder, so it cannot generate tokens; measure it without --decode")
    context = min(64, plan.decoder.max_length // 4) if context is None else context
    prompts = random_prompts(plan.decoder, sequences, context)
    options["threads"] = threads = options.get("threads") or threads_per_node(sum(RunOptions(**options).counts(plan)))
    options["max_rows"] = max(sequences, options.get("max_rows") or 0)
    with Pipeline.launch(folder, **options) as pipeline:
        contenders: dict[str, DecodeMeasure] = {"pipeline": lambda p, count: _in_pipeline(pipeline, p, count)}
        say("loading the whole model")
        contenders.update(peers(plan, threads))
        measured: dict[str, list[TokenTimes]] = {name: [] for name in contenders}
        for turn in range(turns + 1):
            say(f"turn {turn} of {turns}")
            for name, measure in contenders.items():
                times = measure(prompts, tokens)
                if turn:  # the first one is a warm-up
                    measured[name].append(times)
    closed(pipeline)
    rates = {name: [times.per_s for times in measured[name]] for name in measured}
    basis = list(rates)[min(1, len(rates) - 1)]
    return DecodeReport(
        rows=tuple(_row(row, measured[row.name]) for row in compare(rates, basis)),
        basis=basis,
        sequences=sequences,
        tokens=tokens,
        context=context,
        turns=turns,
        threads=threads,
    )


def random_prompts(decoder: Decoder, sequences: int, length: int) -> list[list[int]]:
    """The beginnings of some sequences; the same arguments give the same ones."""
    source = random.Random(0)  # noqa: S311  examples, not secrets
    below = min(decoder.vocabulary, decoder.tokens_below or decoder.vocabulary)
    return [[source.randrange(below) for _ in range(max(1, length))] for _ in range(sequences)]


def _in_pipeline(pipeline: Pipeline, prompts: Prompts, tokens: int) -> TokenTimes:
    generations = [pipeline.generate(prompt, max_tokens=tokens, stop_tokens=()) for prompt in prompts]
    results = [generation.result() for generation in generations]
    return TokenTimes(min(r.submitted_ns for r in results), tuple(r.times_ns for r in results))


def _row(rate: Row, turns: Sequence[TokenTimes]) -> DecodeRow:
    firsts = [times[0] - turn.begun_ns for turn in turns for times in turn.times_ns]
    gaps = sorted(b - a for turn in turns for times in turn.times_ns for a, b in pairwise(times))
    return DecodeRow(
        rate=rate,
        first_ns=int(statistics.median(firsts)),
        between_ns=int(statistics.median(gaps)) if gaps else 0,
        between_p99_ns=gaps[int(len(gaps) * 0.99)] if gaps else 0,
    )
