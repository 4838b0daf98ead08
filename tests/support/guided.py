"""One sequence of a random model that follows a grammar."""

from __future__ import annotations

import numpy as np
import text_plans

from runtime.guided.guide import GuidedTokenizer
from runtime.node.sampling import TokenSampler
from runtime.wire.messages.sequences import Sampling, StepRow

TOKENIZER = text_plans.small_tokenizer()
END, SIZE = text_plans.END, TOKENIZER.get_vocab_size()


class Guided:
    """One sequence with a random model, and its sampler."""

    def __init__(
        self, tokenizer: GuidedTokenizer, grammar: str, *, vocabulary: int = SIZE, prompt=(40, 41), **sampling
    ) -> None:
        self.sampling = Sampling(end_tokens=(END,), grammar=grammar, **sampling)
        self.tokenizer, self.vocabulary, self.prompt = tokenizer, vocabulary, prompt
        self.tokens = list(prompt)
        self.sampler = self.fresh()

    def fresh(self) -> TokenSampler:
        guide = self.tokenizer.guide(self.sampling.grammar)
        return TokenSampler(self.sampling, len(self.prompt), self.vocabulary, guide)

    def scores(self) -> np.ndarray:
        """Random scores, which depend on the position."""
        return np.random.default_rng(len(self.tokens)).normal(0, 3, self.vocabulary).astype(np.float32)

    def draw(self, start: int, sampler: TokenSampler | None = None) -> int:
        sampler = sampler or self.sampler
        new = tuple(self.tokens[start:])
        sampler.feed(start, new)
        return sampler.draw(StepRow(1, 1, 0, start, new, True), self.scores()).token

    def finish(self, most: int = 200) -> str:
        start = 0
        while self.tokens[-1] != END:
            assert len(self.tokens) < most, TOKENIZER.decode(self.tokens)
            token = self.draw(start)
            start = len(self.tokens)
            self.tokens.append(token)
        return TOKENIZER.decode(self.tokens[len(self.prompt) : -1])
