"""Plans of small random decoders with a tokenizer and a chat template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import decoders
import onnx
from decoder_parts import Size
from decoder_plans import cut, describe
from msgspec.structs import replace
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders

from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_decoder import Decoder

CORPUS = (
    "The quick brown fox jumps over the lazy dog. ",
    "Grüße aus Köln! ",
    "你好 世界。",
    "🙂🙃 emoji ",
    '{"a": 1}',
)
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = 0  # the token <|end|>
VOCABULARY = 320


def small_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of a few hundred tokens, which can write any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def write_text_files(folder: Path, *, template: str | None = TEMPLATE) -> tuple[FileEntry, ...]:
    """Write the files of a tokenizer into a plan's folder."""
    config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    files = {"tokenizer.json": small_tokenizer().to_str(), "tokenizer_config.json": json.dumps(config)}
    entries = []
    for name, text in files.items():
        data = text.encode()
        (folder / name).write_bytes(data)
        entries.append(FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)))
    return tuple(entries)


def text_plan(
    folder: Path, *, stages: int = 2, length: int = 256, template: str | None = TEMPLATE, seed: int = 0
) -> Path:
    """A plan of a random decoder that reads and writes tokens of :func:`small_tokenizer`; returns its folder."""
    size = Size(vocabulary=VOCABULARY, context=length)
    model: onnx.ModelProto = decoders.gqa(size, seed=seed)
    described: Decoder = describe("gqa", model, kind="in-place", rows="right", chunk="one-row", length=length)
    plan = cut(model, replace(described, vocabulary=VOCABULARY, end_tokens=(END,)), folder, stages=stages)
    assert plan.decoder is not None
    entries = write_text_files(folder, template=template)
    whole = replace(plan, decoder=replace(plan.decoder, text=entries))
    (folder / "plan.json").write_bytes(whole.to_json())
    return folder
