"""GGUF files of small random decoders: as transformers has them, or in any of the format's types."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

WIDTH, HIDDEN, HEADS, GROUPS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 128
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def fields(writer: gguf.GGUFWriter, arch: str, vocabulary: int, *, head: int = WIDTH // HEADS, **more) -> None:
    """The fields of an architecture with the sizes above; ``more`` are fields with ``__`` for a dot."""
    sizes = {
        "block_count": LAYERS, "context_length": CONTEXT, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "attention.key_length": head,
        "attention.value_length": head, "vocab_size": vocabulary,
    }  # fmt: skip
    for name, value in sizes.items():
        if name.replace(".", "__") not in more:
            writer.add_uint32(f"{arch}.{name}", value)
    if "attention__layer_norm_rms_epsilon" not in more:
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
    for name, value in more.items():
        add[type(value)](f"{arch}.{name.replace('__', '.')}", value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_transformers(path: Path, arch: str, model, **more) -> Path:
    """The file of a network of transformers; ``more`` are fields beside those of the sizes above."""
    writer = gguf.GGUFWriter(path, arch)
    head = model.model.layers[0].self_attn.head_dim
    fields(writer, arch, model.config.vocab_size, head=head, **more)
    gemma = arch.startswith("gemma")
    layer_names = LAYER_NAMES | (GEMMA_NORMS if arch in ("gemma2", "gemma3") else NORMS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if gemma and name.endswith("norm.weight"):
            array = array + 1
        if name in NAMES:
            writer.add_tensor(NAMES[name], np.ascontiguousarray(array))
            continue
        _, _, layer, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            array = interleaved(array, HEADS if "q_proj" in part else GROUPS)
        writer.add_tensor(f"blk.{layer}.{layer_names[part]}.{kind}", np.ascontiguousarray(array))
    finish(writer)
    return path


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys in the order of llama's files: the halves of a head alternate."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def random_llama(
    path: Path,
    kind: str = "F32",
    *,
    vocabulary: int = 96,
    width: int = 256,
    hidden: int = 512,
    times: float = 1.0,
    tokenizer=None,
    **more,
) -> Path:
    """A llama with random weights, ``times`` as large as usual, its matrices in one of the format's types."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"embedding_length": width, "feed_forward_length": hidden, "attention__key_length": width // HEADS}
    fields(writer, "llama", vocabulary, **{"attention__value_length": width // HEADS, **sizes, **more})
    source, narrow = np.random.default_rng(0), width // HEADS * GROUPS
    shapes = {"attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width)}
    shapes |= {"attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width)}
    shapes |= {"ffn_down": (width, hidden)}
    named = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (vocabulary, width), **named}.items():
        array = (source.standard_normal(shape) / np.sqrt(shape[1]) * times).astype(np.float32)
        raw = quantised(array, kind, source)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
    for name in ["output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(LAYERS) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", source.uniform(0.5, 1.5, width).astype(np.float32))
    if tokenizer is not None:
        tokenizer(writer)
    finish(writer)
    return path


def quantised(array: np.ndarray, kind: str, source: np.random.Generator) -> np.ndarray:
    """An array in one of the format's types; random blocks of the same size where gguf only reads the type."""
    try:
        return gguf.quants.quantize(array, GGMLQuantizationType[kind])
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        raw = source.integers(0, 256, (*array.shape[:-1], array.shape[-1] // block, size), dtype=np.uint8)
        places, largest = SCALES[kind]
        for place in places:  # float16 numbers that make the largest weight about as large as others
            scale = (source.uniform(1, 2, raw.shape[:-1]) / largest / array.shape[-1] ** 0.5).astype(np.float16)
            raw[..., place : place + 2] = scale[..., None].view(np.uint8)
        return raw.reshape(*array.shape[:-1], -1)


SCALES = {  # the places of the scales in a block, and the largest whole number that they are multiplied with
    "Q2_K": ((80, 82), 15 * 3),
    "Q3_K": ((108,), 32 * 4),
    "Q4_K": ((0, 2), 63 * 15),
    "Q5_K": ((0, 2), 63 * 31),
    "Q6_K": ((208,), 128 * 32),
    "IQ4_NL": ((0,), 127),
}
