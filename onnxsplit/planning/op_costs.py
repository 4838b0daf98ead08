"""The costs of a plan in a file: the time of each op, the shapes of the tensors, and which ops stay together.

The file is an ``.npz`` of plain numbers. Lists of unequal length are stored flat: texts as the bytes ``X.text`` and
their lengths ``X.lengths``, lists of numbers as ``X.numbers`` and ``X.lengths``.

| arrays | meaning |
| --- | --- |
| ``op`` (texts), ``op_ns`` | the first output of each op, and its time on a device of speed 1 in nanoseconds |
| ``tensor`` (texts), ``type``, ``batch_axis`` | name of each tensor, ONNX's number of its type, its batch axis or -1 |
| ``shape`` (numbers), ``ranked`` | its declared shape; -1 is an unknown size, -2 - N is symbol N |
| ``symbol`` (texts) | the names of symbolic sizes |
| ``size`` (numbers), ``sized`` | its shape at the sizes that the plan was made for |
| ``left_by`` (texts), ``left`` (numbers) | each provider that leaves ops to the CPU, and the positions of these ops |
| ``local`` | positions of the ops of a decoder that every stage computes for itself |
| ``together`` (numbers) | positions of the ops in each group that shares a stage of a decoder |

``ranked`` and ``sized`` are 0 where the rank, or the size, is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec.structs
import numpy as np

from onnxsplit.errors import InputError, PlanError, one_line
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.shapes import Shapes
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Plan, TensorSpec
from onnxsplit.plan_base import FileEntry
from onnxsplit.planning.result import PlanningResult
from onnxsplit.planning.target import Target
from onnxsplit.stages.model_file import file_entry
from onnxsplit.tensors import ONNX_TYPE_NUMBER, Array, type_name

COSTS_FILE = "costs.npz"
_UNKNOWN = -1
_FIRST_SYMBOL = -2
_MOST_NS = 2**53 - 1


@dataclass(frozen=True)
class KnownCosts:
    """What a plan knows of the costs of its model's ops.

    Attributes:
        op_ns: time of each op on a device of speed 1 in nanoseconds, by its first output.
        shapes: types and shapes of the tensors.
        batch_axes: the batch axis of each tensor for which one was proven.
        left: the ops that each provider leaves to the CPU, by first outputs.
        local: of a decoder, the ops that every stage computes for itself.
        together: of a decoder, groups of ops that share a stage.
    """

    op_ns: Mapping[str, int]
    shapes: Shapes
    batch_axes: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, frozenset[str]] = field(default_factory=dict)
    local: frozenset[str] = frozenset()
    together: tuple[tuple[str, ...], ...] = ()


def known_costs(made: PlanningResult, target: Target, batch_axes: Mapping[str, int]) -> KnownCosts:
    """What is known of the costs once a model was cut.

    Args:
        made: the plan, with the model and the times of its ops.
        target: the devices that the plan is for.
        batch_axes: the batch axis of each tensor for which one was proven.
    """
    graph, shapes, decoding = made.subject.graph, made.subject.shapes, made.subject.decoding
    named = {*graph.inputs, *graph.constants, *graph.producer}
    key = [first_output(graph, index) for index in range(len(graph.ops))]
    return KnownCosts(
        op_ns=dict(zip(key, made.op_ns, strict=True)),
        shapes=Shapes(
            {name: spec for name, spec in shapes.specs.items() if name in named},
            {name: size for name, size in shapes.sizes.items() if name in named},
        ),
        batch_axes={name: axis for name, axis in batch_axes.items() if name in named},
        left={text: frozenset(key[op] for op in facts.left) for text, facts in target.facts.items() if facts.left},
        local=frozenset(key[op] for op in decoding.local) if decoding is not None else frozenset(),
        together=tuple(tuple(key[op] for op in group) for group in decoding.together) if decoding is not None else (),
    )


def first_output(graph: OpGraph, index: int) -> str:
    """The name of an op's first output, by which costs name the op: names of ops may be empty or occur twice."""
    return graph.ops[index].outputs[0]


def save_costs(folder: Path, known: KnownCosts) -> FileEntry:
    """Write the costs into a plan's folder.

    Raises:
        InputError: the file cannot be written.
    """
    ops = {name: position for position, name in enumerate(known.op_ns)}
    specs = known.shapes.specs
    tensors = list(specs)
    named = dict.fromkeys(dim for spec in specs.values() for dim in spec.shape or () if isinstance(dim, str))
    symbols = {dim: number for number, dim in enumerate(dim for dim in named if dim != "?")}

    def number(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        return _UNKNOWN if dim == "?" else _FIRST_SYMBOL - symbols[dim]

    shapes = [specs[name].shape for name in tensors]
    sizes = [known.shapes.sizes.get(name) for name in tensors]
    save_npz(
        folder / COSTS_FILE,
        {
            **_texts("op", known.op_ns),
            "op_ns": np.array(list(known.op_ns.values()), np.int64),
            **_texts("tensor", tensors),
            "type": np.array([ONNX_TYPE_NUMBER[specs[name].dtype] for name in tensors], np.uint8),
            "batch_axis": np.array([known.batch_axes.get(name, _UNKNOWN) for name in tensors], np.int8),
            **_lists("shape", [[number(dim) for dim in shape or ()] for shape in shapes]),
            "ranked": np.array([shape is not None for shape in shapes], np.uint8),
            **_texts("symbol", symbols),
            **_lists("size", [size or () for size in sizes]),
            "sized": np.array([size is not None for size in sizes], np.uint8),
            **_texts("left_by", known.left),
            **_lists("left", [sorted(ops[name] for name in names) for names in known.left.values()]),
            "local": np.array(sorted(ops[name] for name in known.local), np.int64),
            **_lists("together", [[ops[name] for name in group] for group in known.together]),
        },
    )
    return file_entry(folder / COSTS_FILE)


def with_costs(plan: Plan, file: FileEntry) -> Plan:
    """The plan with the file of its costs."""
    return msgspec.structs.replace(plan, costs=msgspec.structs.replace(plan.costs, ops=file))


def load_costs(file: Path) -> KnownCosts:
    """Read what :func:`save_costs` wrote.

    Raises:
        PlanError: the file cannot be read, or contradicts itself.
    """
    try:
        stored = load_npz(file)
        ops, tensors = _read_texts(stored, "op"), _read_texts(stored, "tensor")
        symbols = _read_texts(stored, "symbol")
        op_ns = _column(stored, "op_ns", len(ops), 0, _MOST_NS)
        types = [type_name(number) for number in _column(stored, "type", len(tensors), 0, 255)]
        shapes = _read_lists(stored, "shape", len(tensors), _FIRST_SYMBOL - len(symbols) + 1, _MOST_NS)
        sizes = _read_lists(stored, "size", len(tensors), 0, _MOST_NS)
        ranked, sized = (_column(stored, name, len(tensors), 0, 1) for name in ("ranked", "sized"))
        axes = _column(stored, "batch_axis", len(tensors), _UNKNOWN, 63)
        providers = _read_texts(stored, "left_by")
        left = _read_lists(stored, "left", len(providers), 0, len(ops) - 1)
        local = _column(stored, "local", stored["local"].size, 0, len(ops) - 1)
        together = _read_lists(stored, "together", None, 0, len(ops) - 1)
        if None in types:
            raise ValueError("it names a type that ONNX does not have")
    except (InputError, KeyError, ValueError) as error:
        raise PlanError(f"the costs in {file} cannot be used: {one_line(error)}. Partition the model again") from error

    def dim(number: int) -> int | str:
        return number if number >= 0 else "?" if number == _UNKNOWN else symbols[_FIRST_SYMBOL - number]

    known = zip(tensors, types, ranked, shapes, strict=True)
    return KnownCosts(
        op_ns=dict(zip(ops, op_ns, strict=True)),
        shapes=Shapes(
            {
                name: TensorSpec(dtype=str(kind), shape=tuple(map(dim, shape)) if has_rank else None)
                for name, kind, has_rank, shape in known
            },
            {name: tuple(size) for name, has_size, size in zip(tensors, sized, sizes, strict=True) if has_size},
        ),
        batch_axes={name: axis for name, axis in zip(tensors, axes, strict=True) if axis != _UNKNOWN},
        left={text: frozenset(ops[op] for op in found) for text, found in zip(providers, left, strict=True)},
        local=frozenset(ops[op] for op in local),
        together=tuple(tuple(ops[op] for op in group) for group in together),
    )


def _texts(name: str, texts: Iterable[str]) -> dict[str, Array]:
    encoded = [text.encode() for text in texts]
    return {
        f"{name}.text": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}.lengths": np.array([len(text) for text in encoded], np.int64),
    }


def _lists(name: str, lists: Sequence[Sequence[int]]) -> dict[str, Array]:
    return {
        f"{name}.numbers": np.array([number for one in lists for number in one], np.int64),
        f"{name}.lengths": np.array([len(one) for one in lists], np.int64),
    }


def _read_texts(stored: Mapping[str, Array], name: str) -> list[str]:
    content, ends = _flat(stored, name, "text", None)
    return [bytes(content[start:end]).decode() for start, end in zip([0, *ends], ends, strict=False)]


def _read_lists(stored: Mapping[str, Array], name: str, count: int | None, least: int, most: int) -> list[list[int]]:
    content, ends = _flat(stored, name, "numbers", count)
    numbers = _bounded(f"{name}.numbers", content, least, most)
    return [numbers[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _flat(stored: Mapping[str, Array], name: str, part: str, count: int | None) -> tuple[Array, list[int]]:
    """A flat array, and the position after the last element of each list in it."""
    content, lengths = stored[f"{name}.{part}"], stored[f"{name}.lengths"]
    ends = list(np.cumsum(_bounded(f"{name}.lengths", lengths, 0, content.size), dtype=np.int64))
    if content.ndim != 1 or (ends[-1] if ends else 0) != content.size or count not in (None, len(ends)):
        raise ValueError(f"the lengths of {name!r} do not fit")
    return content, [int(end) for end in ends]


def _column(stored: Mapping[str, Array], name: str, count: int, least: int, most: int) -> list[int]:
    if stored[name].shape != (count,):
        raise ValueError(f"{name!r} has the shape {stored[name].shape}, not ({count},)")
    return _bounded(name, stored[name], least, most)


def _bounded(name: str, array: Array, least: int, most: int) -> list[int]:
    """Whole numbers as a list."""
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name!r} is not a list of whole numbers")
    if array.size and not least <= int(array.min()) <= int(array.max()) <= most:
        raise ValueError(f"{name!r} has numbers outside {least} to {most}")
    numbers: list[int] = array.tolist()
    return numbers
