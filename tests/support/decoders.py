"""Small random decoders, one function for each way in which the ecosystem writes them; NumPy and onnx alone make them.

All have a vocabulary of 100 tokens. Weights follow from their names and the seed (``decoder_parts``), so ``gqa``,
``plain``, ``merged``, ``torch_export``, ``attention23`` and ``tensor_scatter`` of one size compute the same scores, up
to rounding. ``decoder_runs.FAMILIES`` lists all of them, and ``decoder_runs.Reference`` runs them step by step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import decoder_parts as parts
import numpy as np
import onnx
from decoder_parts import BOOL, FLOAT, INT32, LOWEST, MICROSOFT, PAST, PRESENT, SMALL, Net, Size
from onnx import helper

TWO_LAYERS, FOUR_LAYERS, NARROW_HEADS = Size(layers=2), Size(layers=4), Size(groups=4, head=8)

# onnxruntime-genai's builder


def gqa(
    size: Size = SMALL,
    *,
    seed: int = 0,
    int4: bool = False,
    rotary: str = "inside",
    positions: bool = False,
    packed: bool = True,
    window: int = -1,
    rolling: bool = False,
    free_width: bool = False,
) -> onnx.ModelProto:
    """The builder of onnxruntime-genai: GroupQueryAttention, lengths from the mask, skip connections in the norms.

    All keys come before all values among the inputs and outputs.

    Args:
        size: sizes.
        seed: of the weights.
        int4: linear maps are MatMulNBits of 4 bits.
        rotary: ``inside`` GroupQueryAttention, or ``outside`` of it: RotaryEmbedding, which reads position_ids.
        positions: declare position_ids also where no op reads it, as older builders did.
        packed: one linear map makes queries, keys and values; only with rotary ``inside``.
        window: the ``local_window_size`` of all layers; -1 for none.
        rolling: the buffers keep the last ``window`` positions only (``sliding_window_cache``). ONNX Runtime refuses a
            past with fewer places than that, so such a model does not run on an empty past.
        free_width: the last axis of the caches is ``kv_cache_dim``; only genai_config.json says how wide it is.
    """
    net = Net(size, seed=seed, opset=21, microsoft=True)
    ids, mask = parts.tokens(net), parts.mask(net, "total_sequence_length")
    places = parts.positions(net) if positions or rotary == "outside" else ""
    for part in parts.PARTS:
        for layer in range(size.layers):
            width = "kv_cache_dim" if free_width else size.head
            parts.cache(net, layer, part, total="total_sequence_length", width=width)
    parts.scores_output(net)
    lengths = _lengths(net, mask)
    linear = _four_bits if int4 else parts.matmul
    tables = [
        net.constant(name, table) for name, table in zip(("cos_cache", "sin_cache"), parts.angles(size), strict=True)
    ]

    def attention(layer: int, x: str) -> str:
        weights = parts.projections(net, layer)
        if rotary == "outside":
            query, key, value = (linear(net, x, weight) for weight in weights)
            query, key = (
                net.op("RotaryEmbedding", [one, places, *tables], domain=MICROSOFT, num_heads=heads)
                for one, heads in ((query, size.heads), (key, size.groups))
            )
        elif packed:
            query, key, value = linear(net, x, _side_by_side(net, weights)), "", ""
        else:
            query, key, value = (linear(net, x, weight) for weight in weights)
        names = [PAST.format(layer=layer, part=part) for part in parts.PARTS]
        reads = [query, key, value, *names, *lengths, *(tables if rotary == "inside" else [])]
        writes = [net.name("GroupQueryAttention"), *(PRESENT.format(layer=layer, part=part) for part in parts.PARTS)]
        return net.op_many(
            "GroupQueryAttention", reads, writes, domain=MICROSOFT,
            num_heads=size.heads, kv_num_heads=size.groups, scale=size.head**-0.5, local_window_size=window,
            softcap=0.0, do_rotary=int(rotary == "inside"), rotary_interleaved=0,
            **({"sliding_window_cache": 1} if rolling else {}),
        )[0]  # fmt: skip

    _skipping(net, parts.embedded(net, ids), attention, linear)
    return net.proto()


def _lengths(net: Net, mask: str) -> tuple[str, str]:
    """The last position of each row, and the width of the mask, both of 32 bits."""
    net.scope = "/model/attn_mask_reformat/attn_mask_subgraph"
    one = net.op("Constant", [], value=onnx.numpy_helper.from_array(np.array([1], np.int64)))
    counts = net.op("ReduceSum", [mask, one], keepdims=0)
    last = net.op("Cast", [net.op("Sub", [counts, one])], to=INT32)
    return last, net.op("Cast", [net.shape(mask, 1)], to=INT32)


def _side_by_side(net: Net, weights: Sequence[str]) -> str:
    """One weight that gives the results of several, one after another."""
    arrays = [onnx.numpy_helper.to_array(net.constants.pop(weight)) for weight in weights]
    return net.constant(weights[0].replace("q_proj", "qkv_proj"), np.concatenate(arrays, axis=1))


def _skipping(net: Net, x: str, attention, linear) -> None:
    """Layers whose norms also add: SkipSimplifiedLayerNormalization gives the normed sum and the sum."""
    size = net.size

    def norm(one: str, other: str, name: str) -> tuple[str, str]:
        scale = net.weight(name, size.width, scale=0.1, around=1.0)
        outs = [net.name("Skip"), "", "", net.name("Sum")]
        done = net.op_many(
            "SkipSimplifiedLayerNormalization", [one, other, scale], outs, domain=MICROSOFT, epsilon=1e-6
        )
        return done[0], done[3]

    normed, hidden = "", ""
    for layer in range(size.layers):
        net.scope_of(layer)
        name = f"model.layers.{layer}"
        if layer == 0:
            scale = net.weight(f"{name}.input_norm.weight", size.width, scale=0.1, around=1.0)
            normed = net.op("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=1e-6, stash_type=1)
        else:
            normed, x = norm(x, hidden, f"{name}.input_norm.weight")
        mixed = parts.projected(net, attention(layer, normed), layer, linear)
        normed, x = norm(x, mixed, f"{name}.post_norm.weight")
        hidden = parts.gated(net, normed, layer, linear)
    net.scope = "/model/norm"
    normed, _ = norm(x, hidden, "model.norm.weight")
    net.scope = "/lm_head"
    parts.scores(net, normed, linear)


def _four_bits(net: Net, x: str, weight: str, out: str | None = None) -> str:
    """A linear map as MatMulNBits: blocks of 32 numbers with one scale, two numbers in a byte, 8 for zero."""
    matrix = onnx.numpy_helper.to_array(net.constants.pop(weight))
    rows, columns = matrix.shape
    blocks = matrix.T.reshape(columns, rows // 32, 32)
    scale = np.abs(blocks).max(-1) / 7
    numbers = (np.rint(blocks / scale[..., None]) + 8).astype(np.uint8)
    packed = net.constant(f"{weight}_Q4", numbers[..., 0::2] | numbers[..., 1::2] << 4)
    reads = [x, packed, net.constant(f"{weight}_scales", scale.astype(np.float32))]
    sizes = {"K": rows, "N": columns, "bits": 4, "block_size": 32, "accuracy_level": 4}
    return net.op("MatMulNBits", reads, out, domain=MICROSOFT, **sizes)


def write_genai_config(folder: Path, size: Size = SMALL, *, end_token: int | list[int] = 2) -> Path:
    """Write genai_config.json as the builder does."""
    inputs = {name: name for name in ("input_ids", "attention_mask")}
    inputs |= {f"past_{part}_names": f"past_key_values.%d.{part}" for part in parts.PARTS}
    outputs = {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in parts.PARTS}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": size.head,
        "hidden_size": size.width,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.groups,
    }
    content = {
        "model": {
            "bos_token_id": 1,
            "context_length": size.context,
            "decoder": decoder,
            "eos_token_id": end_token,
            "pad_token_id": 0,
            "type": "llama",
            "vocab_size": size.vocabulary,
        },
        "search": {"do_sample": False, "max_length": size.context, "past_present_share_buffer": True},
    }
    path = folder / "genai_config.json"
    path.write_text(json.dumps(content, indent=4))
    return path


def write_config(folder: Path, size: Size = SMALL, *, end_token: int | list[int] = 2) -> Path:
    """Write config.json as transformers does."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": end_token,
        "head_dim": size.head,
        "hidden_size": size.width,
        "max_position_embeddings": size.context,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.groups,
        "vocab_size": size.vocabulary,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(content, indent=2))
    return path


# Plain ops, as optimum and transformers.js have them


def plain(
    size: Size = SMALL,
    *,
    seed: int = 0,
    positions: bool = True,
    gathered: bool = False,
    by_position: bool = False,
) -> onnx.ModelProto:
    """Optimum's export of a Llama: Concat of past and new, a mask that asks a hidden tensor for its shape.

    Args:
        size: sizes.
        seed: of the weights.
        positions: position_ids is an input; otherwise positions are counted from the mask.
        gathered: rotary tables are gathered; otherwise they are computed from the positions.
        by_position: a token reads the places of the buffer whose number is at most its position, so a row with padding
            reads too little; otherwise it reads those up to its own place, as transformers has it.
    """
    net = Net(size, seed=seed)
    ids, mask = parts.tokens(net), parts.mask(net)
    given = parts.positions(net) if positions else None
    parts.caches(net)
    parts.scores_output(net)
    _plain(net, ids, mask, given, cached=True, gathered=gathered, by_position=by_position)
    return net.proto()


def _plain(
    net: Net, ids: str, mask: str, given: str | None, *, cached: bool, gathered: bool = False, by_position: bool = False
) -> None:
    x = parts.embedded(net, ids)
    past, new = parts.past_length(net, cached), net.shape(x, 1)
    places = given or parts.counted(net, mask, new)
    hidden_places = parts.hidden_places(net, mask, past, new, places if by_position else None)
    cos, sin = parts.rotation(net, places, gathered=gathered)
    attention = rotary_attention(net, cos, sin, [hidden_places], cached=cached)
    parts.llama(net, x, attention)


def rotary_attention(net: Net, cos: str, sin: str, added: Sequence[str], *, cached: bool = True) -> parts.Attention:
    size = net.size

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.rotated(net, parts.split(net, query, size.heads), cos, sin)
        key = parts.rotated(net, parts.split(net, key, size.groups), cos, sin)
        key = parts.extended(net, layer, "key", key, cached)
        value = parts.extended(net, layer, "value", parts.split(net, value, size.groups), cached)
        mixed = parts.weighted(net, query, parts.repeated(net, key), parts.repeated(net, value), added)
        return parts.joined(net, mixed)

    return attention


def merged(size: Size = SMALL, *, seed: int = 0) -> onnx.ModelProto:
    """The merged decoder of optimum and transformers.js: one If on ``use_cache_branch``, two complete decoders inside.

    The branch without a cache does not read the past; both share the weights of the outer graph. attention_mask is
    declared as wide as the new tokens, which is right only in the branch without a cache.
    """
    net = Net(size, seed=seed)
    ids, mask, given = parts.tokens(net), parts.mask(net, "sequence_length"), parts.positions(net)
    parts.caches(net)
    parts.scores_output(net)
    branches = {}
    for branch, cached in (("then_branch", True), ("else_branch", False)):
        net.nodes = []
        _plain(net, ids, mask, given, cached=cached)
        branches[branch] = helper.make_graph(net.nodes, branch, [], net.outputs)
    net.nodes, net.scope = [], ""
    net.input("use_cache_branch", [1], BOOL)
    net.op_many("If", ["use_cache_branch"], [output.name for output in net.outputs], **branches)
    return net.proto()


def gpt2(size: Size = NARROW_HEADS, *, seed: int = 0) -> onnx.ModelProto:
    """GPT-2: learned positions, LayerNormalization, Gelu, linear maps as Gemm of two axes, tied scores."""
    net = Net(size, seed=seed, opset=20)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    parts.caches(net)
    parts.scores_output(net)
    x = parts.embedded(net, ids, scale=0.3)
    net.scope = "/transformer"
    table = net.weight("transformer.wpe.weight", size.context, size.width, scale=0.3)
    x = net.op("Add", [x, net.op("Gather", [table, places])])
    hidden_places = parts.hidden_places(net, mask, parts.past_length(net, True), net.shape(x, 1))
    for layer in range(size.layers):
        x = _gpt2_block(net, x, layer, hidden_places)
    net.scope = "/lm_head"
    x = _layer_norm(net, x, "transformer.ln_f")
    scores = net.op("Transpose", ["model.embed_tokens.weight"], perm=[1, 0])
    net.op("MatMul", [x, scores], "logits")
    return net.proto()


def _layer_norm(net: Net, x: str, name: str) -> str:
    scale = net.weight(f"{name}.weight", net.size.width, scale=0.1, around=1.0)
    bias = net.weight(f"{name}.bias", net.size.width, scale=0.1)
    return net.op("LayerNormalization", [x, scale, bias], axis=-1, epsilon=1e-5)


def _conv1d(net: Net, x: str, name: str, rows: int, columns: int) -> str:
    """A linear map with bias on two axes."""
    flat = net.op("Reshape", [x, net.ints(-1, rows)])
    bias = net.weight(f"{name}.bias", columns, scale=0.1)
    flat = net.op("Gemm", [flat, net.weight(f"{name}.weight", rows, columns, scale=2 * rows**-0.5), bias])
    rest = net.op("Slice", [net.op("Shape", [x]), net.ints(0), net.ints(2)])
    return net.op("Reshape", [flat, net.op("Concat", [rest, net.ints(columns)], axis=0)])


def _gpt2_block(net: Net, x: str, layer: int, hidden_places: str) -> str:
    size, name = net.size, f"transformer.h.{layer}"
    net.scope = f"/transformer/h.{layer}"
    normed = _layer_norm(net, x, f"{name}.ln_1")
    whole = _conv1d(net, normed, f"{name}.attn.c_attn", size.width, 3 * size.heads * size.head)
    outs = [net.name("Split") for _ in range(3)]
    query, key, value = (
        parts.split(net, one, size.heads) for one in net.op_many("Split", [whole], outs, axis=2, num_outputs=3)
    )
    key, value = (parts.extended(net, layer, part, one, True) for part, one in (("key", key), ("value", value)))
    mixed = parts.joined(net, parts.weighted(net, query, key, value, [hidden_places]))
    x = net.op("Add", [x, _conv1d(net, mixed, f"{name}.attn.c_proj", size.heads * size.head, size.width)])
    wide = _conv1d(net, _layer_norm(net, x, f"{name}.ln_2"), f"{name}.mlp.c_fc", size.width, 4 * size.width)
    active = net.op("Gelu", [wide], approximate="tanh")
    return net.op("Add", [x, _conv1d(net, active, f"{name}.mlp.c_proj", 4 * size.width, size.width)])


# torch's exporter and the standard's own attention


def torch_export(size: Size = SMALL, *, seed: int = 0) -> onnx.ModelProto:
    """torch.onnx.export of a cached Llama, opset 20: sizes are asked of several layers' pasts, GatherND of the mask."""
    net = Net(size, seed=seed, opset=20)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    parts.caches(net)
    parts.scores_output(net)
    new = net.op("Squeeze", [net.op("Shape", [ids], start=1, end=2)])
    lengths = [
        net.op("Squeeze", [net.op("Shape", [PAST.format(layer=layer, part=part)], start=2, end=3)])
        for layer in range(size.layers)
        for part in parts.PARTS
    ]
    batch = net.op("Shape", [PAST.format(layer=size.layers - 1, part="value")], start=0, end=1)
    totals = [net.op("Reshape", [net.op("Add", [length, new]), net.ints(-1)]) for length in lengths]
    x = parts.embedded(net, ids)
    net.scope = ""
    hidden_places = _gathered_mask(net, mask, new, lengths[0], batch)
    cos, sin = parts.rotation(net, places, gathered=False)
    net.scope = ""

    def repeated(one: str, total: str) -> str:
        rest = net.ints(size.head)
        wide = net.op(
            "Concat", [batch, net.ints(size.groups), net.ints(size.heads // size.groups), total, rest], axis=0
        )
        wide = net.op("Expand", [net.op("Unsqueeze", [one, net.ints(2)]), wide])
        return net.op(
            "Reshape", [wide, net.op("Concat", [batch, net.ints(size.heads), total, rest], axis=0)], allowzero=1
        )

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.rotated(net, parts.split(net, query, size.heads), cos, sin)
        key = parts.rotated(net, parts.split(net, key, size.groups), cos, sin)
        key = parts.extended(net, layer, "key", key, True)
        value = parts.extended(net, layer, "value", parts.split(net, value, size.groups), True)
        key, value = repeated(key, totals[2 * layer]), repeated(value, totals[2 * layer + 1])
        return parts.joined(net, parts.weighted(net, query, key, value, [hidden_places]))

    parts.llama(net, x, attention)
    return net.proto()


def _gathered_mask(net: Net, mask: str, new: str, past: str, batch: str) -> str:
    """What is added to the products of attention, from a mask that is read by pairs of row and place."""
    flags = net.op("Cast", [mask], to=BOOL)
    rows = net.op("Range", [net.integer(0), net.op("Squeeze", [batch]), net.integer(1)])
    own = net.op("Add", [net.op("Range", [net.integer(0), new, net.integer(1)]), past])
    every = net.op("Range", [net.integer(0), net.op("Add", [past, new]), net.integer(1)])
    rows = net.op("Unsqueeze", [rows, net.ints(1, 2, 3)])
    own, every = net.op("Unsqueeze", [own, net.ints(0, 1, 3)]), net.op("Unsqueeze", [every, net.ints(0, 1, 2)])
    shape = net.op("Shape", [net.op("Max", [rows, every])])
    pairs = [net.op("Unsqueeze", [net.op("Expand", [one, shape]), net.ints(-1)]) for one in (rows, every)]
    read = net.op("GatherND", [flags, net.op("Concat", pairs, axis=-1)])
    read = net.op("And", [net.op("LessOrEqual", [every, own]), read])
    return net.op("Where", [read, net.real(0.0), net.real(LOWEST)])


def attention23(size: Size = SMALL, *, seed: int = 0, mask: bool = True, cache: str = "inside") -> onnx.ModelProto:
    """Opset 23: Attention, RMSNormalization, RotaryEmbedding.

    Args:
        size: sizes.
        seed: of the weights.
        mask: an added mask hides later places and padding; otherwise attention is causal by its attribute, and
            attention_mask is not an input.
        cache: past and present are ``inside`` Attention, or ``outside``: a Concat before it, as torch's exporter does.
    """
    net = Net(size, seed=seed, opset=23, ir_version=11)
    ids = parts.tokens(net)
    given = parts.mask(net) if mask else None
    places = parts.positions(net)
    parts.caches(net)
    parts.scores_output(net)
    added = parts.hidden_places(net, given, parts.past_length(net, True), net.shape(ids, 1)) if given else ""
    tables = [
        net.constant(name, table) for name, table in zip(("cos_cache", "sin_cache"), parts.angles(size), strict=True)
    ]

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query, key = (
            net.op("RotaryEmbedding", [parts.split(net, one, heads), *tables, places])
            for one, heads in ((query, size.heads), (key, size.groups))
        )
        value = parts.split(net, value, size.groups)
        if cache == "outside":
            key, value = (parts.extended(net, layer, part, one, True) for part, one in (("key", key), ("value", value)))
            return parts.joined(net, net.op("Attention", [query, key, value, added]))
        pasts = [PAST.format(layer=layer, part=part) for part in parts.PARTS]
        writes = [net.name("Attention"), *(PRESENT.format(layer=layer, part=part) for part in parts.PARTS)]
        reads = [query, key, value, added, *pasts]
        return parts.joined(net, net.op_many("Attention", reads, writes, is_causal=int(not mask))[0])

    parts.llama(net, parts.embedded(net, ids), attention, norm=parts.standard_rms_norm)
    return net.proto()


def tensor_scatter(
    size: Size = SMALL, *, seed: int = 0, capacity: int | None = 64, lengths: bool = True
) -> onnx.ModelProto:
    """Opset 24: TensorScatter writes the new positions into a buffer; a mask hides what lies behind them.

    Args:
        size: sizes.
        seed: of the weights.
        capacity: size of the buffers; None leaves it free.
        lengths: Attention also reads ``valid_lengths`` [batch], the length of each row after the step. Otherwise the
            only input besides the tokens is ``write_indices`` [batch], the length before it, as ``onnxsplit export
            --static-cache`` writes it.
    """
    net = Net(size, seed=seed, opset=24, ir_version=11)
    ids = parts.tokens(net)
    write = net.input("write_indices", ["batch_size"])
    valid = ["", "", net.input("valid_lengths", ["batch_size"])] if lengths else []
    shape = ["batch_size", size.groups, capacity or "capacity", size.head]
    for layer in range(size.layers):
        for part in parts.PARTS:
            net.input(PAST.format(layer=layer, part=part), shape, FLOAT)
            net.output(PRESENT.format(layer=layer, part=part), shape)
    parts.scores_output(net)
    net.scope = "/model/positions"
    steps = net.op("Range", [net.integer(0), net.shape(ids, 1), net.integer(1)])
    places = net.op("Add", [net.op("Unsqueeze", [write, net.ints(1)]), steps])
    room = net.shape(PAST.format(layer=0, part="key"), 2)
    every = net.op("Range", [net.integer(0), room, net.integer(1)])
    read = net.op("LessOrEqual", [every, net.op("Unsqueeze", [places, net.ints(1, 3)])])
    cos, sin = parts.rotation(net, places, gathered=True)

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.rotated(net, parts.split(net, query, size.heads), cos, sin)
        key = parts.rotated(net, parts.split(net, key, size.groups), cos, sin)
        key, value = (
            net.op(
                "TensorScatter",
                [PAST.format(layer=layer, part=part), one, write],
                PRESENT.format(layer=layer, part=part),
                axis=2,
            )
            for part, one in (("key", key), ("value", parts.split(net, value, size.groups)))
        )
        return parts.joined(net, net.op("Attention", [query, key, value, read, *valid]))

    parts.llama(net, parts.embedded(net, ids), attention, norm=parts.standard_rms_norm)
    return net.proto()


# States that a step replaces


def lstm(size: Size = TWO_LAYERS, *, seed: int = 0, stacked: bool = True) -> onnx.ModelProto:
    """A language model of LSTM layers. States are [layers, batch, width], so axis 1 is that of the rows.

    With ``stacked``, ``h0`` and ``c0`` hold all layers and are cut into them, as torch's exporter does; without, each
    layer has its own: ``h0.N`` to ``hn.N``, [1, batch, width].
    """
    return _recurrent(size, seed, "LSTM", 4, ("h", "c"), stacked=stacked)


def gru(size: Size = TWO_LAYERS, *, seed: int = 0, stacked: bool = True) -> onnx.ModelProto:
    """A language model of GRU layers with the states ``h0`` and ``hn``, as those of :func:`lstm`."""
    return _recurrent(size, seed, "GRU", 3, ("h",), stacked=stacked)


def _recurrent(size: Size, seed: int, kind: str, gates: int, states: Sequence[str], *, stacked: bool):
    net, layers = Net(size, seed=seed), range(size.layers)
    ids = parts.tokens(net)
    if stacked:
        shape = [size.layers, "batch_size", size.width]
        whole = [net.input(f"{state}0", shape, FLOAT) for state in states]
        firsts = [
            [net.op("Slice", [one, net.ints(layer), net.ints(layer + 1), net.ints(0)]) for one in whole]
            for layer in layers
        ]
    else:
        shape = [1, "batch_size", size.width]
        firsts = [[net.input(f"{state}0.{layer}", shape, FLOAT) for state in states] for layer in layers]
    parts.scores_output(net)
    x = net.op("Transpose", [parts.embedded(net, ids)], perm=[1, 0, 2])
    ends = []
    for layer in layers:
        net.scope = f"/rnn/{layer}"
        weights = [
            net.weight(f"rnn.{name}_l{layer}", 1, gates * size.width, *rest, scale=2 * size.width**-0.5)
            for name, rest in (("weight_ih", [size.width]), ("weight_hh", [size.width]))
        ]
        weights.append(net.weight(f"rnn.bias_l{layer}", 1, 2 * gates * size.width, scale=0.1))
        lasts = [net.name(f"Y_{state}") if stacked else f"{state}n.{layer}" for state in states]
        reads = [x, *weights, "", *firsts[layer]]
        more = {"linear_before_reset": 1} if kind == "GRU" else {}
        y, *_ = net.op_many(kind, reads, [net.name("Y"), *lasts], hidden_size=size.width, **more)
        x = net.op("Squeeze", [y, net.ints(1)])
        ends.append(lasts)
    net.scope = "/lm_head"
    x = net.op("Transpose", [x], perm=[1, 0, 2])
    parts.scores(net, x)
    for number, state in enumerate(states):
        if stacked:
            net.op("Concat", [last[number] for last in ends], net.output(f"{state}n", shape), axis=0)
        else:
            for layer in layers:
                net.output(f"{state}n.{layer}", shape)
    return net.proto()


def window(size: Size = SMALL, *, seed: int = 0, width: int = 8) -> onnx.ModelProto:
    """Attention over the last ``width`` positions; the graph itself cuts the cache to them.

    Past has at most ``width`` positions, and attention_mask as many as past and the new tokens together.
    """
    net = Net(size, seed=seed)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    parts.caches(net, total="kept_sequence_length")
    parts.scores_output(net)
    x = parts.embedded(net, ids)
    hidden_places = parts.hidden_places(net, mask, parts.past_length(net, True), net.shape(x, 1), window=width)
    cos, sin = parts.rotation(net, places, gathered=False)

    def kept(layer: int, part: str, new: str) -> str:
        both = net.op("Concat", [PAST.format(layer=layer, part=part), new], axis=2)
        bounds = [net.ints(-width), net.ints(2**31 - 1), net.ints(2)]
        net.op("Slice", [both, *bounds], PRESENT.format(layer=layer, part=part))
        return both

    def attention(layer: int, query: str, key: str, value: str) -> str:
        query = parts.rotated(net, parts.split(net, query, size.heads), cos, sin)
        key = kept(layer, "key", parts.rotated(net, parts.split(net, key, size.groups), cos, sin))
        value = kept(layer, "value", parts.split(net, value, size.groups))
        mixed = parts.weighted(net, query, parts.repeated(net, key), parts.repeated(net, value), [hidden_places])
        return parts.joined(net, mixed)

    parts.llama(net, x, attention)
    return net.proto()


def mixed(size: Size = FOUR_LAYERS, *, seed: int = 0, kernel: int = 3) -> onnx.ModelProto:
    """Attention in layers 1 and 3, a gated convolution in layer 0, a decaying sum in layer 2.

    ``past_conv.0`` [batch, width, kernel - 1] holds what the convolution has last read. ``past_recurrent.2`` [batch,
    width] is the sum. Neither sees the mask, so padding would change both.
    """
    net = Net(size, seed=seed)
    ids, mask, places = parts.tokens(net), parts.mask(net), parts.positions(net)
    for name, rest in (("conv.0", [size.width, kernel - 1]), ("recurrent.2", [size.width])):
        net.input(f"past_{name}", ["batch_size", *rest], FLOAT)
        net.output(f"present_{name}", ["batch_size", *rest])
    parts.caches(net, layers=(1, 3))
    parts.scores_output(net)
    x = parts.embedded(net, ids)
    net.scope = "/model"
    past = net.shape(PAST.format(layer=1, part="key"), 2)
    hidden_places = parts.hidden_places(net, mask, past, net.shape(x, 1))
    cos, sin = parts.rotation(net, places, gathered=True)
    rotary = rotary_attention(net, cos, sin, [hidden_places])
    for layer in range(size.layers):
        net.scope_of(layer)
        name = f"model.layers.{layer}"
        normed = parts.rms_norm(net, x, f"{name}.input_norm.weight")
        if layer == 0:
            changed = _convolution(net, normed, kernel)
        elif layer == 2:
            changed = _decaying_sum(net, normed)
        else:
            changed = parts.attended(net, normed, layer, rotary)
        x = net.op("Add", [x, changed])
        x = net.op("Add", [x, parts.gated(net, parts.rms_norm(net, x, f"{name}.post_norm.weight"), layer)])
    net.scope = "/lm_head"
    x = parts.rms_norm(net, x, "model.norm.weight")
    parts.scores(net, x)
    return net.proto()


def _convolution(net: Net, x: str, kernel: int) -> str:
    width = net.size.width
    flat = net.op("Transpose", [parts.matmul(net, x, net.weight("conv.in_proj", width, width))], perm=[0, 2, 1])
    both = net.op("Concat", ["past_conv.0", flat], axis=2)
    net.op("Slice", [both, net.ints(1 - kernel), net.ints(2**31 - 1), net.ints(2)], "present_conv.0")
    taps = net.weight("conv.conv.weight", width, 1, kernel, scale=kernel**-0.5)
    y = net.op("Transpose", [net.op("Conv", [both, taps], group=width, kernel_shape=[kernel])], perm=[0, 2, 1])
    gate = net.op("Sigmoid", [parts.matmul(net, x, net.weight("conv.gate", width, width))])
    return parts.matmul(net, net.op("Mul", [y, gate]), net.weight("conv.out_proj", width, width))


def _decaying_sum(net: Net, x: str) -> str:
    """state <- decay * state + x, position by position, as a Scan."""
    width = net.size.width
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state", "decay"], ["faded"]),
            helper.make_node("Add", ["faded", "row"], ["next"]),
            helper.make_node("Identity", ["next"], ["seen"]),
        ],
        "body",
        [helper.make_tensor_value_info(name, FLOAT, ["batch_size", width]) for name in ("state", "row")],
        [helper.make_tensor_value_info(name, FLOAT, ["batch_size", width]) for name in ("next", "seen")],
    )
    net.constant("decay", np.linspace(0.2, 0.9, width, dtype=np.float32))
    moved = net.op("Transpose", [parts.matmul(net, x, net.weight("sum.in_proj", width, width))], perm=[1, 0, 2])
    outs = ["present_recurrent.2", net.name("Scan")]
    y = net.op_many("Scan", ["past_recurrent.2", moved], outs, body=body, num_scan_inputs=1)[1]
    return parts.matmul(net, net.op("Transpose", [y], perm=[1, 0, 2]), net.weight("sum.out_proj", width, width))
