"""Chooses the next token of a sequence from the scores of the last stage. Pure; NumPy only.

The steps, in this order, as in vLLM and transformers:

    1. repetition, presence and frequency change the scores of tokens that were seen; bias is added
    2. end tokens are no candidates before ``min_tokens``
    3. with temperature 0, the largest score wins; of equal ones, the token with the smallest number
    4. scores are divided by the temperature
    5. top_k, then top_p among those, then min_p leave the candidates
    6. one random number chooses among the candidates, in the order of their numbers

Where the text must match a grammar, only tokens that it allows are candidates, after step 2. That comes before the end
tokens of ``min_tokens``: if the grammar allows nothing else, the text ends.

The random number follows from the seed and the position alone (Philox, a counter-based generator [1]_). A token that is
drawn again after a replay, or beside other rows, is therefore the same as long as the scores are.

References:
    .. [1] Salmon et al., Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from onnxsplit.errors import ModelError
from runtime.wire.messages.sequences import Drawn, Sampling, StepRow

Scores = np.ndarray[Any, Any]
Allowed = np.ndarray[Any, np.dtype[np.bool_]]
_NUCLEUS = 1024  # tokens that are sorted first; a nucleus is rarely larger


class Guide(Protocol):
    """Says which tokens may follow in one text; see :class:`runtime.guided.guide.GrammarGuide`."""

    def follow(self, tokens: Sequence[int]) -> None:
        """Note the next tokens of the text."""

    def back(self, count: int) -> None:
        """Forget the last tokens of the text."""

    def allowed(self, below: int) -> tuple[Allowed, bool]:
        """Whether each token below a bound may follow, and whether the text may end here."""


class TokenSampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: how.
        prompt: the number of tokens that the caller gave.
        below: tokens are below this number; scores behind it are padding.
        guide: what the text after the prompt may hold; None for anything.
    """

    def __init__(self, sampling: Sampling, prompt: int, below: int, guide: Guide | None = None) -> None:
        self._sampling = sampling
        self._prompt = prompt
        self._below = below
        self._guide = guide
        self._guided = 0  # the number of tokens of the text that the guide has followed
        self._tokens: list[int] = []
        s = sampling
        self._temperature = np.float32(s.temperature)  # one that rounds to 0 is 0
        self._counts = s.repetition != 1 or s.presence != 0 or s.frequency != 0  # whether seen tokens matter
        self._plain = not (self._counts or s.bias or s.min_tokens)
        self._seen: Counter[int] = Counter()
        self._text: Counter[int] = Counter()  # the same without the prompt
        self._bias = np.array([token for token, _ in s.bias], np.int64), np.array([b for _, b in s.bias], np.float32)

    def feed(self, start: int, tokens: Sequence[int]) -> None:
        """Note tokens of the sequence; those from ``start`` on that were noted before are replaced."""
        if start < len(self._tokens):
            self._tokens = self._tokens[:start]
            if self._guide is not None and (replaced := self._guided - max(0, start - self._prompt)) > 0:
                self._guide.back(replaced)
                self._guided -= replaced
            self._seen = Counter(self._tokens)
            self._text = Counter(self._tokens[self._prompt :])
        self._tokens += tokens
        if self._counts:
            self._seen.update(tokens)
            self._text.update(tokens[max(0, self._prompt - start) :])

    def draw(self, row: StepRow, scores: Scores) -> Drawn:
        """Choose the token that follows the tokens noted so far.

        Args:
            row: the row of the step.
            scores: one for each token, [vocabulary], of any floating type; they are not changed.

        Raises:
            ModelError: the scores are no numbers, no token is a candidate, or the guide cannot go on.
        """
        position = row.start + len(row.tokens)
        raw = scores if scores.dtype == np.float32 else scores.astype(np.float32)
        candidates = raw[: self._below]
        if not self._plain:
            candidates = self._changed(candidates.copy(), position)
        if self._guide is not None:
            candidates = self._only_allowed(self._guide, candidates, raw[: self._below])
        token = int(candidates.argmax())
        if not math.isfinite(candidates[token]):
            raise ModelError(
                f"the scores of sequence {row.sequence} at position {position} hold {candidates[token]} for token "
                f"{token}, so no token can be chosen"
            )
        if self._temperature > 0:
            token = self._drawn(candidates, float(candidates[token]), position)
        logprob, top = self._logprobs(raw, token)
        return Drawn(row.sequence, row.epoch, position, token, logprob, top)

    def _changed(self, scores: Scores, position: int) -> Scores:
        """Steps 1 and 2, in place."""
        s = self._sampling
        if self._counts:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            seen = seen[seen < len(scores)]
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / np.float32(s.repetition), values * np.float32(s.repetition))
            text = np.fromiter(self._text, np.int64, len(self._text))
            times = np.fromiter(self._text.values(), np.float32, len(self._text))
            within = text < len(scores)
            scores[text[within]] -= np.float32(s.presence) + np.float32(s.frequency) * times[within]
        if s.bias:
            np.add.at(scores, *self._bias)
        if position - self._prompt < s.min_tokens and s.end_tokens:
            scores[np.array(s.end_tokens, np.int64)] = -np.inf
        return scores

    def _only_allowed(self, guide: Guide, candidates: Scores, raw: Scores) -> Scores:
        """The candidates without the tokens that the guide forbids; only end tokens where it allows none."""
        guide.follow(self._tokens[self._prompt + self._guided :])
        self._guided = max(0, len(self._tokens) - self._prompt)
        allowed, may_end = guide.allowed(len(candidates))
        ends = np.array(self._sampling.end_tokens, np.int64)
        allowed[ends] = may_end
        left = np.where(allowed, candidates, -np.inf)
        if left.max() > -np.inf:
            return left
        if not allowed.any():
            allowed[ends] = True
        return np.where(allowed, raw, -np.inf)  # nothing but the end tokens, which come too soon for min_tokens

    def _drawn(self, scores: Scores, largest: float, position: int) -> int:
        """Steps 4 to 6."""
        s = self._sampling
        tokens: Scores | None = None  # None for all
        if 0 < s.top_k < len(scores):
            tokens = _largest(scores, s.top_k)
            scores = scores[tokens]
        weights = np.exp((scores - np.float32(largest)) / self._temperature)
        if s.top_p < 1 or s.min_p > 0:
            kept = _nucleus(weights, s.top_p) if s.top_p < 1 else np.arange(len(weights))
            kept = kept[weights[kept] >= s.min_p]  # the largest weight is 1
            weights, tokens = weights[kept], kept if tokens is None else tokens[kept]
        ends = np.cumsum(weights, dtype=np.float64)
        uniform = np.random.Generator(np.random.Philox(key=s.seed, counter=position)).random()
        at = int(np.searchsorted(ends, uniform * ends[-1], side="right"))
        if at == len(ends):  # rounded up
            at = int(np.flatnonzero(weights)[-1])
        return at if tokens is None else int(tokens[at])

    def _logprobs(self, scores: Scores, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Natural logarithms of probabilities by the model's own scores: of a token, and of the most probable ones."""
        count = self._sampling.logprobs
        if count < 0:
            return 0.0, ()
        largest = float(scores.max())
        total = largest + float(np.log(np.exp(scores - np.float32(largest)).sum(dtype=np.float64)))
        best = _largest(scores, min(count, len(scores))) if count else np.empty(0, np.int64)
        best = best[np.argsort(-scores[best], kind="stable")]
        return float(scores[token]) - total, tuple([(int(other), float(scores[other]) - total) for other in best])


def _largest(values: Scores, count: int) -> Scores:
    """The indices of the largest values, ascending; of equal values, the smaller indices."""
    if count >= len(values):
        return np.arange(len(values))
    least = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: Scores, share: float) -> Scores:
    """The indices of the largest weights that reach a share of the sum together, ascending; at least one.

    Of equal weights, those with smaller indices come first.
    """
    wanted = share * weights.sum(dtype=np.float64)
    count = min(_NUCLEUS, len(weights))
    while True:
        best = _largest(weights, count)
        best = best[np.argsort(-weights[best], kind="stable")]
        sums = np.cumsum(weights[best], dtype=np.float64)
        if sums[-1] >= wanted or count == len(weights):
            break
        count = min(count * 8, len(weights))
    return np.sort(best[: int(np.searchsorted(sums, wanted)) + 1])
