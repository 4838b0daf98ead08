"""The part of a plan that follows from its model, whatever the cut, and the files that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxsplit
from onnxsplit.model.graph_io import constant_text, defaults
from onnxsplit.npz import save_npz
from onnxsplit.plan import CreatedWith, CustomOps, ModelInfo, Passthrough
from onnxsplit.plan_base import FileEntry
from onnxsplit.planning.decoder_block import copied_text
from onnxsplit.planning.subject import Subject
from onnxsplit.providers import runtime_version
from onnxsplit.stages.extract import write_constant
from onnxsplit.stages.model_file import file_entry

EXAMPLE_FILE = "example.npz"


@dataclass(frozen=True)
class Origin:
    """What a plan says of its model. The attributes are those of :class:`~onnxsplit.plan.Plan`.

    Attributes:
        text: the files of a decoder's tokenizer.
    """

    created_with: CreatedWith
    model: ModelInfo
    passthrough: Mapping[str, Passthrough]
    example_inputs: FileEntry | None
    defaults: Mapping[str, FileEntry]
    constant_inputs: Mapping[str, str]
    dropped_outputs: tuple[str, ...]
    dropped_inputs: tuple[str, ...]
    custom_ops: tuple[CustomOps, ...]
    text: tuple[FileEntry, ...]


def origin_of(subject: Subject, folder: Path | None) -> Origin:
    """Describe the model that is cut, and write the files that belong to it into the plan's folder.

    Args:
        subject: the model.
        folder: the plan's folder; None to write nothing.

    Raises:
        PartitionError, InputError: a file cannot be read or written.
    """
    graph = subject.graph
    source, changes = graph.source, graph.source.io_changes
    decoding = subject.decoding
    if folder is not None:
        save_npz(folder / EXAMPLE_FILE, subject.small_inputs)
    return Origin(
        created_with=CreatedWith(onnxsplit=onnxsplit.__version__, onnxruntime=runtime_version()),
        model=ModelInfo(
            name=source.path.name,
            sha256=source.sha256,
            ir_version=source.proto.ir_version,
            opsets={entry.domain: entry.version for entry in source.proto.opset_import},
        ),
        passthrough=_passthrough(subject, folder),
        example_inputs=file_entry(folder / EXAMPLE_FILE) if folder is not None else None,
        defaults=_defaults(subject, folder) if folder is not None else {},
        constant_inputs={name: constant_text(source, name) for name in graph.overridable},
        dropped_outputs=changes.dropped_outputs if changes is not None else (),
        dropped_inputs=changes.dropped_inputs if changes is not None else (),
        custom_ops=tuple(CustomOps(name=one.name, sha256=one.sha256) for one in subject.custom_ops),
        text=copied_text(decoding.decoder.claim.text, folder) if decoding is not None and folder is not None else (),
    )


def _passthrough(subject: Subject, folder: Path | None) -> dict[str, Passthrough]:
    """The sources of outputs that no stage computes; writes a file for each constant."""
    graph = subject.graph
    sources = {}
    for number, name in enumerate(graph.outputs):
        if name in graph.inputs:
            sources[name] = Passthrough(input=name)
        elif name in graph.constants and folder is not None:
            sources[name] = Passthrough(file=write_constant(graph, name, folder, f"constant{number}.npz"))
    return sources


def _defaults(subject: Subject, folder: Path) -> dict[str, FileEntry]:
    """Write a file for each input that has a default."""
    entries = {}
    for number, (name, array) in enumerate(defaults(subject.graph.source).items()):
        file = folder / f"default{number}.npz"
        save_npz(file, {name: array})
        entries[name] = file_entry(file)
    return entries
