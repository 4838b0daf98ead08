"""The model that is to be cut: its graph, its costs, its atoms, and inputs that it runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnxsplit.cost import OpCosts
from onnxsplit.custom_ops import Library
from onnxsplit.model.atoms import AtomEdge, Atoms, build_atoms
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import node_tensors, tensor_bytes
from onnxsplit.model.shapes import Shapes
from onnxsplit.partitioner import Problem, Transfer, Weight
from onnxsplit.planning.border_forms import BorderForms
from onnxsplit.planning.decoding import Decoding
from onnxsplit.planning.target import Target, alike
from onnxsplit.tensors import Array


@dataclass(frozen=True)
class Subject:
    """The model that is to be cut: its graph, its costs, its atoms, and inputs that it runs on.

    Attributes:
        graph: the ops of the model.
        costs: compute times of the ops, and the shapes that the times hold for.
        atoms: the groups of ops that may be separated from each other.
        inputs: example inputs by name.
        dims: sizes of the free dimensions in the example inputs.
        note: why costs are analytic although they were not asked for; else None.
        custom_ops: libraries of custom ops that the user named for the model.
        decoding: how it is cut as a decoder; None for another model.
        no_decoder: why a model that looks like a decoder is not cut as one; empty for another model.
        more_inputs: further example inputs, on which answers are compared.
        borders: the forms in which tensors may cross between stages; None if all cross as they are.
    """

    graph: OpGraph
    costs: OpCosts
    atoms: Atoms
    inputs: Mapping[str, Array]
    dims: Mapping[str, int]
    note: str | None = None
    custom_ops: tuple[Library, ...] = ()
    decoding: Decoding | None = None
    no_decoder: str = ""
    more_inputs: tuple[Mapping[str, Array], ...] = ()
    borders: BorderForms | None = None

    def libraries(self, ops: Iterable[int]) -> tuple[Library, ...]:
        """The libraries that a stage of these ops needs: all of them if one of the ops is a custom op, else none.

        If no op of the model looks like a custom op, the libraries may hold any op, so every stage needs them.
        """
        custom = self.graph.custom_ops
        return self.custom_ops if not custom or not custom.isdisjoint(ops) else ()

    @property
    def shapes(self) -> Shapes:
        """Types and shapes of the tensors."""
        return self.costs.shapes

    @property
    def small_inputs(self) -> Mapping[str, Array]:
        """Example inputs that are small enough to keep: of a decoder, those of a step with a short past."""
        made_up = self.decoding is not None and self.decoding.step.rows > 0
        return self.decoding.example() if self.decoding is not None and made_up else self.inputs

    def tied(self, together: Sequence[Sequence[int]]) -> Subject:
        """The same model with further groups of ops that must stay together."""
        if not together:
            return self
        decoding = self.decoding
        kept, local = (decoding.together, decoding.local) if decoding is not None else ((), frozenset[int]())
        return replace(self, atoms=build_atoms(self.graph, self.shapes, [*kept, *together], local=local))

    def as_ops(self) -> Subject:
        """The same model as if every op could be cut from every other."""
        local = self.decoding.local if self.decoding is not None else frozenset[int]()
        return replace(self, atoms=build_atoms(self.graph, self.shapes, single=True, local=local))

    @property
    def crossing(self) -> tuple[AtomEdge, ...]:
        """The tensors that may cross: all between atoms and the caller, but for a decoder's states and controls."""
        stays = self.decoding.stays if self.decoding is not None else frozenset[str]()
        return tuple(edge for edge in self.atoms.edges if edge.tensor not in stays)

    def problem(self, op_ns: Sequence[int], target: Target | None = None) -> Problem:
        """The numeric problem that a partitioning algorithm solves.

        Args:
            op_ns: time of each op on a device of speed 1, in nanoseconds.
            target: the devices and constraints; one device of this host when None.
        """
        target = target or alike(1)
        atom_of = {op: atom for atom, ops in enumerate(self.atoms.ops) for op in ops}
        times = [sum(op_ns[op] for op in ops) for ops in self.atoms.ops]
        readers = self._readers_of_copies()
        for op in self.atoms.copied:  # the copy is charged to the first reader
            if readers[op]:
                times[atom_of[min(readers[op])]] += op_ns[op]
        return Problem(
            kinds=target.kinds(self.graph.ops, self.atoms.ops, times),
            devices=target.kind_of,
            transfers=tuple(
                Transfer(
                    edge.writer,
                    edge.readers,
                    self.shapes.bytes(edge.tensor),
                    edge.to_caller,
                    self.borders.ways(edge.tensor) if self.borders is not None else (),
                )
                for edge in self.crossing
            ),
            weights=(*self._weights(atom_of, target.packs), *self._caches()),
            inner_bytes=self._inner_bytes(),
            link=target.link,
            links=target.links,
            caller_links=target.caller_links,
            apart=tuple((atom_of[one], atom_of[other]) for one, other in target.apart),
            overhead=target.overhead,
            objective=target.objective,
        )

    def _weights(self, atom_of: Mapping[int, int], packs: bool) -> tuple[Weight, ...]:
        """The constants (initializers and tensors in attributes) with the atoms that read them, directly or by copies.

        On a CPU, bytes that several initializers share are in memory once, and some kernels keep a packed copy of each
        initializer (``packs``). Other devices hold every initializer separately.
        """
        graph = self.graph
        held: dict[str, set[int]] = {}
        sizes: Counter[tuple[int, ...]] = Counter()
        readers_of = self._readers_of_copies()
        for op in graph.ops:
            atoms = {atom_of[op.index]} if op.index in atom_of else {atom_of[reader] for reader in readers_of[op.index]}
            for name in op.reads:
                if name in graph.constants:
                    held.setdefault(name, set()).update(atoms)
            sizes[tuple(sorted(atoms))] += sum(tensor_bytes(tensor) for tensor in node_tensors([op.node]))
        if packs:
            for stored in graph.stored:
                sizes[tuple(sorted({atom for name in stored.names for atom in held.get(name, ())}))] += (
                    stored.size_bytes
                )
        for name, readers in held.items():
            sizes[tuple(sorted(readers))] += graph.constants[name] * (name in graph.packed if packs else 1)
        return tuple(Weight(size, readers) for readers, size in sizes.items() if size and readers)

    def _caches(self) -> Iterator[Weight]:
        """The memory for the states of sequences, by atom."""
        if self.decoding is not None:
            for atom, ops in enumerate(self.atoms.ops):
                size = self.decoding.cache_bytes(self.graph, frozenset(ops))
                if size:
                    yield Weight(size, (atom,))

    def _inner_bytes(self) -> tuple[int, ...]:
        """By atom, the bytes of the tensors that its ops write and that no other atom reads."""
        stays = self.decoding.stays if self.decoding is not None else frozenset[str]()
        shapes = self.decoding.without_states(self.shapes) if self.decoding is not None else self.shapes
        leaving = {edge.tensor for edge in self.atoms.edges} - stays
        return tuple(
            sum(shapes.bytes(name) for op in ops for name in self.graph.ops[op].outputs if name not in leaving)
            for ops in self.atoms.ops
        )

    def _readers_of_copies(self) -> dict[int, set[int]]:
        """For each copied op, the ops that are not copied and read it, directly or through copied ops."""
        readers: dict[int, set[int]] = {}
        for op in sorted(self.atoms.copied, reverse=True):
            readers[op] = set()
            for name in self.graph.ops[op].outputs:
                for reader in self.graph.readers.get(name, ()):
                    readers[op] |= readers[reader] if reader in self.atoms.copied else {reader}
        return readers
