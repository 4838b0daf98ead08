"""Atoms (groups of ops that must stay together) and copied ops (each stage that reads one holds a copy).

- A value that cannot travel (a sequence, a map, an optional, a tensor of an unknown type) keeps its writer and all its
  readers in one atom.
- Constants are copied into every stage that reads them. So is DequantizeLinear of a tensor that can travel: the small
  integers cross the cut, and every reader dequantises them for itself. QuantizeLinear stays with the op before it.
- Atoms that form a cycle after this contraction are merged.

Every other op is an atom of its own: any tensor that can travel is a candidate for a cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import networkx as nx
from networkx.utils import UnionFind

from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.shapes import Shapes
from onnxsplit.plan import CALLER


@dataclass(frozen=True)
class AtomEdge:
    """A tensor that other atoms or the caller read.

    Attributes:
        tensor: its name.
        writer: the atom that writes it, or :data:`CALLER` for an input of the model.
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
        copied: ops that belong to no atom; each stage that reads their outputs holds a copy of them.
        edges: tensors between atoms, and between atoms and the caller.
        digraph: atoms as nodes, with an arc from the writer of a tensor to each of its readers.
    """

    ops: tuple[tuple[int, ...], ...]
    copied: frozenset[int]
    edges: tuple[AtomEdge, ...]
    digraph: nx.DiGraph


def build_atoms(
    graph: OpGraph,
    shapes: Shapes,
    together: Sequence[Sequence[int]] = (),
    *,
    single: bool = False,
    local: Collection[int] = (),
) -> Atoms:
    """Contract the graph into atoms, in time O(n log n) in the number of ops and tensors.

    Args:
        graph: the ops.
        shapes: which tensors can travel.
        together: further groups of ops that must share an atom.
        single: contract nothing; for lower bounds only, since some of these atoms cannot be parted.
        local: further ops that are copied into every stage that reads them.
    """
    copied = _copied_ops(graph, shapes).union(local)
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
    """Tensors that each op needs from other ops or the caller; a copied op is replaced by what it needs itself."""
    needs: dict[int, tuple[str, ...]] = {}
    for op in graph.ops:
        needed: dict[str, None] = {}
        for name in op.reads:
            if name in graph.constants:
                continue
            writer = graph.producer.get(name)
            needed.update(dict.fromkeys(needs[writer] if writer in copied else (name,)))
        needs[op.index] = tuple(needed)
    return needs


def _copied_ops(graph: OpGraph, shapes: Shapes) -> frozenset[int]:
    """Constant ops and dequantising ops, except those that write an output of the model."""
    outputs = set(graph.outputs)
    return frozenset(
        op.index
        for op in graph.ops
        if outputs.isdisjoint(op.outputs) and (op.index in graph.constant_ops or _is_dequantize(op, graph, shapes))
    )


def _is_dequantize(op: Op, graph: OpGraph, shapes: Shapes) -> bool:
    """Whether an op dequantises a tensor that can travel, with constant parameters."""
    if op.op_type != "DequantizeLinear":
        return False
    quantized, *parameters = op.inputs
    fixed = all(n in graph.constants or graph.producer.get(n) in graph.constant_ops for n in parameters)
    return fixed and shapes.travels(quantized)


def _groups(graph: OpGraph, shapes: Shapes, copied: frozenset[int], needs: dict[int, tuple[str, ...]]) -> UnionFind:
    """Ops joined where a tensor cannot travel, or where QuantizeLinear reads what it quantises."""
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
