"""Recognise a file that is not an ONNX model by its first bytes, and say what to do with it. Nothing is loaded."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from onnxsplit.errors import shown
from onnxsplit.files import open_regular

_HEAD_BYTES = 4096
_LISTED = 5
_EXPORT = re.compile(
    r"\{export(?: (\.\w+)(.*?))?\}"
)  # in a phrase: a file ending that `onnxsplit export` needs, none for any, and options
_CONVERT = re.compile(r"\{convert (\w+)\}")  # in a phrase: the name of the form, as onnx.load takes it
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # bytes that text does not contain
_WEIGHTS = (
    "Weights alone do not make a model: export the network they belong to, with onnxsplit export FOLDER -o model.onnx "
    "for a folder of transformers with its config.json, or onnxsplit export RECIPE.py -o model.onnx"
)
_NO_WAY_BACK = "which has no way back to ONNX; export the network that it was made of"

_BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself. Fetch the file: git lfs pull"),
    (4, b"ORTM", "a model in ONNX Runtime's own format (.ort), which has no way back to ONNX; name the .onnx file "
                 "that it was made of"),
    (4, b"TFL3", "a TFLite model. {export .tflite}"),
    (0, b"GGUF", "a GGUF file of llama.cpp. {export}"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras saves models (.h5). {export .h5}"),
    (0, b"\x93NUMPY", "a NumPy array (.npy), not a model; inputs go into an .npz file, for --inputs"),
    (0, b"CBM1", "a CatBoost model. {export .cbm}"),
    (0, b"tree\n", "a LightGBM model. {export .txt}"),
    (0, b"\x1f\x8b", "compressed by gzip. Unpack it: gunzip, or tar -xzf for a .tar.gz"),
    (0, b"\xfd7zXZ\0", "compressed by xz. Unpack it: unxz, or tar -xJf for a .tar.xz"),
    (0, b"BZh", "compressed by bzip2. Unpack it: bunzip2"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard. Unpack it: unzstd"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive. Unpack it: 7z x"),
    (257, b"ustar", "a tar archive. Unpack it: tar -xf, and name the .onnx file in it"),
    (0, b"%PDF", "a PDF document"),
    (0, b"ftrt", "an engine of TensorRT, which has no way back; name the .onnx file it was built from"),
)  # fmt: skip

_TORCH = (
    "a file of PyTorch. {export .pt --trust --input NAME=DTYPE[DIMS]}, if it holds a whole module. If it holds a "
    f"state_dict: {_WEIGHTS[0].lower()}{_WEIGHTS[1:]}"
)
_ALSO = {".pt": (".pth",), ".pkl": (".pickle", ".joblib")}  # other file endings that `onnxsplit export` accepts

_JSON: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b'"irVersion"', b'"ir_version"', b'"opsetImport"'), "ONNX as JSON. {convert json}"),
    ((b'"learner"',), "an XGBoost model. {export .json}"),
    ((b'"model_type"', b'"architectures"'), "a configuration of transformers. {export .json}"),
    ((b"",), "JSON, not a model"),
)


def what_is(path: Path) -> str | None:
    """The kind of a file or folder, as a phrase that ends with what to do; None when its kind is not known.

    Args:
        path: a regular file that is not an ONNX model, or a folder.
    """
    try:
        if path.is_dir():
            return _folder(path)
        with open_regular(path) as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return None
    return next((_filled(phrase, path) for guess in _GUESSES if (phrase := guess(path, head)) is not None), None)


def _filled(phrase: str, path: Path) -> str:
    """A phrase with the commands in it written out for this file."""

    def export(match: re.Match[str]) -> str:
        ending, options = match[1], match[2] or ""
        file, first = path, ""
        if ending and path.suffix.lower() not in (ending, *_ALSO.get(ending, ())):
            file, first = path.with_suffix(ending), f"Rename it to {path.with_suffix(ending).name}. "
        return f"{first}Make ONNX of it: onnxsplit export {shlex.quote(str(file))} -o OUT.onnx{options}"

    def convert(match: re.Match[str]) -> str:
        load = f"onnx.load({str(path)!r}, format={match[1]!r})"
        return "Convert it: python -c " + shlex.quote(f"import onnx; onnx.save({load}, 'OUT.onnx')")

    return _CONVERT.sub(convert, _EXPORT.sub(export, phrase))


def _by_beginning(_: Path, head: bytes) -> str | None:
    return next((what for at, magic, what in _BEGINNINGS if head[at:].startswith(magic)), None)


def _zip(path: Path, head: bytes) -> str | None:
    if not head.startswith((b"PK\3\4", b"PK\5\6")):
        return None
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a zip archive that is truncated or damaged; copy or download it again"
    last = {name.rsplit("/", 1)[-1] for name in names}
    if "archive_format" in last:
        return "an ExportedProgram of PyTorch (.pt2). {export .pt2}"
    if "constants.pkl" in last:
        return "a TorchScript model of PyTorch. {export .pt --trust --input NAME=DTYPE[DIMS]}"
    if "data.pkl" in last:
        return _TORCH
    if "model.weights.h5" in last:
        return "a model of Keras (.keras). {export .keras}"
    if "schema.json" in last:
        return "a scikit-learn model saved by skops. {export .skops}"
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz), not a model; inputs are given with --inputs"
    held = _named(names)
    return f"a zip archive with {held} in it. Unpack it: unzip" if held else "a zip archive without an .onnx file in it"


def _named(names: Iterable[str]) -> str:
    """The ONNX files among some file names, as text."""
    models = sorted(name for name in names if name.endswith(".onnx"))
    more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
    return ", ".join(map(shown, models[:_LISTED])) + more


def _pickle(_: Path, head: bytes) -> str | None:
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF"):
        return _TORCH
    if len(head) > 2 and head[0] == 0x80 and head[1] in range(2, 6):
        return "a pickled Python object, as scikit-learn and joblib save. {export .pkl --trust}"
    return None


def _safetensors(path: Path, head: bytes) -> str | None:
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return f"a safetensors file. {_WEIGHTS}"
    return None


def _tensorflow(path: Path, head: bytes) -> str | None:
    if path.suffix == ".mlmodel":
        return f"a CoreML model, {_NO_WAY_BACK}"
    if head.startswith(b"\x08\x01\x12") and path.suffix == ".pb":
        return f"the main file of a SavedModel of TensorFlow. {_export_folder(path.parent)}"
    if head.startswith(b"\x0a") and (b"Placeholder" in head or b"\x12\x05Const" in head):
        return (
            "a graph of TensorFlow (GraphDef). Convert it: python -m tf2onnx.convert --graphdef "
            f"{shlex.quote(str(path))} --inputs NAME:0 --outputs NAME:0 --output OUT.onnx"
        )
    return None


def _text(path: Path, head: bytes) -> str | None:
    """The kind of a text file; None for a binary file."""
    if not head.strip(b"\0"):
        return "only zeros, as an unfinished download or copy leaves; fetch it again"
    if _CONTROL.search(head) or not _is_utf8(head):
        return None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:512].lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, which servers send when a file needs a login or has another address; download it again"
    if b"<net " in lower:
        return f"a model of OpenVINO (.xml, with its weights in .bin), {_NO_WAY_BACK}"
    if lower.startswith(b"<?xml"):
        return "XML, not a model"
    if path.name == "plan.json" and b'"format_version"' in text:
        return f"the plan.json of a plan directory. Run the plan: onnxsplit run {shlex.quote(str(path.parent))}"
    if text.startswith((b"{", b"[")):
        return next(what for keys, what in _JSON if any(key in text for key in keys))
    if b"<" in text and b"ir_version" in text and b"=>" in text:
        return "ONNX in its text form. {convert onnxtxt}"
    if text.startswith((b"ir_version:", b"graph {", b"producer_name:", b"opset_import {")):
        return "ONNX as protobuf's text. {convert textproto}"
    if path.suffix == ".py":
        return "Python code. {export .py}"
    begin = text[:60].decode(errors="replace").splitlines()[:1]
    return f"text that begins with {begin[0] if begin else ''!r}"


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4  # the last character may be cut in two
    return True


_GUESSES: tuple[Callable[[Path, bytes], str | None], ...] = (
    _by_beginning, _zip, _pickle, _safetensors, _tensorflow, _text,
)  # fmt: skip


def _export_folder(folder: Path) -> str:
    return f"Make ONNX of it: onnxsplit export {shlex.quote(str(folder))} -o OUT.onnx"


def _folder(path: Path) -> str | None:
    """What to do with a folder."""
    names = {entry.name for entry in path.iterdir()}
    if "plan.json" in names:
        plan = shlex.quote(str(path))
        return (
            "a plan directory: the model has been cut already. "
            f"Run it: onnxsplit run {plan}, or onnxsplit serve {plan}. "
            f"Compare it with its model: onnxsplit verify {plan} MODEL"
        )
    if "saved_model.pb" in names:
        return f"a SavedModel of TensorFlow. {_export_folder(path)}"
    if "Manifest.json" in names and path.suffix == ".mlpackage":
        return f"a CoreML package, {_NO_WAY_BACK}"
    models = _named(str(file.relative_to(path)) for file in (*path.glob("*.onnx"), *path.glob("onnx/*.onnx")))
    if models:
        return f"a folder; name the .onnx file in it: {models}"
    if "config.json" in names:
        return f"a folder of transformers. {_export_folder(path)}"
    return None
