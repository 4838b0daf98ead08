"""A GPT-2-like decoder (Radford et al. 2019: layer norm before each half, causal, tied output), random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from onnxsplit.export import Recipe


class Block(nn.Module):
    """Causal self-attention, then a wide hidden layer, each with its shortcut."""

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
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(gelu(self.widen(self.norm_hidden(x)), approximate="tanh"))


class Decoder(nn.Module):
    """Tokens in, scores of the next token at every place out. One table embeds tokens and scores them."""

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


def build(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50257,
    positions: int = 1024,
    sequence: int = 64,
) -> Recipe:
    """GPT-2 (124 million weights); fewer ``layers`` and less ``width`` make a small one."""
    torch.manual_seed(0)
    return Recipe(
        network=Decoder(layers, width, heads, vocabulary, positions).eval(),
        inputs={"input_ids": torch.randint(0, vocabulary, (2, sequence))},
        outputs=("logits",),
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}},
    )
