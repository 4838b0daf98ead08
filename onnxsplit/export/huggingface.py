"""``transformers``: loads a network from a configuration, a folder or a hub's repository, and has it converted.

Networks are loaded with eager attention: fused attention gives other results for rows that are masked completely, and
some networks cannot use it. Files that run code when they are loaded are refused.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxsplit.errors import ExportError, MissingDependency, one_line
from onnxsplit.export import hub, onnx_file
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.export.pytorch import require_torch
from onnxsplit.export.rotary_lengths import notes_of
from onnxsplit.export.sources import Source, recognise
from onnxsplit.export.transformers_networks import BUILDERS, kind_of
from onnxsplit.files import read_regular
from onnxsplit.plan_decoder import TOKENIZER

_EXTRA = "pip install 'onnxsplit[transformers]'"
_MOST_CONFIG_BYTES = 64 << 20
_MOST_TEXT_BYTES = 256 << 20
_TEXT = (
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
_OTHER_TOKENIZERS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WORDS = (".json", ".txt", ".model", ".md", ".jinja")  # files of a folder that are not weights


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """The conversions of a configuration, a folder, or a repository.

    Raises:
        ExportError: the network cannot be loaded or run, or its weights could run code.
        MissingDependency: transformers, PyTorch or huggingface_hub is not installed.
    """
    about: dict[str, str] = {}
    if source.kind == "hub":
        path, revision = hub.fetched(source, options)
        about["onnxsplit.revision"] = revision
        if source.file is not None:
            return [_with(conversion, about) for conversion in onnx_file.convert(recognise(str(path)), options)]
    else:
        assert source.path is not None
        path = source.path
    torch = require_torch()
    is_random = _has_random_weights(path)
    model = _model(torch, path, is_random=is_random)
    kind = kind_of(model)
    options.say(f"{type(model).__name__}: {kind}")
    if options.static_cache and (kind != "decoder" or not options.cache):
        what = "is exported without a cache" if kind == "decoder" else f"is a network of the kind {kind!r}"
        raise ExportError(f"{type(model).__name__} {what}; --static-cache does not apply to it, so leave it out")
    notes = notes_of(model) if kind == "decoder" else ()
    try:
        conversions = BUILDERS[kind](torch, model, options)
    except ExportError:
        raise
    except Exception as error:  # transformers raises errors of any type
        raise ExportError(
            f"{type(model).__name__} looks like a network of the kind {kind!r}, but does not run as one: "
            f"{one_line(error, 300)}. Write a recipe that says how to call it (docs/export.md)"
        ) from error
    more = ", random weights" if is_random else ""
    made = [_with(replace(one, framework=one.framework + more, notes=notes), about) for one in conversions]
    if kind == "decoder" and path.is_dir():
        made[0] = replace(made[0], files=_text_files(path), notes=(*notes, *_missing_tokenizer(path)))
    return made


def _text_files(folder: Path) -> dict[str, bytes]:
    """The files of a decoder's folder that belong beside the model: tokenizer, chat template and configurations.

    Raises:
        ExportError: one of them cannot be read, or is too large.
    """
    files = {}
    for name in _TEXT:
        path = folder / name
        if path.exists():
            try:
                files[name] = read_regular(path, most_bytes=_MOST_TEXT_BYTES)
            except OSError as error:
                raise ExportError(f"cannot read {path}: {error.strerror}") from error
    return files


def _missing_tokenizer(folder: Path) -> list[str]:
    """A note where a folder has a tokenizer in other files only, which the model cannot carry."""
    others = [name for name in _OTHER_TOKENIZERS if (folder / name).exists()]
    if (folder / TOKENIZER).exists() or not others:
        return []
    return [
        f"no tokenizer.json is written, since {folder} has its tokenizer in {', '.join(others)} only; write "
        "one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    ]


def _with(conversion: Conversion, about: Mapping[str, str]) -> Conversion:
    """A conversion with further metadata."""
    return replace(conversion, about={**conversion.about, **about})


def _has_random_weights(path: Path) -> bool:
    """Whether a network gets random weights, because its configuration alone was named.

    Raises:
        ExportError: there are weights in a form that is not read, or weights are missing.
    """
    if not path.is_dir():
        return True
    files = {file.name for file in path.iterdir()}
    if any(name.endswith(".safetensors") for name in files):
        return False
    if pickled := sorted(name for name in files if name.endswith(_PICKLED)):
        raise ExportError(
            f"{path} has its weights in a pickled file ({pickled[0]}), whose loading could run code; convert them to "
            "model.safetensors (save_pretrained of transformers does)"
        )
    unknown = sorted(name for name in files if not name.startswith(".") and not name.endswith(_WORDS))
    raise ExportError(
        f"{path} has no weights in *.safetensors{f', but {unknown[0]}' if unknown else ''}; save them in that form "
        "(save_pretrained of transformers does), or name its config.json for random weights"
    )


def _model(torch: Any, path: Path, *, is_random: bool) -> Any:
    """Load the network of a folder with weights, or make one from a configuration.

    Raises:
        ExportError: the network needs code of its own, or cannot be loaded.
        MissingDependency: transformers is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(f"exporting from transformers needs transformers: {_EXTRA}") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(transformers, path)
            name = (config.architectures or [None])[0]
            kind = getattr(transformers, name, None) if name else None
            if name and kind is None:
                raise ExportError(f"this transformers ({transformers.__version__}) has no {name}; install a newer one")
            if not is_random:
                make = kind or transformers.AutoModel
                return make.from_pretrained(
                    path, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                    attn_implementation="eager", dtype=torch.float32,
                ).eval()  # fmt: skip
            torch.manual_seed(0)
            make = kind._from_config if kind is not None else transformers.AutoModel.from_config
            return make(config, attn_implementation="eager").eval().float()
    except ExportError:
        raise
    except Exception as error:  # transformers raises errors of any type
        raise ExportError(f"transformers cannot load {path}: {one_line(error, 400)}") from error


def _config(transformers: Any, path: Path) -> Any:
    """Read a configuration, without running code that it names."""
    if path.is_dir():
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    content = json.loads(read_regular(path, most_bytes=_MOST_CONFIG_BYTES))
    if "auto_map" in content:
        raise ExportError(f"{path} names code of its own (auto_map); such code is not run")
    return transformers.AutoConfig.for_model(**content)
