"""A BERT-base-like encoder (Devlin et al. 2019: layer norm after each half, learnt positions) with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from onnxsplit.export import Recipe


class Layer(nn.Module):
    """Self-attention over the tokens that the mask admits, then a wide hidden layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_output = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = self.norm_attention(x + self.project(mixed))
        return self.norm_output(x + self.narrow(gelu(self.widen(x))))


class Encoder(nn.Module):
    """Takes tokens and a mask of ones and zeros; returns a vector for each token, and one for the whole text."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.pool = nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.tokens(input_ids) + self.positions[: input_ids.shape[1]])
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -10000.0
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pool(x[:, 0]))


def build(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 30522,
    positions: int = 512,
    sequence: int = 128,
) -> Recipe:
    """Return BERT-base. Fewer ``layers`` and a smaller ``width`` give a small model."""
    torch.manual_seed(0)
    shape = (2, sequence)
    return Recipe(
        network=Encoder(layers, width, heads, vocabulary, positions).eval(),
        inputs={
            "input_ids": torch.randint(0, vocabulary, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
        },
        outputs=("last_hidden_state", "pooled"),
        dynamic_axes={
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "sequence"},
        },
    )
