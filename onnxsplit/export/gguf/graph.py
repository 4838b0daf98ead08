"""The graph of a decoder: the layers of the llama family, driven by the weights that a file has.

    input_ids      [batch, sequence]         the new tokens
    attention_mask [batch, total]            1 for each position of a row, the new ones included
    past_key_values.N.key, .value            [batch, heads of keys, past, numbers of a head]
    -> logits, and present.N.key, .value     of the length total

A layer is attention and a gated hidden layer, each after a norm and with a residual connection. GroupQueryAttention
holds the rotary embedding and the cache, so that a runtime can keep the cache in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxsplit.export.conversion import Precision
from onnxsplit.export.gguf.model_file import MICROSOFT, StreamedModel
from onnxsplit.export.gguf.network import DecoderNetwork
from onnxsplit.export.gguf.weights import Form, GGUFWeights, form_of

_POSITIONS = 4096  # of the rotary tables that are made at a time


class DecoderGraph:
    """Adds a decoder to a model.

    Args:
        model: the model.
        network: the decoder.
        weights: its weights.
        wanted: how weights are written.
    """

    def __init__(self, model: StreamedModel, network: DecoderNetwork, weights: GGUFWeights, wanted: Precision) -> None:
        self._model, self._network, self._weights, self._wanted = model, network, weights, wanted
        self._tables: dict[bool, tuple[str, str]] = {}

    def build(self) -> None:
        """Add all layers, the embedding and the scores.

        Raises:
            ExportError: a weight is missing, or has other sizes.
        """
        model, network = self._model, self._network
        model.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        model.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        model.output("logits", ["batch", "sequence", network.vocabulary])
        lengths = self._lengths()
        table = ("token_embd.weight", network.vocabulary, network.width)
        x = model.rows("input_ids", *table, self._form(table[0]), "embedding")
        if network.architecture.scaled:
            x = model.op("Mul", [x, self._number("embedding/scale", math.sqrt(network.width))], "embedding/scaled")
        for layer in range(network.layers):
            x = self._layer(x, layer, lengths)
        x = self._norm(x, "output_norm.weight", "normed")
        own = "output.weight" in self._weights
        scores = self._linear(
            x, "output" if own else "token_embd", network.vocabulary, network.width, self._out("logits")
        )
        if network.score_cap:
            cap = self._number("scores/cap", network.score_cap)
            bounded = model.op("Tanh", [model.op("Div", [scores, cap], "scores/divided")], "scores/bounded")
            model.op("Mul", [bounded, cap], "logits")

    def _out(self, name: str) -> str:
        return "scores" if self._network.score_cap else name

    def _layer(self, x: str, layer: int, lengths: Sequence[str]) -> str:
        model, weight, out = self._model, f"blk.{layer}.", f"layer.{layer}/"
        mixed = self._attention(self._norm(x, f"{weight}attn_norm.weight", f"{out}attention_norm"), layer, lengths)
        x = model.op("Add", [x, self._after(mixed, f"{weight}post_attention_norm.weight")], f"{out}attended")
        gated = self._gated(self._norm(x, f"{weight}ffn_norm.weight", f"{out}hidden_norm"), layer)
        return model.op("Add", [x, self._after(gated, f"{weight}post_ffw_norm.weight")], f"layer.{layer + 1}/x")

    def _attention(self, x: str, layer: int, lengths: Sequence[str]) -> str:
        model, network = self._model, self._network
        weight, out = f"blk.{layer}.attn_", f"layer.{layer}/"
        width, narrow = network.heads * network.head, network.groups * network.head
        sizes = {"q": width, "k": narrow, "v": narrow}
        projected = [self._linear(x, weight + part, size, network.width, out + part) for part, size in sizes.items()]
        for place, part in enumerate("qk"):
            if f"{weight}{part}_norm.weight" in self._weights:
                projected[place] = self._head_norm(projected[place], f"{weight}{part}_norm.weight", sizes[part])
        cache = ("key", "value")
        past = [f"past_key_values.{layer}.{part}" for part in cache]
        present = [f"present.{layer}.{part}" for part in cache]
        for name in past:
            model.input(name, TensorProto.FLOAT, ["batch", network.groups, "past", network.head])
        for name in present:
            model.output(name, ["batch", network.groups, "total", network.head])
        attributes: dict[str, Any] = {
            "num_heads": network.heads,
            "kv_num_heads": network.groups,
            "do_rotary": 1,
            "rotary_interleaved": int(network.architecture.interleaved),
            "scale": network.scale,
        }
        if network.attention_cap:
            attributes["softcap"] = network.attention_cap
        if network.windows[layer] is not None:
            attributes["local_window_size"] = network.windows[layer]
        reads = [*projected, *past, *lengths, *self._rotary(layer)]
        mixed = model.op("GroupQueryAttention", reads, f"{out}mixed", *present, domain=MICROSOFT, **attributes)
        return self._linear(mixed, f"{weight}output", network.width, width, f"{out}output")

    def _gated(self, x: str, layer: int) -> str:
        model, network = self._model, self._network
        weight, out = f"blk.{layer}.ffn_", f"layer.{layer}/"
        gate, up = (
            self._linear(x, weight + part, network.hidden, network.width, out + part) for part in ("gate", "up")
        )
        if network.architecture.gelu:
            active = model.op("Gelu", [gate], f"{out}gelu", approximate="tanh")
        else:
            active = model.op("Mul", [gate, model.op("Sigmoid", [gate], f"{out}sigmoid")], f"{out}silu")
        gated = model.op("Mul", [active, up], f"{out}gated")
        return self._linear(gated, f"{weight}down", network.width, network.hidden, f"{out}down")

    def _norm(self, x: str, weight: str, out: str) -> str:
        return self._model.norm(x, weight, self._network.width, out, self._network.epsilon)

    def _after(self, x: str, weight: str) -> str:
        """The norm after a half of a layer, where the file has one."""
        return self._norm(x, weight, f"{x}/normed") if weight in self._weights else x

    def _head_norm(self, x: str, weight: str, size: int) -> str:
        """A norm of each head."""
        model, network = self._model, self._network
        split = model.constant("heads/split", np.array([0, 0, -1, network.head], np.int64))
        whole = model.constant(f"heads/{size}", np.array([0, 0, size], np.int64))
        heads = model.op("Reshape", [x, split], f"{x}/heads")
        normed = model.norm(heads, weight, network.head, f"{x}/heads_norm", network.epsilon)
        return model.op("Reshape", [normed, whole], f"{x}/normed")

    def _linear(self, x: str, weight: str, rows: int, columns: int, out: str) -> str:
        return self._model.linear(x, f"{weight}.weight", rows, columns, self._form(f"{weight}.weight"), out)

    def _form(self, weight: str) -> Form:
        return form_of(self._weights.entry(weight).type, self._wanted)

    def _number(self, name: str, value: float) -> str:
        return self._model.constant(name, np.array(value, np.float32))

    def _lengths(self) -> tuple[str, str]:
        """The last position of each row, and the width of the mask, which GroupQueryAttention reads as int32."""
        model = self._model
        one = model.constant("one", np.array([1], np.int64))
        counts = model.op("ReduceSum", ["attention_mask", one], "mask/counts", keepdims=1)
        last = model.op("Sub", [counts, one], "mask/last_int64")
        total = model.op(
            "Squeeze", [model.op("Shape", ["attention_mask"], "mask/shape", start=1, end=2)], "mask/total_int64"
        )
        return (
            model.op("Cast", [last], "mask/last", to=TensorProto.INT32),
            model.op("Cast", [total], "mask/total", to=TensorProto.INT32),
        )

    def _rotary(self, layer: int) -> tuple[str, str]:
        """The tables of a layer's rotary embedding; all layers of a kind share them."""
        network, is_local = self._network, self._network.has_local_rotary(layer)
        if is_local not in self._tables:
            names = ("local_cosines", "local_sines") if is_local else ("cosines", "sines")
            shape = (network.context, network.head // 2)
            rooms = [self._model.room(name, np.dtype(np.float32), shape) for name in names]
            for first in range(0, network.context, _POSITIONS):
                positions = np.arange(first, min(network.context, first + _POSITIONS))
                for room, part in zip(rooms, network.rotary(layer, positions), strict=True):
                    room[positions[0] : positions[-1] + 1] = part
            self._tables[is_local] = (names[0], names[1])
        return self._tables[is_local]
