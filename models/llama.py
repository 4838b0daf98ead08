"""A Llama-like decoder with random weights, whose key/value cache is among its inputs and outputs.

Grouped-query attention (Ainslie et al. 2023), rotary position embedding (Su et al. 2021), RMS norm before each half,
a gated hidden layer (SwiGLU, Shazeer 2020). The cache has the names that Hugging Face Optimum uses:
``past_key_values.N.key`` in, ``present.N.key`` out, [batch, groups, length, width of a head].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from onnxsplit.export import Recipe


def cache_names(kind: str, layers: int) -> tuple[str, ...]:
    """Names of the cache's tensors, layer by layer."""
    return tuple(f"{kind}.{layer}.{what}" for layer in range(layers) for what in ("key", "value"))


def causal(sequence: int, past: int) -> Tensor:
    """Scores to add: 0 for the positions that a token may attend to, minus infinity for later ones."""
    places = torch.arange(past + sequence)
    return torch.where(places[None, :] <= places[past:, None], 0.0, float("-inf"))


def rotated(x: Tensor, past: int, base: float) -> Tensor:
    """Rotary position embedding: pairs of coordinates are rotated by an angle that grows with the position."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half) / half)
    angle = (past + torch.arange(x.shape[-2]))[:, None] * speed[None, :]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class Norm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.scale


class Layer(nn.Module):
    """Attention over cached and new tokens, then the gated hidden layer."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm_attention, self.norm_hidden = Norm(width), Norm(width)
        self.query = nn.Linear(width, heads * self.size, bias=False)
        self.key = nn.Linear(width, groups * self.size, bias=False)
        self.value = nn.Linear(width, groups * self.size, bias=False)
        self.project = nn.Linear(heads * self.size, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def split(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.size).transpose(1, 2)

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        past, normed = past_key.shape[2], self.norm_attention(x)
        query = rotated(self.split(self.query(normed), self.heads), past, 10000.0)
        key = torch.cat((past_key, rotated(self.split(self.key(normed), self.groups), past, 10000.0)), 2)
        value = torch.cat((past_value, self.split(self.value(normed), self.groups)), 2)
        batch, _, sequence, _ = query.shape
        together = query.view(batch, self.groups, self.heads // self.groups, sequence, self.size)
        scores = together @ key[:, :, None].transpose(3, 4) / self.size**0.5 + causal(sequence, past)
        mixed = (scores.softmax(-1) @ value[:, :, None]).reshape(batch, self.heads, sequence, self.size)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, sequence, self.heads * self.size))
        normed = self.norm_hidden(x)
        return x + self.down(silu(self.gate(normed)) * self.up(normed)), key, value


class Decoder(nn.Module):
    """Takes tokens and the cache; returns scores of the next token, and the cache."""

    def __init__(self, layers: int, width: int, heads: int, groups: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, groups, hidden) for _ in range(layers))
        self.norm = Norm(width)
        self.scores = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        x, present = self.tokens(input_ids), []
        for number, layer in enumerate(self.layers):
            x, key, value = layer(x, past[2 * number], past[2 * number + 1])
            present += [key, value]
        return (self.scores(self.norm(x)), *present)


def build(
    layers: int = 4, width: int = 256, heads: int = 8, groups: int = 2, hidden: int = 688, vocabulary: int = 1000
) -> Recipe:
    """Return a small decoder. More ``layers`` and a larger ``width`` give a large model."""
    torch.manual_seed(0)
    axes = {name: {0: "batch", 2: "past_sequence"} for name in cache_names("past_key_values", layers)}
    past = {name: torch.randn(2, groups, 3, width // heads) for name in axes}
    return Recipe(
        network=Decoder(layers, width, heads, groups, hidden, vocabulary).eval(),
        inputs={"input_ids": torch.randint(0, vocabulary, (2, 5)), **past},
        outputs=("logits", *cache_names("present", layers)),
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}, **axes},
    )
