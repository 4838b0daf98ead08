"""The decoder in plain NumPy on the file's own weights, a layer at a time: what the exported model is compared with."""

from __future__ import annotations

import math

import numpy as np

from onnxsplit.export.gguf.network import DecoderNetwork
from onnxsplit.export.gguf.weights import GGUFWeights
from onnxsplit.tensors import Array


class NumpyDecoder:
    """Computes scores and caches of whole prompts; no more than one weight is held at a time.

    Args:
        network: the decoder.
        weights: its weights.
    """

    def __init__(self, network: DecoderNetwork, weights: GGUFWeights) -> None:
        self._network, self._weights = network, weights

    def run(self, tokens: Array) -> dict[str, Array]:
        """Scores and caches, by the names of the exported model's outputs.

        Args:
            tokens: the prompts, int64 [batch, sequence], all of one length.
        """
        with np.errstate(all="ignore"):  # a damaged file may hold any number
            return self._run(tokens)

    def _run(self, tokens: Array) -> dict[str, Array]:
        network = self._network
        x = self._rows(tokens)
        if network.architecture.scaled:
            x = x * np.float32(math.sqrt(network.width))
        outputs: dict[str, Array] = {}
        for layer in range(network.layers):
            x = self._layer(x, layer, outputs)
        x = self._norm(x, "output_norm.weight")
        scores = self._linear(x, "output" if "output.weight" in self._weights else "token_embd", network.vocabulary)
        if network.score_cap:
            scores = np.tanh(scores / network.score_cap) * network.score_cap
        return {"logits": scores.astype(np.float32), **outputs}

    def _layer(self, x: Array, layer: int, outputs: dict[str, Array]) -> Array:
        weight = f"blk.{layer}."
        mixed = self._attention(self._norm(x, f"{weight}attn_norm.weight"), layer, outputs)
        x = x + self._after(mixed, f"{weight}post_attention_norm.weight")
        inner = self._norm(x, f"{weight}ffn_norm.weight")
        gate, up = (self._linear(inner, f"{weight}ffn_{part}", self._network.hidden) for part in ("gate", "up"))
        if self._network.architecture.gelu:
            gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        down = self._linear(gate * up, f"{weight}ffn_down", self._network.width)
        return x + self._after(down, f"{weight}post_ffw_norm.weight")

    def _attention(self, x: Array, layer: int, outputs: dict[str, Array]) -> Array:
        network, weight = self._network, f"blk.{layer}.attn_"
        sizes = {"q": network.heads, "k": network.groups, "v": network.groups}
        q, k, v = (self._heads(self._linear(x, weight + part, size * network.head)) for part, size in sizes.items())
        q, k = (
            self._norm(one, f"{weight}{part}_norm.weight") if f"{weight}{part}_norm.weight" in self._weights else one
            for part, one in (("q", q), ("k", k))
        )
        tables = network.rotary(layer, np.arange(x.shape[1]))
        q, k = (_rotated(one, *tables, interleaved=network.architecture.interleaved) for one in (q, k))
        outputs[f"present.{layer}.key"], outputs[f"present.{layer}.value"] = k, v
        k, v = (one.repeat(network.heads // network.groups, axis=1) for one in (k, v))
        products = q @ k.swapaxes(-1, -2) * np.float32(network.scale)
        if network.attention_cap:
            products = np.tanh(products / network.attention_cap) * network.attention_cap
        back = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])[None]
        seen = (back >= 0) & (back < (network.windows[layer] or x.shape[1]))
        products = np.where(seen, products, -np.inf)
        share = np.exp(products - products.max(-1, keepdims=True))
        mixed = (share / share.sum(-1, keepdims=True)) @ v
        return self._linear(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1), f"{weight}output", network.width)

    def _heads(self, x: Array) -> Array:
        """[batch, sequence, width] as [batch, heads, sequence, numbers of a head]."""
        heads: Array = x.reshape(*x.shape[:2], -1, self._network.head).swapaxes(1, 2)
        return heads

    def _norm(self, x: Array, weight: str) -> Array:
        scale = self._weights.vector(weight, x.shape[-1])
        normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self._network.epsilon)) * scale
        return normed

    def _after(self, x: Array, weight: str) -> Array:
        return self._norm(x, weight) if weight in self._weights else x

    def _linear(self, x: Array, weight: str, rows: int) -> Array:
        out = np.empty((*x.shape[:-1], rows), np.float32)
        for place, floats in self._weights.chunks(f"{weight}.weight", rows, x.shape[-1]):
            out[..., place] = x @ floats.T
        return out + self._weights.vector(f"{weight}.bias", rows) if f"{weight}.bias" in self._weights else out

    def _rows(self, tokens: Array) -> Array:
        table = ("token_embd.weight", self._network.vocabulary, self._network.width)
        return self._weights.rows(*table, tokens)


def _rotated(x: Array, cosines: Array, sines: Array, *, interleaved: bool) -> Array:
    """Pairs of coordinates, rotated by the angle of their position."""
    pairs = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    left, right = pairs
    turned = left * cosines - right * sines, left * sines + right * cosines
    if not interleaved:
        return np.concatenate(turned, axis=-1)
    return np.stack(turned, axis=-1).reshape(x.shape)
