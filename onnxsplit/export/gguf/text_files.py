"""The files of text beside a model, as transformers names them: tokenizer, chat template and configurations."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from onnxsplit.export.gguf.header import Header
from onnxsplit.export.gguf.network import DecoderNetwork
from onnxsplit.export.gguf.tokenizer import begins, special_token, token_kinds

_CONTROL = 3
_ENDS_OF_TURNS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<|eot|>"}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # the names here, and in GGUF files


def text_files(header: Header, network: DecoderNetwork, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The files beside a model, by name.

    Args:
        header: the header of the GGUF file.
        network: its decoder.
        tokenizer: its tokenizer; None where it has none.

    Raises:
        ExportError: a field of the tokenizer is damaged.
    """
    files = {"config.json": _config(header, network), "generation_config.json": _generation(header)}
    if tokenizer is None:
        return {name: _json(content) for name, content in files.items()}
    files["tokenizer_config.json"] = _tokenizer_config(header, network)
    return {"tokenizer.json": tokenizer.to_str().encode(), **{name: _json(one) for name, one in files.items()}}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _ids(header: Header) -> dict[str, int]:
    found = {name: special_token(header, _SPECIAL[name]) for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": number for name, number in found.items() if number is not None}


def _generation(header: Header) -> dict[str, Any]:
    """The tokens that begin and end a text. Those that end a turn of a conversation end a text, too."""
    ids: dict[str, Any] = dict(_ids(header))
    ends = [special_token(header, name) for name in ("eos", "eot", "eom")]
    tokens = header.texts("tokenizer.ggml.tokens")
    kinds = zip(tokens, token_kinds(header), strict=False)
    ends += [number for number, (text, kind) in enumerate(kinds) if kind == _CONTROL and text in _ENDS_OF_TURNS]
    found = list(dict.fromkeys(number for number in ends if number is not None))
    if found:
        ids["eos_token_id"] = found[0] if len(found) == 1 else found
    return ids


def _tokenizer_config(header: Header, network: DecoderNetwork) -> dict[str, Any]:
    tokens = header.texts("tokenizer.ggml.tokens")
    special = {name: special_token(header, field) for name, field in _SPECIAL.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": network.context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": begins(header),
        **{f"{name}_token": tokens[number] for name, number in special.items() if number is not None},
    }
    if "tokenizer.chat_template" in header.fields:
        config["chat_template"] = header.text("tokenizer.chat_template")
    return config


def _config(header: Header, network: DecoderNetwork) -> dict[str, Any]:
    architecture = network.architecture
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **_ids(header),
        "head_dim": network.head,
        "hidden_size": network.width,
        "intermediate_size": network.hidden,
        "max_position_embeddings": network.context,
        "num_attention_heads": network.heads,
        "num_hidden_layers": network.layers,
        "num_key_value_heads": network.groups,
        "rms_norm_eps": network.epsilon,
        "rope_theta": network.base,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": network.vocabulary,
    }
