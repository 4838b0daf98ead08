"""The parts of each stage (ops, borders and constants) for an assignment of atoms to stages, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnxsplit.cost.analytic import activation_bytes
from onnxsplit.model.atoms import Atoms, needed_tensors
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import node_tensors, tensor_bytes
from onnxsplit.model.shapes import Shapes


@dataclass(frozen=True)
class StageParts:
    """The parts of one stage.

    Attributes:
        ops: indices of its own ops and of the ops that are copied into it, ascending.
        own: indices of its own ops, ascending.
        inputs: names of the tensors that it reads, inputs of the model first.
        outputs: names of the tensors that it writes, in the order in which they are written.
        constants: names of the initializers that it reads.
        renamed: the inputs that copied ops read instead of others, whose shapes are the same.
    """

    ops: tuple[int, ...]
    own: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)


def stage_parts(
    graph: OpGraph, atoms: Atoms, assignment: Sequence[int], alike: Mapping[str, int] | None = None
) -> tuple[StageParts, ...]:
    """Turn an assignment of atoms to stages into the parts of every stage.

    Args:
        graph: the model.
        atoms: its atoms.
        assignment: the stage of each atom.
        alike: inputs of which copied ops read only the shape, with the number of a group; of inputs of one group, all
            sizes that they read are the same in every run. A copied op reads an input that an op of the stage itself
            reads, if there is one in the group.
    """
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
    return tuple(_parts(graph, atoms.copied, tuple(sorted(ops)), wanted, alike or {}) for ops in own)


def _parts(
    graph: OpGraph,
    copied: frozenset[int],
    own: tuple[int, ...],
    wanted: Mapping[str, None],
    alike: Mapping[str, int],
) -> StageParts:
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
    renamed = _own_instead(graph, own, inputs, alike)
    inputs = dict.fromkeys(renamed.get(name, name) for name in inputs)
    order = {name: position for position, name in enumerate(graph.inputs)}
    return StageParts(
        ops=tuple(sorted(ops)),
        own=own,
        inputs=tuple(
            sorted(inputs, key=lambda name: (order.get(name, len(order)), graph.producer.get(name, -1), name))
        ),
        outputs=tuple(name for index in own for name in graph.ops[index].outputs if name in wanted),
        constants=tuple(sorted(constants)),
        renamed=renamed,
    )


def _own_instead(
    graph: OpGraph, own: Sequence[int], inputs: Mapping[str, None], alike: Mapping[str, int]
) -> dict[str, str]:
    """For inputs that only copied ops read, an input of the same group that the stage's own ops read."""
    mine = {name for op in own for name in graph.ops[op].reads}
    first: dict[int, str] = {}
    for name in graph.inputs:
        if name in mine and name in alike:
            first.setdefault(alike[name], name)
    return {name: first[alike[name]] for name in inputs if name in alike and name not in mine and alike[name] in first}


def whole_parts(graph: OpGraph) -> StageParts:
    """The parts of the whole model as one stage."""
    every = tuple(range(len(graph.ops)))
    constants = tuple(sorted({name for op in graph.ops for name in op.reads if name in graph.constants}))
    return StageParts(every, every, graph.inputs, graph.outputs, constants)


def peak_memory_bytes(graph: OpGraph, shapes: Shapes, parts: StageParts, *, packed: bool = True) -> int:
    """Estimated memory of a stage in bytes: its weights, and the largest sum of live activations.

    Args:
        graph: the model.
        shapes: sizes of its tensors.
        parts: the parts of the stage.
        packed: True for ONNX Runtime on a CPU, where bytes that initializers share are in memory once, and weights
            count twice if kernels keep a packed copy of them. False if every initializer has memory of its own.
    """
    sizes = [graph.constants[name] for name in parts.constants if not packed or name in graph.packed]
    shared = 0 if packed else _initializer_bytes(graph, parts)
    activations = activation_bytes(graph, shapes, parts.ops, frozenset(parts.outputs))
    return weight_bytes(graph, parts) - shared + sum(sizes) + activations


def weight_bytes(graph: OpGraph, parts: StageParts) -> int:
    """Bytes of the constants of a stage: initializers, and tensors in the attributes of its ops.

    Bytes that several initializers share count once.
    """
    attributes = node_tensors(graph.ops[index].node for index in parts.ops)
    return _initializer_bytes(graph, parts) + sum(tensor_bytes(tensor) for tensor in attributes)


def _initializer_bytes(graph: OpGraph, parts: StageParts) -> int:
    held = set(parts.constants)
    return sum(stored.size_bytes for stored in graph.stored if held & stored.names)
