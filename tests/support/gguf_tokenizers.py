"""Tokenizers in the fields of GGUF files."""

from __future__ import annotations

import json

import gguf
from text_plans import SPECIAL, TEMPLATE, VOCABULARY, small_tokenizer

SIZE = VOCABULARY
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
PIECES = ["▁", "a", "b", "c", "ab", "abc", "▁a", "▁ab", "bc", "▁abc", "ca", "é"]


def byte_level(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The fields of :func:`text_plans.small_tokenizer`."""
    content = json.loads(small_tokenizer().to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_chat_template(TEMPLATE)


def pieces(writer: gguf.GGUFWriter) -> None:
    """A few pieces as SentencePiece has them, with all bytes; the piece listed first has the best score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(place) for place in range(len(PIECES))])
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
