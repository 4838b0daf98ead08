"""Parts of small random decoders: a graph under construction, and the layers that the families share.

A weight follows from its name and the seed alone, so families with the same layers compute the same scores.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import build
import numpy as np
import onnx
from onnx import TensorProto, helper

INT64, FLOAT, BOOL, INT32 = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT32
MICROSOFT = "com.microsoft"
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder; ``groups`` is the number of key/value heads, ``context`` the most positions."""

    layers: int = 3
    width: int = 32
    heads: int = 4
    groups: int = 2
    head: int = 16
    hidden: int = 64
    vocabulary: int = 100
    context: int = 256


SMALL = Size()


class Net:
    """A graph under construction. Each method returns the name of the tensor that it adds."""

    def __init__(self, size: Size, *, seed: int = 0, opset: int = 18, ir_version: int = 10, microsoft: bool = False):
        self.size, self.seed, self.scope = size, seed, ""
        self.opsets = {"": opset} | ({MICROSOFT: 1} if microsoft else {})
        self.ir_version = ir_version
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.made = 0

    def op(self, kind: str, reads: Sequence[str], out: str | None = None, *, domain: str = "", **attributes) -> str:
        """An op with one output."""
        return self.op_many(kind, reads, [out or self.name(kind)], domain=domain, **attributes)[0]

    def op_many(
        self, kind: str, reads: Sequence[str], outs: Sequence[str], *, domain: str = "", **attributes
    ) -> Sequence[str]:
        """An op with several outputs."""
        name = f"{self.scope}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(reads), list(outs), name=name, domain=domain, **attributes))
        return outs

    def name(self, kind: str) -> str:
        """A new name for a tensor."""
        self.made += 1
        return f"{self.scope}/{kind}_{self.made}_output_0"

    def constant(self, name: str, array) -> str:
        self.constants[name] = build.constant(name, np.asarray(array, order="C"))
        return name

    def ints(self, *numbers: int) -> str:
        """A vector of integers."""
        return self.constant("/constants/[" + ",".join(map(str, numbers)) + "]", np.array(numbers, np.int64))

    def integer(self, number: int) -> str:
        """A single integer."""
        return self.constant(f"/constants/{number}", np.array(number, np.int64))

    def real(self, number: float) -> str:
        """A single float."""
        return self.constant(f"/constants/float/{number:.6g}", np.array(number, np.float32))

    def weight(self, name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> str:
        """Random numbers; by default they keep the size of what is multiplied with them."""
        source = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        scale = shape[0] ** -0.5 if scale is None else scale
        return self.constant(name, (around + scale * source.standard_normal(shape)).astype(np.float32))

    def input(self, name: str, shape, kind: int = INT64) -> str:
        self.inputs.append(build.value(name, shape, kind))
        return name

    def output(self, name: str, shape, kind: int = FLOAT) -> str:
        self.outputs.append(build.value(name, shape, kind))
        return name

    def shape(self, tensor: str, axis: int) -> str:
        """The size of one axis, as a single integer."""
        return self.op("Gather", [self.op("Shape", [tensor]), self.integer(axis)], axis=0)

    def scope_of(self, layer: int) -> None:
        """Name what follows after a layer."""
        self.scope = f"/model/layers.{layer}"

    def proto(self) -> onnx.ModelProto:
        return build.model(
            self.nodes,
            self.inputs,
            self.outputs,
            list(self.constants.values()),
            ir_version=self.ir_version,
            opsets=self.opsets,
        )


# Inputs and outputs

PAST = "past_key_values.{layer}.{part}"
PRESENT = "present.{layer}.{part}"
PARTS = ("key", "value")
BOTH = "past_sequence_length + sequence_length"
"""The name of the axis of old and new positions, as optimum has it."""


def tokens(net: Net) -> str:
    return net.input("input_ids", ["batch_size", "sequence_length"])


def mask(net: Net, width: str = BOTH) -> str:
    """Declare attention_mask; ``width`` is the name of its free second axis."""
    return net.input("attention_mask", ["batch_size", width])


def positions(net: Net) -> str:
    return net.input("position_ids", ["batch_size", "sequence_length"])


def caches(net: Net, *, layers: Sequence[int] | None = None, total: str = BOTH) -> None:
    """Declare past and present of the attention layers; ``total`` is the name of the axis of all positions."""
    size = net.size
    for layer in range(size.layers) if layers is None else layers:
        for part in PARTS:
            cache(net, layer, part, total=total, width=size.head)


def cache(net: Net, layer: int, part: str, *, total: str, width: int | str) -> None:
    """Declare past and present of the keys or the values of one layer."""
    for axis, name, declare in (("past_sequence_length", PAST, net.input), (total, PRESENT, net.output)):
        declare(name.format(layer=layer, part=part), ["batch_size", net.size.groups, axis, width], FLOAT)


def scores_output(net: Net) -> None:
    """Declare the scores, as the first output."""
    net.output("logits", ["batch_size", "sequence_length", net.size.vocabulary])
    net.outputs.insert(0, net.outputs.pop())


# Layers

Attention = Callable[[int, str, str, str], str]
"""Takes the layer and what the projections gave, [batch, sequence, heads x head]; returns a tensor of the same form."""


def matmul(net: Net, x: str, weight: str, out: str | None = None) -> str:
    """A linear map without bias, as one MatMul."""
    return net.op("MatMul", [x, weight], out)


def embedded(net: Net, ids: str, *, scale: float = 1.0) -> str:
    """Vectors of the tokens."""
    net.scope = "/model/embed_tokens"
    table = net.weight("model.embed_tokens.weight", net.size.vocabulary, net.size.width, scale=scale)
    return net.op("Gather", [table, ids])


def rms_norm(net: Net, x: str, name: str) -> str:
    """Root mean square normalisation in plain ops."""
    squares = net.op("Pow", [x, net.real(2.0)])
    mean = net.op("ReduceMean", [squares, net.ints(-1)], keepdims=1)
    root = net.op("Sqrt", [net.op("Add", [mean, net.real(1e-6)])])
    scaled = net.op("Mul", [x, net.op("Div", [net.real(1.0), root])])
    return net.op("Mul", [net.weight(name, net.size.width, scale=0.1, around=1.0), scaled])


def standard_rms_norm(net: Net, x: str, name: str) -> str:
    """Root mean square normalisation as the op of opset 23."""
    scale = net.weight(name, net.size.width, scale=0.1, around=1.0)
    return net.op("RMSNormalization", [x, scale], axis=-1, epsilon=1e-6)


def gated(net: Net, x: str, layer: int, linear=matmul) -> str:
    """The gated hidden layer."""
    size, name = net.size, f"model.layers.{layer}.mlp"
    gate = linear(net, x, net.weight(f"{name}.gate_proj.weight", size.width, size.hidden))
    up = linear(net, x, net.weight(f"{name}.up_proj.weight", size.width, size.hidden))
    active = net.op("Mul", [gate, net.op("Sigmoid", [gate])])
    return linear(net, net.op("Mul", [active, up]), net.weight(f"{name}.down_proj.weight", size.hidden, size.width))


def projections(net: Net, layer: int) -> list[str]:
    """The weights that make queries, keys and values."""
    size, name = net.size, f"model.layers.{layer}.self_attn"
    heads = {"q": size.heads, "k": size.groups, "v": size.groups}
    return [net.weight(f"{name}.{part}_proj.weight", size.width, count * size.head) for part, count in heads.items()]


def projected(net: Net, mixed: str, layer: int, linear=matmul) -> str:
    """The linear map after attention."""
    size = net.size
    weight = net.weight(f"model.layers.{layer}.self_attn.o_proj.weight", size.heads * size.head, size.width)
    return linear(net, mixed, weight)


def attended(net: Net, x: str, layer: int, attention: Attention) -> str:
    """Attention between its linear maps."""
    query, key, value = (matmul(net, x, weight) for weight in projections(net, layer))
    return projected(net, attention(layer, query, key, value), layer)


def llama(net: Net, x: str, attention: Attention, *, norm=rms_norm) -> str:
    """All layers and the scores: each half has its norm before it and a residual connection around it."""
    for layer in range(net.size.layers):
        net.scope_of(layer)
        name = f"model.layers.{layer}"
        x = net.op("Add", [x, attended(net, norm(net, x, f"{name}.input_norm.weight"), layer, attention)])
        x = net.op("Add", [x, gated(net, norm(net, x, f"{name}.post_norm.weight"), layer)])
    net.scope = "/model/norm"
    x = norm(net, x, "model.norm.weight")
    net.scope = "/lm_head"
    return scores(net, x)


def scores(net: Net, x: str, linear=matmul) -> str:
    """The scores of all tokens."""
    return linear(net, x, net.weight("lm_head.weight", net.size.width, net.size.vocabulary), "logits")


# Attention in plain ops


def split(net: Net, x: str, heads: int) -> str:
    """[batch, sequence, heads x head] -> [batch, heads, sequence, head]."""
    apart = net.op("Reshape", [x, net.ints(0, 0, heads, net.size.head)])
    return net.op("Transpose", [apart], perm=[0, 2, 1, 3])


def joined(net: Net, x: str) -> str:
    """[batch, heads, sequence, head] -> [batch, sequence, heads x head]."""
    moved = net.op("Transpose", [x], perm=[0, 2, 1, 3])
    return net.op("Reshape", [moved, net.ints(0, 0, net.size.heads * net.size.head)])


def repeated(net: Net, x: str) -> str:
    """Each key/value head once for each query head that reads it."""
    size = net.size
    if size.heads == size.groups:
        return x
    apart = net.op("Unsqueeze", [x, net.ints(2)])
    wide = net.op("Expand", [apart, net.ints(1, 1, size.heads // size.groups, 1, 1)])
    return net.op("Reshape", [wide, net.ints(0, size.heads, -1, size.head)])


def weighted(net: Net, query: str, key: str, value: str, added: Sequence[str]) -> str:
    """Softmax of the products of query and key, plus what is added to them, times value."""
    products = net.op("MatMul", [query, net.op("Transpose", [key], perm=[0, 1, 3, 2])])
    products = net.op("Mul", [products, net.real(net.size.head**-0.5)])
    for one in added:
        products = net.op("Add", [products, one])
    return net.op("MatMul", [net.op("Softmax", [products], axis=-1), value])


def frequencies(size: Size) -> np.ndarray:
    """The speed of each pair of coordinates of the rotary embedding."""
    return (100.0 ** (-np.arange(0, size.head, 2) / size.head)).astype(np.float32)


def angles(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines by position, [context, head / 2]."""
    angle = np.arange(size.context, dtype=np.float32)[:, None] * frequencies(size)[None]
    return np.cos(angle), np.sin(angle)


def rotation(net: Net, places: str, *, gathered: bool) -> tuple[str, str]:
    """Cosines and sines of positions [batch, sequence] (or [1, sequence]), as [batch, 1, sequence, head]."""
    net.scope = "/model/rotary_emb"
    if gathered:
        tables = zip(("cos_cached", "sin_cached"), angles(net.size), strict=True)
        half = [net.op("Gather", [net.constant(name, table), places]) for name, table in tables]
    else:
        speed = net.constant("inv_freq", frequencies(net.size)[None, :])
        place = net.op("Unsqueeze", [net.op("Cast", [places], to=FLOAT), net.ints(-1)])
        angle = net.op("MatMul", [place, speed])
        half = [net.op(kind, [angle]) for kind in ("Cos", "Sin")]
    cos, sin = (net.op("Unsqueeze", [net.op("Concat", [one, one], axis=-1), net.ints(1)]) for one in half)
    return cos, sin


def rotated(net: Net, x: str, cos: str, sin: str) -> str:
    """x * cos + (-second half, first half) * sin."""
    half = net.size.head // 2
    first = net.op("Slice", [x, net.ints(0), net.ints(half), net.ints(3)])
    second = net.op("Slice", [x, net.ints(half), net.ints(2**31 - 1), net.ints(3)])
    turned = net.op("Concat", [net.op("Neg", [second]), first], axis=3)
    return net.op("Add", [net.op("Mul", [x, cos]), net.op("Mul", [turned, sin])])


# The past, and what attention may read of it


def past_length(net: Net, cached: bool) -> str:
    net.scope = "/model"
    return net.shape(PAST.format(layer=0, part="key"), 2) if cached else net.integer(0)


def counted(net: Net, mask: str, new: str) -> str:
    """Positions of the new tokens, counted from the mask."""
    net.scope = "/model/positions"
    counts = net.op("Sub", [net.op("CumSum", [mask, net.integer(1)]), net.integer(1)])
    counts = net.op("Where", [net.op("Equal", [mask, net.integer(0)]), net.integer(1), counts])
    start = net.op("Unsqueeze", [net.op("Neg", [new]), net.ints(0)])
    return net.op("Slice", [counts, start, net.ints(2**31 - 1), net.ints(1)])


def hidden_places(
    net: Net, mask: str, past: str, new: str, positions: str | None = None, window: int | None = None
) -> str:
    """What is added to the products of attention, [batch, 1, sequence, total]: 0, or the lowest float."""
    net.scope = "/model/mask"
    total = net.op("Add", [past, new])
    every = net.op("Range", [net.integer(0), total, net.integer(1)])
    if positions is None:
        own = net.op("Unsqueeze", [net.op("Range", [past, total, net.integer(1)]), net.ints(1)])
    else:
        own = net.op("Unsqueeze", [positions, net.ints(1, 3)])
    later = net.op("Greater", [every, own])
    if window is not None:
        early = net.op("LessOrEqual", [every, net.op("Sub", [own, net.integer(window)])])
        later = net.op("Or", [later, early])
    padding = net.op("Unsqueeze", [net.op("Equal", [mask, net.integer(0)]), net.ints(1, 2)])
    return net.op("Where", [net.op("Or", [later, padding]), net.real(LOWEST), net.real(0.0)])


def extended(net: Net, layer: int, part: str, new: str, cached: bool) -> str:
    """Past and new along the positions; without a cache, the new ones alone."""
    present = PRESENT.format(layer=layer, part=part)
    if not cached:
        return net.op("Identity", [new], present)
    return net.op("Concat", [PAST.format(layer=layer, part=part), new], present, axis=2)
