"""Ops that must stay together, contracted into atoms; and ops that every reader copies.

- A value that cannot travel (a sequence, a map, an optional, a tensor of an unknown type) keeps its writer and all its
  readers in one atom.
- Constants are copied into every stage that reads them. So is DequantizeLinear of a travelling tensor: the small
  integers cross, and every reader expands them for itself. QuantizeLinear stays with the op before it.
- What contraction leaves on a cycle is merged.

Everything else is an atom of a single op: any tensor that can travel is a candidate for a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from networkx.utils import UnionFind

from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.shapes import Shapes
from onnxsplit.plan import CALLER


@dataclass(frozen=True)
class AtomEdge:
    """A tensor that leaves the atom that writes it.

    Attributes:
        tensor: its name.
        writer: an atom, or :data:`CALLER`.
        readers: the other atoms that read it, ascending.
        to_caller: True for an output of the model.
    """

    tensor: str
    writer: int
    readers: tuple[int, ...]
    to_caller: bool


@dataclass(frozen=True)
class Atoms:
    """The contracted graph.

    Attributes:
        ops: the ops of every atom; atoms are in a topological order.
        copied: ops that belong to no atom: each stage that reads their outputs holds a copy.
        edges: tensors between atoms, and between atoms and the caller.
        digraph: atoms as nodes, with an arc from the writer of a tensor to each of its readers.
    """

    ops: tuple[tuple[int, ...], ...]
    copied: frozenset[int]
    edges: tuple[AtomEdge, ...]
    digraph: nx.DiGraph


def build_atoms(
    graph: OpGraph, shapes: Shapes, together: Sequence[Sequence[int]] = (), *, single: bool = False
) -> Atoms:
    """Contract the graph. Linear in its size but for the sorting.

    Args:
        graph: the ops.
        shapes: which tensors can travel.
        together: groups of ops that must share an atom, too.
        single: contract nothing; for bounds only, since not all of it can be cut.
    """
    copied = _copied_ops(graph, shapes)
    needs = needed_tensors(graph, copied)
    groups = UnionFind(needs.keys() - copied) if single else _groups(graph, shapes, copied, needs)
    for group in together:
        members = [op for op in group if op not in copied]
        if members:
            groups.union(*members)
    order, atom_of = _ordered(graph, copied, needs, groups)
    return Atoms(
        ops=order,
        copied=copied,
        edges=_edges(graph, copied, needs, atom_of),
        digraph=_digraph(needs, graph, atom_of),
    )


def needed_tensors(graph: OpGraph, copied: frozenset[int]) -> dict[int, tuple[str, ...]]:
    """What each op needs from elsewhere once copied ops are expanded: inputs and tensors of ops that are not copied."""
    needs: dict[int, tuple[str, ...]] = {}
    for op in graph.ops:
        found: dict[str, None] = {}
        for name in op.reads:
            if name in graph.constants:
                continue
            writer = graph.producer.get(name)
            found.update(dict.fromkeys(needs[writer] if writer in copied else (name,)))
        needs[op.index] = tuple(found)
    return needs


def _copied_ops(graph: OpGraph, shapes: Shapes) -> frozenset[int]:
    outputs = set(graph.outputs)
    return frozenset(
        op.index
        for op in graph.ops
        if outputs.isdisjoint(op.outputs) and (op.index in graph.constant_ops or _is_dequantize(op, graph, shapes))
    )


def _is_dequantize(op: Op, graph: OpGraph, shapes: Shapes) -> bool:
    if op.op_type != "DequantizeLinear":
        return False
    quantized, *parameters = op.inputs
    steady = all(n in graph.constants or graph.producer.get(n) in graph.constant_ops for n in parameters)
    return steady and shapes.travels(quantized)


def _groups(graph: OpGraph, shapes: Shapes, copied: frozenset[int], needs: dict[int, tuple[str, ...]]) -> UnionFind:
    groups = UnionFind(op.index for op in graph.ops if op.index not in copied)
    for op in graph.ops:
        if op.index in copied:
            continue
        for name in needs[op.index]:
            writer = graph.producer.get(name)
            if writer is not None and (
                not shapes.travels(name) or (op.op_type == "QuantizeLinear" and name == op.inputs[0])
            ):
                groups.union(writer, op.index)
    return groups


def _ordered(
    graph: OpGraph, copied: frozenset[int], needs: dict[int, tuple[str, ...]], groups: UnionFind
) -> tuple[tuple[tuple[int, ...], ...], dict[int, int]]:
    """Atoms in a topological order, and the atom of each op."""
    contracted = nx.DiGraph()
    for op in graph.ops:
        if op.index in copied:
            continue
        contracted.add_node(groups[op.index])
        for name in needs[op.index]:
            if name in graph.producer:
                contracted.add_edge(groups[graph.producer[name]], groups[op.index])
    condensed = nx.condensation(contracted)
    component_of = condensed.graph["mapping"]
    members: dict[int, list[int]] = {}
    for op in graph.ops:
        if op.index not in copied:
            members.setdefault(component_of[groups[op.index]], []).append(op.index)
    order = list(nx.lexicographical_topological_sort(condensed, key=lambda component: members[component][0]))
    atom_of = {op: position for position, component in enumerate(order) for op in members[component]}
    return tuple(tuple(members[component]) for component in order), atom_of


def _edges(
    graph: OpGraph, copied: frozenset[int], needs: dict[int, tuple[str, ...]], atom_of: dict[int, int]
) -> tuple[AtomEdge, ...]:
    readers: dict[str, set[int]] = {}
    for op in graph.ops:
        if op.index not in copied:
            for name in needs[op.index]:
                readers.setdefault(name, set()).add(atom_of[op.index])
    outputs = set(graph.outputs)
    for name in outputs:
        if name in graph.producer:
            readers.setdefault(name, set())
    edges = []
    for name, atoms in readers.items():
        writer = atom_of[graph.producer[name]] if name in graph.producer else CALLER
        others = tuple(sorted(atoms - {writer}))
        if others or name in outputs:
            edges.append(
                AtomEdge(tensor=name, writer=writer, readers=others, to_caller=name in outputs and writer != CALLER)
            )
    return tuple(sorted(edges, key=lambda edge: (edge.writer, edge.tensor)))


def _digraph(needs: dict[int, tuple[str, ...]], graph: OpGraph, atom_of: dict[int, int]) -> nx.DiGraph:
    digraph = nx.DiGraph()
    digraph.add_nodes_from(range(max(atom_of.values(), default=-1) + 1))
    for op, atom in atom_of.items():
        for name in needs[op]:
            if name in graph.producer and atom_of[graph.producer[name]] != atom:
                digraph.add_edge(atom_of[graph.producer[name]], atom)
    return digraph
