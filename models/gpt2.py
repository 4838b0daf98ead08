"""A GPT-2-like decoder (Radford et al. 2019: layer norm before each half, causal, tied output) with random weights.

``build`` makes a decoder that reads a whole text. ``with_cache`` makes a decoder whose cached keys and values are
inputs and outputs, with the names that Hugging Face Optimum uses.
"""

from __future__ import annotations

import torch
from llama import cache_names, causal
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from onnxsplit.export import Recipe


class Block(nn.Module):
    """Causal self-attention, then a wide hidden layer, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_hidden = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(x)
        return self.rest(x, scaled_dot_product_attention(query, key, value, is_causal=True))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each of shape [batch, heads, length, width of a head]."""
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The part of the block after attention."""
        x = x + self.project(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(gelu(self.widen(self.norm_hidden(x)), approximate="tanh"))

    def step(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention with the cached keys and values of earlier tokens."""
        query, key, value = self.parts(x)
        key, value = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + causal(x.shape[1], past_key.shape[2])
        return self.rest(x, scores.softmax(-1) @ value), key, value


class Decoder(nn.Module):
    """Takes tokens; returns scores of the next token at every position. One table embeds tokens and scores them."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


class Stepping(Decoder):
    """Takes tokens and the cache; returns scores of the next token, and the cache."""

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        length = past[0].shape[2]
        places = length + torch.arange(input_ids.shape[1])
        x, present = self.tokens(input_ids) + self.positions[places], []
        for number, block in enumerate(self.blocks):
            x, key, value = block.step(x, past[2 * number], past[2 * number + 1])
            present += [key, value]
        return (self.norm(x) @ self.tokens.weight.T, *present)


def with_cache(
    layers: int = 4, width: int = 256, heads: int = 8, vocabulary: int = 1000, positions: int = 256
) -> Recipe:
    """Return a small decoder whose cache is among its inputs and outputs."""
    torch.manual_seed(0)
    axes = {name: {0: "batch", 2: "past_sequence"} for name in cache_names("past_key_values", layers)}
    past = {name: torch.randn(2, heads, 3, width // heads) for name in axes}
    return Recipe(
        network=Stepping(layers, width, heads, vocabulary, positions).eval(),
        inputs={"input_ids": torch.randint(0, vocabulary, (2, 5)), **past},
        outputs=("logits", *cache_names("present", layers)),
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}, **axes},
    )


def build(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50257,
    positions: int = 1024,
    sequence: int = 64,
) -> Recipe:
    """Return GPT-2 (124 million weights). Fewer ``layers`` and a smaller ``width`` give a small model."""
    torch.manual_seed(0)
    return Recipe(
        network=Decoder(layers, width, heads, vocabulary, positions).eval(),
        inputs={"input_ids": torch.randint(0, vocabulary, (2, sequence))},
        outputs=("logits",),
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}},
    )
