"""Small random decoders that mislead: names against structure, caches in one piece, inputs without a role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import decoder_parts as parts
import decoders
import numpy as np
import onnx
from decoder_parts import FLOAT, SMALL, Net, Size

NO_GROUPS = Size(groups=4)


def crossed(size: Size = SMALL, *, seed: int = 0) -> onnx.ModelProto:
    """A plain decoder whose outputs of layers 0 and 1 have exchanged their names: names and structure disagree.

    Feeding back by structure (``present.1.key`` to ``past_key_values.0.key``) is right, by names it is wrong.
    """
    model = decoders.plain(size, seed=seed)
    swap = {
        parts.PRESENT.format(layer=a, part=part): parts.PRESENT.format(layer=1 - a, part=part)
        for a in (0, 1)
        for part in parts.PARTS
    }
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]
        node.output[:] = [swap.get(name, name) for name in node.output]
    return model


def stacked(size: Size = SMALL, *, seed: int = 0) -> onnx.ModelProto:
    """All caches in one tensor, ``past`` to ``present``, [layers, 2, batch, groups, positions, head]."""
    net = Net(size, seed=seed)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    shape = [size.layers, 2, "batch_size", size.groups, "past_sequence_length", size.head]
    past = net.input("past", shape, FLOAT)
    net.output("present", [*shape[:4], parts.BOTH, size.head])
    parts.scores_output(net)
    x = parts.embedded(net, ids)
    hidden_places = parts.hidden_places(net, mask, net.shape(past, 4), net.shape(x, 1))
    cos, sin = parts.rotation(net, places, gathered=False)
    layers: list[str] = []

    def extended(layer: int, part: int, new: str) -> str:
        old = net.op("Gather", [net.op("Gather", [past, net.integer(layer)], axis=0), net.integer(part)], axis=0)
        return net.op("Concat", [old, new], axis=2)

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.rotated(net, parts.split(net, query, size.heads), cos, sin)
        key = extended(layer, 0, parts.rotated(net, parts.split(net, key, size.groups), cos, sin))
        value = extended(layer, 1, parts.split(net, value, size.groups))
        pair = [net.op("Unsqueeze", [one, net.ints(0)]) for one in (key, value)]
        layers.append(net.op("Unsqueeze", [net.op("Concat", pair, axis=0), net.ints(0)]))
        mixed = parts.weighted(net, query, parts.repeated(net, key), parts.repeated(net, value), [hidden_places])
        return parts.joined(net, mixed)

    parts.llama(net, x, attention)
    net.op("Concat", layers, "present", axis=0)
    return net.proto()


def puzzling(size: Size = SMALL, *, seed: int = 0) -> onnx.ModelProto:
    """A plain decoder with a further input, ``style`` [batch, width], added to the vectors: no role explains it."""
    model = decoders.plain(size, seed=seed)
    model.graph.input.append(onnx.helper.make_tensor_value_info("style", FLOAT, ["batch_size", size.width]))
    readers = [node for node in model.graph.node if node.name.startswith("/model/embed_tokens")]
    (embedding,) = readers
    vectors = embedding.output[0]
    embedding.output[0] = f"{vectors}_plain"
    index = list(model.graph.node).index(embedding)
    axis = onnx.helper.make_node("Unsqueeze", ["style", "/constants/[1]"], ["style_row"], name="/style/Unsqueeze")
    added = onnx.helper.make_node("Add", [f"{vectors}_plain", "style_row"], [vectors], name="/style/Add")
    model.graph.node.insert(index + 1, added)
    model.graph.node.insert(index + 1, axis)
    if all(one.name != "/constants/[1]" for one in model.graph.initializer):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "/constants/[1]"))
    return model


def relative_bias(size: Size = NO_GROUPS, *, seed: int = 0) -> onnx.ModelProto:
    """T5's relative bias: by the distance of places in the buffer, so a gap inside a row changes what it means."""
    net, ids, mask = _without_rotary(size, seed)
    x = parts.embedded(net, ids)
    past, new = parts.past_length(net, True), net.shape(x, 1)
    net.scope = "/model/bias"
    total = net.op("Add", [past, new])
    every = net.op("Range", [net.integer(0), total, net.integer(1)])
    own = net.op("Unsqueeze", [net.op("Range", [past, total, net.integer(1)]), net.ints(1)])
    distance = net.op("Clip", [net.op("Sub", [own, every]), net.integer(0), net.integer(31)])
    table = net.weight("relative_attention_bias.weight", 32, size.heads, scale=2.0)
    bias = net.op(
        "Unsqueeze", [net.op("Transpose", [net.op("Gather", [table, distance])], perm=[2, 0, 1]), net.ints(0)]
    )
    return _finished(net, x, [bias, parts.hidden_places(net, mask, past, new)])


def alibi(size: Size = NO_GROUPS, *, seed: int = 0) -> onnx.ModelProto:
    """BLOOM's bias: a slope of each head times the position of what is read, counted from the mask."""
    net, ids, mask = _without_rotary(size, seed)
    x = parts.embedded(net, ids)
    net.scope = "/model/alibi"
    counts = net.op("Mul", [net.op("Sub", [net.op("CumSum", [mask, net.integer(1)]), net.integer(1)]), mask])
    counts = net.op("Unsqueeze", [net.op("Cast", [counts], to=FLOAT), net.ints(1, 2)])
    slopes = net.constant("slopes", (2.0 ** -np.arange(1, size.heads + 1)).astype(np.float32)[None, :, None, None])
    bias = net.op("Mul", [counts, slopes])
    past = parts.past_length(net, True)
    return _finished(net, x, [bias, parts.hidden_places(net, mask, past, net.shape(x, 1))])


def unequal_heads(
    size: Size = SMALL, *, seed: int = 0, groups: Sequence[int] = (1, 2, 4), asks_heads: bool = False
) -> onnx.ModelProto:
    """A plain decoder whose layers have other numbers of key/value heads, as OpenELM's have.

    Args:
        size: sizes, but for the number of key/value heads.
        seed: of the weights.
        groups: the number of key/value heads of each layer.
        asks_heads: the mask asks the first cache for its number of heads, too, not for its positions alone.
    """
    net = Net(size, seed=seed)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    sizes = [replace(size, groups=count) for count in groups]
    for layer, net.size in enumerate(sizes):
        parts.caches(net, layers=[layer])
    parts.scores_output(net)
    x = parts.embedded(net, ids)
    added = [parts.hidden_places(net, mask, parts.past_length(net, cached=True), net.shape(ids, 1))]
    if asks_heads:
        heads = net.op("Sub", [net.shape(parts.PAST.format(layer=0, part="key"), 1), net.integer(groups[0])])
        added.append(net.op("Cast", [heads], to=FLOAT))
    cos, sin = parts.rotation(net, places, gathered=False)
    for layer, net.size in enumerate(sizes):
        net.scope_of(layer)
        attention = decoders.rotary_attention(net, cos, sin, added)
        normed = parts.rms_norm(net, x, f"model.layers.{layer}.input_norm.weight")
        x = net.op("Add", [x, parts.attended(net, normed, layer, attention)])
    parts.scores(net, x)
    return net.proto()


def _without_rotary(size: Size, seed: int) -> tuple[Net, str, str]:
    net = Net(size, seed=seed)
    ids, mask = parts.tokens(net), parts.mask(net)
    parts.caches(net)
    parts.scores_output(net)
    return net, ids, mask


def _finished(net: Net, x: str, added: list[str]) -> onnx.ModelProto:
    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.split(net, query, net.size.heads)
        pair = {"key": key, "value": value}
        both = [
            parts.repeated(net, parts.extended(net, layer, part, parts.split(net, one, net.size.groups), True))
            for part, one in pair.items()
        ]
        return parts.joined(net, parts.weighted(net, query, *both, added))

    parts.llama(net, x, attention)
    return net.proto()
