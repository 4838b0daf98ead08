"""Export of models of other frameworks to ONNX. Each converter has a file of its own, imported when it is used.

    source ----> recognised ----> converted by its framework's own tool ----> finished ----> compared ----> in its place
    (sources)    (sources)        (pytorch, tensorflow, ...)                  (finish)       (finish)

A converter returns :class:`Conversion` objects: how to write each model, and how to get the framework's own outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from onnxsplit.errors import ExportError
from onnxsplit.export.conversion import TOLERANCE, Conversion, ExportOptions, Recipe
from onnxsplit.export.sources import Source, SourceKind, recognise
from onnxsplit.files import written_file

__all__ = ["TOLERANCE", "Exported", "Recipe", "convert", "export"]


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        path: the model file.
        framework: the framework that the model came from, with its version.
        differences: for each output, the largest difference to the framework's, relative to the output's scale; empty
            when the outputs were not compared.
        unread: inputs of the framework's function on which no output of the model depends.
        files: the files of text that were written beside the model, its tokenizer for example.
        notes: what was not taken over as it was, and which of these files replaced others.
        size_bytes: size of the model with its weights.
    """

    path: Path
    framework: str
    differences: Mapping[str, float]
    unread: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    size_bytes: int = 0


_ALL: Set[SourceKind] = set(get_args(SourceKind))
_TAKES_INPUTS: Set[SourceKind] = {"recipe", "torchscript", "saved-model", "keras", "pickle", "skops"}

_CONVERTERS: Mapping[SourceKind, str] = {
    "recipe": "code",
    "exported-program": "pytorch",
    "torchscript": "pytorch",
    "transformers": "huggingface",
    "hub": "huggingface",
    "saved-model": "tensorflow",
    "keras": "tensorflow",
    "tflite": "tensorflow",
    "pickle": "sklearn",
    "skops": "sklearn",
    "lightgbm": "boosters",
    "xgboost": "boosters",
    "catboost": "boosters",
    "gguf": "gguf.converter",
    "onnx": "onnx_file",
}


def export(source: str, out: str | Path, **options: Any) -> tuple[Exported, ...]:
    """Export a model to ONNX. Each file appears complete or not at all.

    Args:
        source: a recipe (``FILE.py[:NAME]``), an importable callable (``package.module:NAME``), a saved model, a folder
            or configuration of ``transformers``, ``hf://ORG/REPO[@REVISION][/FILE]``; see docs/export.md.
        out: the model file to write. For a source that becomes several models, each file name also has the part's name.
        options: the attributes of :class:`ExportOptions`.

    Returns:
        The models that were written.

    Raises:
        ExportError: the source is unknown or damaged, would run code without ``trust``, cannot be exported, or the
            outputs differ.
        MissingDependency: the framework or its converter is not installed; names the extra.
    """
    from onnxsplit.export import finish

    wanted, target = ExportOptions(**options), _target(Path(out))
    if not target.absolute().parent.is_dir():
        raise ExportError(f"the folder {target.absolute().parent} does not exist; create it or choose another with -o")
    recognised = recognise(source)
    if recognised.kind != "onnx" and recognised.path is not None and _is_same(recognised.path, target):
        raise ExportError(f"{out} is the source, which the model would replace. Choose another file with -o")
    wanted.say(f"{source} is {recognised.what}")
    done = []
    with tempfile.TemporaryDirectory(prefix=".onnxsplit-", dir=target.absolute().parent) as scratch:
        wanted = replace(wanted, scratch=Path(scratch))
        conversions = convert(recognised, wanted)
        for number, conversion in enumerate(conversions):
            name = target.name
            if conversion.part is not None:
                name = f"{target.name.removesuffix('.onnx')}-{conversion.part}.onnx"
            if name in conversion.files:
                raise ExportError(
                    f"{name} is the name of a file of text that is written beside the model; choose another with -o"
                )
            folder = Path(scratch) / f"{number}"
            folder.mkdir()
            differences, unread = finish.finish(conversion, folder / name, source, wanted)
            size = sum(part.stat().st_size for part in folder.iterdir())
            files, notes = _written(conversion.files, folder, target.parent)
            notes = (*conversion.notes, *notes)
            path, framework = target.parent / name, conversion.framework
            done.append((folder, Exported(path, framework, differences, unread, files, notes, size)))
        for folder, exported in done:  # the data of a model is moved before the model
            model = folder / exported.path.name
            for part in sorted(folder.iterdir(), key=lambda part, model=model: part == model):  # type: ignore[misc]
                part.replace(_target(exported.path.parent / part.name))
    return tuple(exported for _, exported in done)


def _written(files: Mapping[str, bytes], folder: Path, beside: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Write files of text into a folder, but those that are beside the model already.

    Returns:
        The paths that they will have, and a note for each that replaces another file.

    Raises:
        ExportError: one of these paths exists and is not a regular file.
    """
    written, notes = [], []
    for name, content in files.items():
        path = _target(beside / name)
        if path.exists():
            if path.stat().st_size == len(content) and path.read_bytes() == content:
                continue
            notes.append(f"{beside / name} had another content and was replaced")
        (folder / name).write_bytes(content)
        written.append(beside / name)
    return tuple(written), tuple(notes)


def _is_same(source: Path, target: Path) -> bool:
    return target.exists() and source.exists() and target.samefile(source)


def _target(path: Path) -> Path:
    """The file that is written for a path: the end of a chain of links.

    Raises:
        ExportError: the path exists and is not a regular file.
    """
    try:
        return written_file(path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}. Choose another file with -o") from error


def convert(source: Source, options: ExportOptions) -> Sequence[Conversion]:
    """Convert a source with the module for its kind.

    Raises:
        ExportError: as :func:`export`, or an option was given that does not apply to such a source.
    """
    for option, given, kinds in (
        ("--input", options.inputs, _TAKES_INPUTS),
        ("--set", options.parameters, {"recipe"}),
        ("--no-cache", not options.cache, {"transformers", "hub"}),
        ("--static-cache", options.static_cache, {"transformers", "hub"}),
        ("--weights", options.weights != "auto", {"gguf"}),
        ("--opset", options.opset, _ALL - {"gguf"}),
        ("--offline", options.offline, {"hub"}),
    ):
        if given and source.kind not in kinds:
            raise ExportError(f"{source.text} is {source.what}; {option} does not apply to it, so leave it out")
    module = import_module(f"onnxsplit.export.{_CONVERTERS[source.kind]}")
    conversions: Sequence[Conversion] = module.convert(source, options)
    return conversions
