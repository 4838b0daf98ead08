"""What the files beside a model say of it as a decoder.

``genai_config.json`` is onnxruntime-genai's, ``config.json`` and ``generation_config.json`` are transformers'. A file
that cannot be used gives a note; it never stops the detection.

A link must stay in its folder. Where a model in the folder is a link, as in the cache of Hugging Face, other links may
lead to the folder that this one leads to; :mod:`onnxsplit.model.external_data` has the same rule.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from onnxsplit.errors import one_line, shown
from onnxsplit.files import check_regular, read_regular
from onnxsplit.plan_decoder import MOST_LENGTH, TOKENIZER

TOKENIZER_HASH = "onnxsplit.tokenizer"
"""Where the metadata of an exported model has the SHA-256 of the ``tokenizer.json`` that was written with it."""

_MOST_CONFIG_BYTES = 4 << 20
_MOST_TEXT_BYTES = 256 << 20
_MOST_END_TOKENS = 4096
_MOST_PATTERN = 1000  # characters of the pattern of a name
_MOST_ENTRIES = 10_000  # of a folder that are looked at for models
TEXT_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "genai_config.json",
)
"""The files beside a model that its plan takes over, or that say how its texts are written."""

_NESTED = ("text_config", "language_config", "llm_config")  # the decoder's part of a model of several kinds of input

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEAD_SIZES = ("head_dim", "kv_channels", "head_size", "d_kv")

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Beside:
    """What the files beside a model say; everything may be missing.

    Attributes:
        patterns: pairs of the names of a state's input and output, with ``%d`` for the number of a layer.
        names: the common name of an input or output, ``input_ids`` for example, by its name in the model.
        heads: the number of heads of keys and values.
        head_size: the width of a head.
        vocabulary: the number of tokens.
        max_length: the most positions of a sequence.
        end_tokens: the tokens that end a text.
        encoder_decoder: whether the model attends to the output of an encoder.
        text: files for the tokenizer and the chat template.
        notes: what could not be used, and why.
    """

    patterns: tuple[tuple[str, str], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    heads: int | None = None
    head_size: int | None = None
    vocabulary: int | None = None
    max_length: int | None = None
    end_tokens: tuple[int, ...] = ()
    encoder_decoder: bool = False
    text: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def read_beside(folder: Path | None, tokenizer: str | None = None) -> Beside:
    """Read the small files in a model's folder.

    Args:
        folder: the folder; None for none.
        tokenizer: the SHA-256 of the model's own ``tokenizer.json``, where it is known. Several models may lie in a
            folder, and the text of another model is not used.

    transformers.js keeps models in a folder named ``onnx``, and their files in the folder above; so that one is read,
    too, where the folder has this name.
    """
    if folder is None:
        return Beside()
    notes: list[str] = []
    places = [folder, folder.parent] if folder.name == "onnx" else [folder]
    genai, config, generation = (
        _config(places, name, notes) for name in ("genai_config.json", "config.json", "generation_config.json")
    )
    genai = _dictionary(genai, "model")
    decoder = _dictionary(genai, "decoder")
    nested = next((_dictionary(config, name) for name in _NESTED if _dictionary(config, name)), {})
    configs = [decoder, genai, nested, config]
    heads = _number(configs, _HEADS)
    return Beside(
        patterns=_patterns(_dictionary(decoder, "inputs"), _dictionary(decoder, "outputs")),
        names=_names(_dictionary(decoder, "inputs"), _dictionary(decoder, "outputs")),
        heads=1 if config.get("multi_query") is True else _number(configs, _KV_HEADS) or heads,
        head_size=_head_size(configs, heads),
        vocabulary=_number([genai, nested, config], ("vocab_size",)),
        max_length=_number([genai], ("context_length",)) or _number([nested, config], _LENGTHS),
        end_tokens=_end_tokens([genai, generation, nested, config], notes),
        encoder_decoder=config.get("is_encoder_decoder") is True or bool(_dictionary(genai, "encoder")),
        text=_text(places, tokenizer, notes),
        notes=tuple(dict.fromkeys(notes)),
    )


def _text(places: Iterable[Path], tokenizer: str | None, notes: list[str]) -> tuple[Path, ...]:
    """The files for the tokenizer and the chat template; none where the tokenizer is another model's."""
    found = [path for name in TEXT_FILES if (path := _found(places, name, _MOST_TEXT_BYTES, notes)) is not None]
    for path in found:
        if tokenizer is None or path.name != TOKENIZER:
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != tokenizer:
                notes.append(
                    f"{path} and the files of text beside it are not used: they are not those that were exported with "
                    "this model; export each model into a folder of its own"
                )
                return ()
    return tuple(found)


def _found(places: Iterable[Path], name: str, most_bytes: int, notes: list[str]) -> Path | None:
    """The first regular file of a name in the folders; a link must stay in the folders that are allowed."""
    for place in places:
        path = place / name
        if not os.path.lexists(path):
            continue
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not any(real.is_relative_to(folder) for folder in _allowed(place)):
                notes.append(
                    f"{path} is not used: it is a link to {real}, outside its folder; put the file itself there"
                )
                continue
            check_regular(real, most_bytes=most_bytes)
        except OSError as error:
            notes.append(f"{path} is not used: {error.strerror}")
            continue
        return path
    return None


def _allowed(place: Path) -> set[str]:
    """A folder without links, and the folders that the models in it lead to."""
    models = (path for path in islice(place.iterdir(), _MOST_ENTRIES) if path.suffix == ".onnx" and path.is_symlink())
    return {os.path.realpath(place), *(str(Path(os.path.realpath(model)).parent) for model in models)}


def _config(places: Iterable[Path], name: str, notes: list[str]) -> Config:
    """A file of settings; empty where there is none that can be used."""
    path = _found(places, name, _MOST_CONFIG_BYTES, notes)
    if path is None:
        return {}
    try:
        found = json.loads(read_regular(path, most_bytes=_MOST_CONFIG_BYTES))
    except OSError as error:
        notes.append(f"{path} is not used: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:
        notes.append(f"{path} is not used: it is not valid JSON ({one_line(error, 100)})")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path} is not used: it holds {shown(found, 40)}, not an object of settings")
        return {}
    return found


def _dictionary(config: Config, key: str) -> Config:
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_LENGTH


def _number(configs: Iterable[Config], keys: Iterable[str]) -> int | None:
    """The first positive number under one of the keys."""
    keys = list(keys)
    values = (config.get(key) for config in configs for key in keys)
    return next((value for value in values if _is_count(value)), None)


def _head_size(configs: list[Config], heads: int | None) -> int | None:
    told, width = _number(configs, _HEAD_SIZES), _number(configs, _WIDTHS)
    if told is None and width is not None and heads is not None and width % heads == 0:
        return width // heads
    return told


def _end_tokens(configs: Iterable[Config], notes: list[str]) -> tuple[int, ...]:
    """The end tokens of the first file that names any: one number, or a list of numbers."""
    for config in configs:
        given = config.get("eos_token_id")
        if given is None:
            continue
        tokens = given if isinstance(given, list) else [given]
        if len(tokens) <= _MOST_END_TOKENS and all(_is_count(t) or (t == 0 and t is not False) for t in tokens):
            return tuple(dict.fromkeys(tokens))
        notes.append(f"eos_token_id is not used: it is {shown(given, 40)}, not a token or a list of tokens")
    return ()


def _patterns(inputs: Config, outputs: Config) -> tuple[tuple[str, str], ...]:
    """The patterns of genai_config.json: ``past_key_names`` with ``present_key_names``, and so on."""
    pairs = []
    for key, past in inputs.items():
        partner = "rnn_states" if key == "rnn_states_prev" else key.replace("past_", "present_", 1)
        present = outputs.get(partner)
        if partner == key or not isinstance(past, str) or not isinstance(present, str):
            continue
        if max(len(past), len(present)) <= _MOST_PATTERN:
            pairs.append((past, present))
    return tuple(pairs)


def _names(inputs: Config, outputs: Config) -> dict[str, str]:
    """The common names of genai_config.json by the names in the model; patterns of states are left out."""
    both = [*inputs.items(), *outputs.items()]
    return {name: common for common, name in both if isinstance(name, str) and "%d" not in name}
