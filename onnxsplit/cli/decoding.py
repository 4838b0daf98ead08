"""Compares a pipeline that continues sequences with one session of the whole model, for ``verify`` and ``bench``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxsplit.custom_ops import find_libraries
from onnxsplit.decoder.reference import ReferenceDecoder, StepRunner, last_scores
from onnxsplit.plan import Plan
from onnxsplit.plan_decoder import Decoder
from onnxsplit.plan_files import load_plan
from onnxsplit.session import Session, open_session
from runtime.bench_decode import DecodeMeasure, Prompts, TokenTimes, random_prompts
from runtime.pipeline import Pipeline

_PROMPT = 8
_STEPS = 64


@dataclass(frozen=True)
class DecodeComparison:
    """The pipeline beside one session of the whole model: the most probable tokens after the same prompt.

    Attributes:
        steps: the number of tokens that both have chosen.
        equal: how many of them are equal before the first different one.
        difference: the largest difference of the scores up to there, as a share of their scale.
        allowed: the difference that is allowed.
        margin: where tokens differ, by how much the whole model prefers its token, as a share of the scale; else 0.
    """

    steps: int
    equal: int
    difference: float
    allowed: float
    margin: float

    @property
    def good(self) -> bool:
        """Whether scores agree, and tokens differ only where the allowed difference decides between two of them."""
        return self.difference <= self.allowed and (self.equal == self.steps or self.margin <= 2 * self.allowed)


def compare_decoding(
    folder: Path, model: Path, *, threads: int, allowed: float, custom_ops: Sequence[str]
) -> DecodeComparison | None:
    """Continue a text in a pipeline of the plan and in one session of the model; None where it has no decoder.

    Args:
        folder: the plan directory.
        model: the source model.
        threads: threads of each session.
        allowed: the difference of scores that is allowed, as a share of their scale.
        custom_ops: libraries of custom ops.
    """
    plan = load_plan(folder)
    decoder = plan.decoder
    if decoder is None:
        return None
    prompt = random_prompts(decoder, 1, min(_PROMPT, decoder.max_length - 1))[0]
    steps = min(_STEPS, decoder.max_length - len(prompt))
    whole = ReferenceDecoder(_session(model, plan, threads, custom_ops), decoder, plan.tensors)
    expected, scores = whole.greedy(prompt, steps)
    with Pipeline.launch(folder, threads=threads, max_rows=1, custom_ops=custom_ops) as pipeline:
        result = pipeline.generate(prompt, max_tokens=steps, stop_tokens=(), scores=True).result()
    assert result.scores is not None, "they were asked for"
    return _compared(expected, scores, result.tokens, np.stack(result.scores), allowed)


def _compared(
    expected: Sequence[int], scores: np.ndarray, found: Sequence[int], resident: np.ndarray, allowed: float
) -> DecodeComparison:
    steps = len(expected)
    equal = next((i for i in range(steps) if expected[i] != found[i]), steps)
    compared = slice(0, min(equal + 1, steps))  # the scores that led to the first different token are comparable
    wide, other = scores.astype(np.float64)[compared], resident.astype(np.float64)[compared]
    scale = max(float(np.abs(wide).max()), 1e-30)
    margin = float(wide[equal][expected[equal]] - wide[equal][found[equal]]) / scale if equal < steps else 0.0
    return DecodeComparison(steps, equal, float(np.abs(wide - other).max()) / scale, allowed, margin)


def _session(model: Path, plan: Plan, threads: int, custom_ops: Sequence[str]) -> Session:
    level, libraries = plan.costs.whole_optimization_level, find_libraries(custom_ops)
    return open_session(model, threads=threads, level=level, custom_ops=libraries)


def whole_model(model: Path, custom_ops: Sequence[str]) -> Callable[[Plan, int], Mapping[str, DecodeMeasure]]:
    """The contender that continues sequences in one session of the whole model, with states in place where it can."""

    def contender(plan: Plan, threads: int) -> Mapping[str, DecodeMeasure]:
        decoder = plan.decoder
        assert decoder is not None, "the plan was checked"
        runner = StepRunner(_session(model, plan, threads, custom_ops), decoder, plan.tensors)
        named = f"one session, {threads} thread" + ("s" if threads > 1 else "")
        return {named: lambda prompts, tokens: _in_session(runner, decoder, prompts, tokens)}

    return contender


def _in_session(runner: StepRunner, decoder: Decoder, prompts: Prompts, tokens: int) -> TokenTimes:
    """Read each prompt in a run of its own, then step all texts together; one by one where rows cannot share a run."""
    begun = time.monotonic_ns()
    if decoder.rows == "one":
        times = [_step_together(runner, decoder, [prompt], tokens)[0] for prompt in prompts]
    else:
        times = _step_together(runner, decoder, prompts, tokens)
    return TokenTimes(begun, tuple(times))


def _step_together(runner: StepRunner, decoder: Decoder, prompts: Prompts, tokens: int) -> list[tuple[int, ...]]:
    firsts, filled, times = [], [], []
    length = len(prompts[0])
    for prompt in prompts:
        scores, states = runner.run([0], [prompt], runner.empty(1, length + tokens), all_scores=False, shared=True)
        firsts.append(int(last_scores(scores)[0].argmax()))
        filled.append(states)
        times.append([time.monotonic_ns()])
    axes = {state.past: state.batch_axis for state in decoder.states}
    states = {past: np.concatenate([one[past] for one in filled], axis=axes[past]) for past in filled[0]}
    chosen = firsts
    for step in range(tokens - 1):
        scores, states = runner.run(
            [length + step] * len(prompts),
            [[token] for token in chosen],
            states,
            layout=decoder.rows,
            all_scores=False,
            shared=True,
        )
        chosen = [int(token) for token in last_scores(scores).argmax(axis=-1)]
        now = time.monotonic_ns()
        for each in times:
            each.append(now)
    return [tuple(each) for each in times]
