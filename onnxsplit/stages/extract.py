"""Stage files: each a valid ONNX model of its own.

A stage keeps the source's IR version (4 at least), opsets, metadata and symbolic dimension names, the functions its ops
call (and those that they call), and only the initializers and copied ops it reads. Names of ops and tensors stay those
of the source. Initializers that the source lists as inputs are constants in the stages.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import onnx
from google.protobuf.message import EncodeError

from onnxsplit.cost.analytic import activation_bytes
from onnxsplit.errors import PartitionError
from onnxsplit.files import written_file
from onnxsplit.model.atoms import Atoms, needed_tensors
from onnxsplit.model.ends import stored_array
from onnxsplit.model.external import external_range, is_external, open_external
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.shapes import Shapes, spec_of, value_info
from onnxsplit.model.source import (
    SourceModel,
    called_functions,
    functions_of,
    graph_tensors,
    node_tensors,
    tensor_bytes,
)
from onnxsplit.model.storage import Extent, blocks, extents
from onnxsplit.npz import save_npz
from onnxsplit.plan import FileEntry

CONSTANTS_IR_VERSION = 4
"""The first IR version in which an initializer need not be an input, as those of stages are not."""

_CHUNK = 1 << 20  # small enough to be hashed while it is still in the processor's cache
_ALIGNMENT = 4096  # external data starts on pages, so that ONNX Runtime can map it


@dataclass(frozen=True)
class StageParts:
    """What one stage is made of.

    Attributes:
        ops: its own ops and its copies of copied ops, ascending.
        own: its own ops alone.
        inputs: tensors it takes, those of the model first.
        outputs: tensors it gives, in the order they are written.
        constants: initializers it reads.
    """

    ops: tuple[int, ...]
    own: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]


def stage_parts(graph: OpGraph, atoms: Atoms, assignment: Sequence[int]) -> tuple[StageParts, ...]:
    """Turn an assignment of atoms to stages into the parts of every stage."""
    stages = max(assignment, default=-1) + 1
    own: list[list[int]] = [[] for _ in range(stages)]
    stage_of: dict[int, int] = {}
    for atom, stage in enumerate(assignment):
        own[stage].extend(atoms.ops[atom])
        stage_of.update(dict.fromkeys(atoms.ops[atom], stage))
    needs = needed_tensors(graph, atoms.copied)
    wanted: dict[str, None] = dict.fromkeys(graph.outputs)
    for op, stage in stage_of.items():
        for name in needs[op]:
            writer = graph.producer.get(name)
            if writer is not None and stage_of[writer] != stage:
                wanted[name] = None
    return tuple(_parts(graph, atoms.copied, tuple(sorted(ops)), wanted) for ops in own)


def _parts(graph: OpGraph, copied: frozenset[int], own: tuple[int, ...], wanted: Mapping[str, None]) -> StageParts:
    ops: set[int] = set()
    inputs: dict[str, None] = {}
    constants: dict[str, None] = {}
    pending = list(own)
    inside = set(own)
    while pending:
        index = pending.pop()
        if index in ops:
            continue
        ops.add(index)
        for name in graph.ops[index].reads:
            writer = graph.producer.get(name)
            if name in graph.constants:
                constants[name] = None
            elif writer in copied:
                pending.append(writer)
            elif writer not in inside:
                inputs[name] = None
    order = {name: position for position, name in enumerate(graph.inputs)}
    return StageParts(
        ops=tuple(sorted(ops)),
        own=own,
        inputs=tuple(
            sorted(inputs, key=lambda name: (order.get(name, len(order)), graph.producer.get(name, -1), name))
        ),
        outputs=tuple(name for index in own for name in graph.ops[index].outputs if name in wanted),
        constants=tuple(sorted(constants)),
    )


def whole_parts(graph: OpGraph) -> StageParts:
    """The whole model as one stage, for figures."""
    every = tuple(range(len(graph.ops)))
    constants = tuple(sorted({name for op in graph.ops for name in op.reads if name in graph.constants}))
    return StageParts(every, every, graph.inputs, graph.outputs, constants)


def peak_memory_bytes(graph: OpGraph, shapes: Shapes, parts: StageParts, *, packed: bool = True) -> int:
    """Weights, and the largest sum of live activations while the ops run in order.

    With ``packed``, as ONNX Runtime does on a CPU, bytes that initializers share are in memory once, and weights count
    twice that it keeps packed for its kernels, too. Without, every initializer has memory of its own.
    """
    sizes = [graph.constants[name] for name in parts.constants if not packed or name in graph.packed]
    shared = 0 if packed else _initializer_bytes(graph, parts)
    activations = activation_bytes(graph, shapes, parts.ops, frozenset(parts.outputs))
    return weight_bytes(graph, parts) - shared + sum(sizes) + activations


def weight_bytes(graph: OpGraph, parts: StageParts) -> int:
    """Bytes of the constants that a stage holds: initializers, and tensors in the attributes of its ops.

    Bytes that several initializers share count once.
    """
    attributes = node_tensors(graph.ops[index].node for index in parts.ops)
    return _initializer_bytes(graph, parts) + sum(tensor_bytes(tensor) for tensor in attributes)


def _initializer_bytes(graph: OpGraph, parts: StageParts) -> int:
    held = set(parts.constants)
    return sum(stored.size_bytes for stored in graph.stored if held & stored.names)


def _ignore(_: int) -> None:
    """Report to nobody."""


def write_stage(
    graph: OpGraph,
    shapes: Shapes,
    parts: StageParts,
    folder: Path,
    name: str,
    *,
    wrote: Callable[[int], None] = _ignore,
) -> tuple[FileEntry, ...]:
    """Write one stage, and its external data where its initializers are external in the source.

    Args:
        graph: the source's graph.
        shapes: types of the tensors on the stage's border.
        parts: what the stage is made of.
        folder: where to.
        name: file name of the model, ``NAME.onnx``; external data goes to ``NAME.data``.
        wrote: told of every number of bytes of external data written.

    Raises:
        PartitionError: the disk is full or the folder cannot be written.
    """
    model = stage_model(graph, shapes, parts)
    try:
        data = copy_external(graph.source, model, folder / Path(name).with_suffix(".data"), wrote)
        content = serialized(model)
        (folder / name).write_bytes(content)
    except OSError as error:
        raise PartitionError(f"cannot write {folder / name}: {error.strerror}") from error
    entry = FileEntry(name=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    return (entry, *data)


def write_model(
    source: SourceModel, model: onnx.ModelProto, out: Path, beside: Mapping[str, str], *, by_content: bool = False
) -> tuple[Path, ...]:
    """Write a model, its external data to ``OUT.data``, and texts to ``OUT.NAME``; the model appears last.

    ``by_content`` is as for :func:`copy_external`.

    Returns:
        The files, the model first.

    Raises:
        OSError: a file cannot be written, or what is there is no regular file.
    """
    out = written_file(out)
    folder = out.parent
    with tempfile.TemporaryDirectory(prefix=".onnxsplit-", dir=folder) as scratch:
        copy_external(source, model, Path(scratch) / f"{out.name}.data", by_content=by_content)
        (Path(scratch) / out.name).write_bytes(serialized(model))
        for name, text in beside.items():
            (Path(scratch) / f"{out.name}.{name}").write_text(text)
        written = sorted(Path(scratch).iterdir(), key=lambda file: file.name == out.name)
        targets = [written_file(folder / file.name) for file in written]
        return tuple(Path(shutil.move(*pair)) for pair in zip(written, targets, strict=True))[::-1]


def serialized(model: onnx.ModelProto) -> bytes:
    """A model's bytes.

    Raises:
        PartitionError: it is above the 2 GB that protobuf allows.
    """
    try:
        content: bytes = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise PartitionError(
            f"a part of the model is above the 2 GB a protobuf can hold ({error}); store the model with external data"
        ) from error
    return content


def stage_model(graph: OpGraph, shapes: Shapes, parts: StageParts) -> onnx.ModelProto:
    """A stage as a protobuf; external data still points into the source's files."""
    source = graph.source.proto
    model = onnx.ModelProto()
    for descriptor, value in source.ListFields():
        if descriptor.name == "graph" or descriptor.name in ("functions", "training_info"):
            continue
        if isinstance(value, int | str):
            setattr(model, descriptor.name, value)
        else:  # protobuf below 6.31 has no is_repeated, which would say it
            getattr(model, descriptor.name).extend(value)
    model.ir_version = max(source.ir_version, CONSTANTS_IR_VERSION)
    nodes = [graph.ops[index].node for index in parts.ops]
    called = called_functions(nodes, functions_of(source))
    model.functions.extend(f for f in source.functions if (f.domain, f.name, f.overload) in called)
    target = model.graph
    target.name = source.graph.name
    target.metadata_props.extend(source.graph.metadata_props)
    target.node.extend(nodes)
    held = set(parts.constants)
    target.initializer.extend(tensor for tensor in source.graph.initializer if tensor.name in held)
    target.sparse_initializer.extend(s for s in source.graph.sparse_initializer if s.values.name in held)
    declared = {value.name: value for value in (*source.graph.input, *source.graph.output)}
    for names, values in ((parts.inputs, target.input), (parts.outputs, target.output)):
        values.extend(_border(name, shapes, declared) for name in names)
    present = {name for index in parts.ops for name in (*graph.ops[index].reads, *graph.ops[index].outputs)}
    target.quantization_annotation.extend(a for a in source.graph.quantization_annotation if a.tensor_name in present)
    return model


def _border(name: str, shapes: Shapes, declared: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    spec = shapes.specs.get(name)
    if spec is None:  # an output of the model of a kind that only ONNX Runtime knows
        return declared.get(name) or onnx.ValueInfoProto(name=name)
    if name in declared and spec_of(declared[name]) == spec:
        return declared[name]
    return value_info(name, spec)


def copy_external(
    source: SourceModel,
    model: onnx.ModelProto,
    path: Path,
    wrote: Callable[[int], None] = _ignore,
    *,
    by_content: bool = False,
) -> tuple[FileEntry, ...]:
    """Copy the external data that a stage needs into its own file, and point the stage at it.

    Bytes that tensors share are written once; large initializers of the model file that are equal go there, too.

    Args:
        source: the model that the external data is of.
        model: the stage.
        path: its data file.
        wrote: told of every number of bytes written.
        by_content: look for equal bytes in different places, too.
    """
    count = len(model.graph.initializer)
    tensors = [t for position, t in enumerate(graph_tensors(model.graph)) if position < count or is_external(t)]
    places = extents(source.place, tensors, by_content=by_content)
    block_of = blocks(place for place in places if place is not None and place.length)
    inside: dict[Extent, list[tuple[onnx.TensorProto, Extent]]] = {}
    for tensor, place in zip(tensors, places, strict=True):
        if place is not None and not place.length:  # ONNX Runtime takes no place in a file for what has no bytes
            _keep_inside(tensor)
        elif place is not None:
            inside.setdefault(block_of[place], []).append((tensor, place))
    if not inside:
        return ()
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as target, ThreadPoolExecutor(1) as copier:
        for block, held in inside.items():
            digest.update(bytes(-end % _ALIGNMENT))
            end += -end % _ALIGNMENT
            tensor, place = held[0]
            if is_external(tensor):
                file, offset, _ = external_range(source.place, tensor)
                start = offset - (place.offset - block.offset)
                with open_external(file) as origin:
                    copied = copier.submit(_copy_range, origin.fileno(), target.fileno(), start, end, block.length)
                    _hash_range(digest, origin, start, block.length, wrote)
                    copied.result()
            else:
                target.seek(end)
                target.write(tensor.raw_data)
                digest.update(tensor.raw_data)
                wrote(block.length)
            for tensor, place in held:
                _point(tensor, path.name, end + place.offset - block.offset, place.length)
            end += block.length
    return (FileEntry(name=path.name, sha256=digest.hexdigest(), size_bytes=end),)


def _keep_inside(tensor: onnx.TensorProto) -> None:
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = b""


def _point(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _copy_range(origin: int, target: int, offset: int, target_offset: int, length: int) -> None:
    """Copy bytes from file to file inside the kernel; by hand where the file systems cannot."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(origin, target, length - done, offset + done, target_offset + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            count = os.pwrite(target, os.pread(origin, min(_CHUNK, length - done), offset + done), target_offset + done)
        if not count:
            raise PartitionError("an external data file became shorter while it was read")
        done += count


def _hash_range(digest: hashlib._Hash, origin: FileIO, offset: int, length: int, done: Callable[[int], None]) -> None:
    buffer = bytearray(_CHUNK)
    origin.seek(offset)
    while length:
        count = origin.readinto(memoryview(buffer)[: min(length, _CHUNK)])
        if not count:
            raise PartitionError("an external data file became shorter while it was read")
        digest.update(memoryview(buffer)[:count])
        length -= count
        done(count)


def write_constant(graph: OpGraph, output: str, folder: Path, name: str) -> FileEntry:
    """Write an initializer that is an output of the model as an ``.npz``."""
    tensor = next((t for t in graph.source.proto.graph.initializer if t.name == output), None)
    if tensor is None:
        raise PartitionError(f"output {output!r} is a sparse initializer; a stage cannot serve it")
    save_npz(folder / name, {output: stored_array(graph.source, tensor)})
    return file_entry(folder / name)


def file_entry(path: Path) -> FileEntry:
    """Name, size and SHA-256 of a file that was written."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(name=path.name, sha256=digest, size_bytes=path.stat().st_size)
