"""Reads the files of a tokenizer, a chat template and recommended options, from a plan's folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError, one_line, shown
from onnxsplit.files import read_regular
from onnxsplit.numbers import is_real
from onnxsplit.plan_decoder import TOKENIZER
from runtime.text.tokenizer import Tokenizer

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_GENERATION, _GENAI = "generation_config.json", "genai_config.json"
_MOST_TOKENIZER_BYTES = 256 << 20
_MOST_CONFIG_BYTES = 16 << 20
_MOST_TEMPLATE_BYTES = 1 << 20

_NAMED = {"name", "template"}  # the keys of a chat template in a list of several
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokens that a template may use as NAME_token
_OPTIONS: Mapping[str, tuple[float, float]] = {  # the least and the most
    "temperature": (0.0, 1e9),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 1e9),
}


@dataclass(frozen=True)
class TextFiles:
    """What the files of a plan say.

    Attributes:
        tokenizer: the tokenizer.
        templates: the chat templates by name; one without a name is ``default``.
        variables: what they may use by name: ``bos_token`` and others.
        defaults: the options of ``generate`` that the model's makers recommend.
    """

    tokenizer: Tokenizer
    templates: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_text_files(folder: Path, names: Collection[str]) -> TextFiles | None:
    """Read the files.

    Args:
        folder: the plan's folder.
        names: those of its files that belong to text.

    Returns:
        What they say; None without a tokenizer.

    Raises:
        InputError: a file cannot be used; the message names the file and what is wrong.
        MissingDependency: ``tokenizers`` is not installed.
    """
    if TOKENIZER not in names:
        return None
    config = _settings(folder, _CONFIG, names)
    variables = _variables(folder / _CONFIG, config)
    add_begin = config.get("add_bos_token")
    if add_begin is not None and not isinstance(add_begin, bool):
        raise _wrong(folder / _CONFIG, "add_bos_token", add_begin, "true or false")
    data = _read(folder / TOKENIZER, _MOST_TOKENIZER_BYTES)
    begin = variables.get("bos_token")
    return TextFiles(
        tokenizer=Tokenizer(data, str(folder / TOKENIZER), begin=begin, add_begin=add_begin),
        templates=_templates(folder, config, names),
        variables=variables,
        defaults=_defaults(folder, names),
    )


def _templates(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """The chat templates. A file of its own comes before those in the configuration."""
    if _TEMPLATE in names:
        path = folder / _TEMPLATE
        try:
            return {"default": _read(path, _MOST_TEMPLATE_BYTES).decode()}
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        named = {str(one["name"]): one["template"] for one in found if isinstance(one, dict) and one.keys() >= _NAMED}
        if len(named) == len(found) and all(isinstance(text, str) for text in named.values()):
            return named
    raise _wrong(folder / _CONFIG, "chat_template", found, 'a text, or a list of {"name": ..., "template": ...}')


def _variables(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by name, as templates use them."""
    variables: dict[str, Any] = {}
    for name in (f"{token}_token" for token in _TOKENS):
        found = config.get(name)
        if found is not None:
            variables[name] = _content(path, name, found)
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        variables["additional_special_tokens"] = [_content(path, "additional_special_tokens", one) for one in more]
    return variables


def _content(path: Path, name: str, token: Any) -> str:
    """A token, which is a text or an object with a text."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise _wrong(path, name, token, 'a text, or {"content": ...}')
    return text


def _defaults(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """The recommended options, of transformers' file or else of onnxruntime-genai's."""
    name = _GENERATION if _GENERATION in names else _GENAI
    config = _settings(folder, name, names)
    if name == _GENAI:
        config = config.get("search") or {}
        if not isinstance(config, dict):
            raise _wrong(folder / name, "search", config, "an object")
    samples = config.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise _wrong(folder / name, "do_sample", samples, "true or false")
    if samples is False:
        penalty = _option(folder / name, config, "repetition_penalty")
        return {"temperature": 0.0} | ({} if penalty is None else {"repetition_penalty": penalty})
    options = {option: _option(folder / name, config, option) for option in _OPTIONS}
    found = {option: value for option, value in options.items() if value is not None}
    return {"temperature": 1.0, **found} if samples else found


def _option(path: Path, config: Mapping[str, Any], name: str) -> float | int | None:
    value, (least, most) = config.get(name), _OPTIONS[name]
    if value is None:
        return None
    if not is_real(value) or not least <= value <= most or (name == "top_k" and not float(value).is_integer()):
        kind = "whole number" if name == "top_k" else "number"
        raise _wrong(path, name, value, f"a {kind} from {least:.12g} to {most:.12g}")
    return int(value) if name == "top_k" else float(value)


def _settings(folder: Path, name: str, names: Collection[str]) -> dict[str, Any]:
    """A file of settings; empty where the plan has none."""
    if name not in names:
        return {}
    path = folder / name
    try:
        found = json.loads(_read(path, _MOST_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error, 200)}; put the right file there") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {shown(found, 40)}, not an object of settings; put the right file there")
    return found


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_regular(path, most_bytes=most_bytes)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _wrong(path: Path, name: str, found: object, allowed: str) -> InputError:
    return InputError(f"{path}: {name} is {shown(found)}, but it must be {allowed}; correct the file and cut again")
