"""Sources of an export: their kind is recognised by form and first bytes, without loading them."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnxsplit.errors import ExportError
from onnxsplit.files import check_regular, read_regular
from onnxsplit.model.file_kinds import what_is

SourceKind = Literal[
    "recipe",
    "exported-program",
    "torchscript",
    "transformers",
    "hub",
    "saved-model",
    "keras",
    "tflite",
    "pickle",
    "skops",
    "lightgbm",
    "xgboost",
    "catboost",
    "gguf",
    "onnx",
]

WHAT: dict[SourceKind, str] = {
    "recipe": "Python code",
    "exported-program": "a saved ExportedProgram of PyTorch",
    "torchscript": "TorchScript, or a module saved by PyTorch",
    "transformers": "a configuration or folder of transformers",
    "hub": "a repository of a hub",
    "saved-model": "a SavedModel of TensorFlow",
    "keras": "a model saved by Keras",
    "tflite": "a TFLite model",
    "pickle": "a pickled object",
    "skops": "a scikit-learn model saved by skops",
    "lightgbm": "a LightGBM model",
    "xgboost": "an XGBoost model",
    "catboost": "a CatBoost model",
    "gguf": "a GGUF file",
    "onnx": "an ONNX model",
}

_ENDINGS: dict[str, SourceKind] = {
    ".pt2": "exported-program",
    ".pt": "torchscript",
    ".pth": "torchscript",
    ".keras": "keras",
    ".h5": "keras",
    ".tflite": "tflite",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".joblib": "pickle",
    ".skops": "skops",
    ".ubj": "xgboost",
    ".cbm": "catboost",
    ".gguf": "gguf",
    ".onnx": "onnx",
}
_KNOWN = (
    "FILE.py[:NAME] or package.module:NAME, .pt2, .pt, a folder or config.json of transformers, "
    "hf://ORG/REPO[@REVISION][/FILE], a SavedModel folder, .keras, .tflite, .skops, .pkl, .joblib, LightGBM's .txt, "
    "XGBoost's .json or .ubj, .cbm, .gguf, .onnx"
)
_MOST_JSON_BYTES = 1 << 30
GGUF_MAGIC = b"GGUF"
_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>(?!/)(?:(?!\.\.)[\w./ -])+))?", re.ASCII
)


@dataclass(frozen=True)
class Source:
    """A source that was recognised.

    Attributes:
        text: the source as it was given.
        kind: the kind of the source.
        path: the file or folder; None for a module or a repository.
        name: name of the callable in Python code.
        repo: repository of a hub, as ``ORG/REPO``.
        revision: revision of the repository; None for the newest.
        file: file in the repository; None for all of it.
    """

    text: str
    kind: SourceKind
    path: Path | None = None
    name: str | None = None
    repo: str | None = None
    revision: str | None = None
    file: str | None = None

    @property
    def what(self) -> str:
        """The kind of the source in words."""
        return WHAT[self.kind]


def recognise(text: str) -> Source:
    """Recognise a source.

    Raises:
        ExportError: the source does not exist or has an unknown kind; the message lists the known kinds.
    """
    if text.startswith("hf://"):
        match = _HUB.fullmatch(text)
        if match is None:
            raise ExportError(f"{text!r} does not name a repository; write hf://ORG/REPO[@REVISION][/FILE]")
        return Source(text, "hub", None, None, match["repo"], match["revision"], match["file"])
    path = Path(text)
    if path.is_dir():
        return Source(text, _folder(path), path)
    code, colon, name = text.rpartition(":")
    if colon and (code.endswith(".py") or _is_module(code)):
        return Source(text, "recipe", Path(code) if code.endswith(".py") else None, name)
    if text.endswith(".py"):
        if not path.is_file():
            raise ExportError(f"no such file: {text}")
        return Source(text, "recipe", path, "build")
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"there is no {text!r}; a source is: {_KNOWN}") from error
    except OSError as error:
        raise ExportError(f"{text!r} cannot be exported: {error.strerror}") from error
    kind = "gguf" if _begins(path, GGUF_MAGIC) else _ENDINGS.get(path.suffix.lower()) or _by_content(path)
    if kind is None:
        what = what_is(path)
        refused = f"cannot be exported: it is {what}" if what else "has an unknown kind"
        raise ExportError(f"{text} {refused}; a source is: {_KNOWN}")
    if kind == "torchscript" and _is_exported_program(path):
        kind = "exported-program"
    return Source(text, kind, path)


def _folder(path: Path) -> SourceKind:
    if (path / "saved_model.pb").is_file():
        return "saved-model"
    if (path / "config.json").is_file():
        return "transformers"
    if (what := what_is(path)) is not None:
        raise ExportError(f"{path} cannot be exported: it is {what}")
    raise ExportError(f"the folder {path} holds neither saved_model.pb (TensorFlow) nor config.json (transformers)")


def _is_module(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _by_content(path: Path) -> SourceKind | None:
    """The kind of a file by its content, for file endings that several kinds share."""
    with path.open("rb") as stream:
        begin = stream.read(64)
    if begin.startswith(b"tree\n"):
        return "lightgbm"
    if begin.startswith(b"CBM1"):
        return "catboost"
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(read_regular(path, most_bytes=_MOST_JSON_BYTES))
        except (ValueError, RecursionError):
            return None
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror}") from error
        if isinstance(content, dict) and "learner" in content:
            return "xgboost"
        if isinstance(content, dict) and "model_type" in content:
            return "transformers"
    return None


def _is_exported_program(path: Path) -> bool:
    """Whether a file that PyTorch saved is an ExportedProgram."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("archive_format") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def refuse_code(source: Source, why: str, *, trust: bool) -> None:
    """Refuse a source that runs code when it is loaded, unless it is trusted.

    Args:
        source: the source.
        why: how it runs code, as a clause.
        trust: whether the user trusts it.

    Raises:
        ExportError: the source is not trusted; the message says what --trust means.
    """
    if not trust:
        raise ExportError(
            f"{source.text} is {source.what}: {why}, so its author can do on this host whatever you can. "
            "Nothing was loaded. If you trust its author, add --trust"
        )
