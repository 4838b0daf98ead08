"""Sampling against a plain reference, and the same draws after a replay and in any grouping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.errors import ModelError
from runtime.node.sampling import TokenSampler
from runtime.wire.messages.sequences import Sampling, StepRow


def row(tokens: tuple[int, ...], start: int = 0) -> StepRow:
    return StepRow(7, 1, 0, start, tokens, True)


def draw(sampling: Sampling, tokens: tuple[int, ...], scores, *, prompt: int = 0, below: int | None = None):
    sampler = TokenSampler(sampling, prompt, below or len(scores))
    sampler.feed(0, tokens)
    return sampler.draw(row(tokens), np.asarray(scores, np.float32))


def candidates(s: Sampling, tokens: tuple[int, ...], scores: list[float], prompt: int) -> dict[int, float]:
    """The probability of every candidate, straight from the definitions."""
    scores = list(scores)
    for token in set(tokens):
        if token < len(scores):
            scores[token] = scores[token] / s.repetition if scores[token] > 0 else scores[token] * s.repetition
    for token in set(tokens[prompt:]):
        if token < len(scores):
            scores[token] -= s.presence + s.frequency * tokens[prompt:].count(token)
    for token, bias in s.bias:
        scores[token] += bias
    left = dict(enumerate(scores))
    if len(tokens) - prompt < s.min_tokens:
        left = {token: score for token, score in left.items() if token not in s.end_tokens}
    if s.temperature == 0:
        return {max(left, key=lambda token: (left[token], -token)): 1.0}
    order = sorted(left, key=lambda token: (-left[token], token))
    if s.top_k:
        order = order[: s.top_k]
    weights = {token: math.exp((left[token] - left[order[0]]) / s.temperature) for token in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token]
        if s.top_p < 1 and reached >= s.top_p * total:
            break
    kept = [token for token in kept if weights[token] >= s.min_p and weights[token] > 0]
    whole = sum(weights[token] for token in kept)
    return {token: weights[token] / whole for token in kept}


# Multiples of powers of two are exact in float32, so that the reference sees the same numbers.
SCORES = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=2, max_size=40)
SAMPLINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 100]),
        "top_p": st.sampled_from([1.0, 0.93, 0.61, 0.1, 0.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.37]),
        "repetition": st.sampled_from([1.0, 2.0, 0.5]),
        "presence": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency": st.sampled_from([0.0, 0.25]),
        "seed": st.integers(0, 1 << 62),
    }
)


@given(SCORES, SAMPLINGS, st.data())
@settings(max_examples=400, deadline=None)
def test_a_token_is_drawn_as_the_definitions_say(scores, options, data):
    token = st.integers(0, len(scores) - 1)
    tokens = tuple(data.draw(st.lists(token, min_size=1, max_size=12)))
    prompt = data.draw(st.integers(0, len(tokens)))
    bias = tuple(data.draw(st.dictionaries(token, st.sampled_from([-8.0, 4.0]), max_size=3)).items())
    ends = (data.draw(token),)
    sampling = Sampling(**options, bias=bias, end_tokens=ends, min_tokens=data.draw(st.sampled_from([0, 3])))
    expected = candidates(sampling, tokens, scores, prompt)
    drawn = draw(sampling, tokens, scores, prompt=prompt)
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=len(tokens))).random()
    reached, right = 0.0, None
    for one in sorted(expected):
        reached += expected[one]
        if right is None and uniform < reached + 1e-9:
            right = one
    near = any(abs(uniform - sum(p for o, p in expected.items() if o <= one)) < 1e-6 for one in expected)
    assert drawn.token in expected
    assert near or drawn.token == right
    assert drawn.position == len(tokens)


def test_draws_follow_the_probabilities():
    scores = np.log([0.05, 0.3, 0.15, 0.4, 0.1])
    sampler = TokenSampler(Sampling(temperature=1.0, seed=11), 0, 5)
    counts = np.zeros(5)
    for position in range(6000):
        counts[sampler.draw(row((0,), position), scores.astype(np.float32)).token] += 1
    assert scipy.stats.chisquare(counts, np.exp(scores) * 6000).pvalue > 1e-4


def test_a_replay_draws_the_same_tokens():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((30, 50)).astype(np.float32)
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition=1.3, frequency=0.4, presence=0.1, seed=5)
    sampler, tokens = TokenSampler(sampling, 3, 50), [1, 2, 3]
    sampler.feed(0, tokens)
    for step in range(27):
        last = (tokens[-1],)
        tokens.append(sampler.draw(row(last, len(tokens) - 1), scores[step]).token)
        sampler.feed(len(tokens) - 1, tokens[-1:])
    replayed = TokenSampler(sampling, 3, 50)
    for begin, end in ((0, 7), (7, 12), (12, 20)):  # the history in chunks, as a replay sends it
        replayed.feed(begin, tokens[begin:end])
    assert replayed.draw(row(tuple(tokens[12:20]), 12), scores[17]).token == tokens[20]


def test_feeding_an_earlier_position_again_replaces_what_followed():
    sampling = Sampling(frequency=3.0)
    scores = [2.0, 1.0, 0.0]
    sampler = TokenSampler(sampling, 1, 3)
    sampler.feed(0, [2, 0])
    assert sampler.draw(row((2, 0)), np.float32(scores)).token == 1
    sampler.feed(1, [1])
    assert sampler.draw(row((1,), 1), np.float32(scores)).token == 0


def test_logarithms_of_probability_are_of_the_models_own_scores():
    scores = [0.5, 3.0, -1.0, 2.0]
    drawn = draw(Sampling(bias=((0, 100.0),), logprobs=3), (1,), scores)
    logs = np.array(scores) - np.log(np.exp(scores).sum())
    assert drawn.token == 0
    assert drawn.logprob == pytest.approx(logs[0], abs=1e-6)
    assert [token for token, _ in drawn.top] == [1, 3, 0]
    assert [log for _, log in drawn.top] == pytest.approx([logs[1], logs[3], logs[0]], abs=1e-6)
    assert draw(Sampling(), (1,), scores).top == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_scores_are_read_as_they_are(dtype):
    import ml_dtypes

    narrow = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    scores = np.array([0.5, 3.0, -1.0], narrow)
    assert TokenSampler(Sampling(temperature=0.5, top_k=1), 1, 3).draw(row((1,)), scores).token == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_named(bad, temperature):
    with pytest.raises(ModelError, match=r"sequence 7 at position 2 hold (nan|inf) for token 1"):
        draw(Sampling(temperature=temperature), (1, 2), [0.0, bad, 1.0])


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_a_temperature_that_rounds_to_zero_takes_the_largest(options):
    assert draw(Sampling(temperature=1e-46, seed=3, **options), (1,), [0.5, 2.0, 3.0, 1.0]).token == 2


def test_padding_behind_the_vocabulary_is_never_drawn():
    assert draw(Sampling(), (1,), [0.0, 1.0, 9.0, math.nan], below=2).token == 1
    assert draw(Sampling(temperature=5.0, seed=3), (1,), [0.0, 1.0, 9.0, 9.0], below=2).token in (0, 1)


def test_a_wide_nucleus_is_found():
    scores = np.zeros(5000, np.float32)
    sampler = TokenSampler(Sampling(temperature=1.0, top_p=0.5, seed=1), 0, 5000)
    drawn = [sampler.draw(row((0,), position), scores).token for position in range(300)]
    assert max(drawn) < 2500 <= max(drawn) + 100
