"""Reading a model as far as cutting needs it: its ops, what they cost, what may be parted, inputs it runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxsplit.cost import OpCosts
from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.cost.example import find_example
from onnxsplit.cost.measured import measured_costs
from onnxsplit.custom_ops import Library, check_names, find_libraries
from onnxsplit.errors import InputError, MissingDependency, ModelError, ModelRefused, PartitionError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.model.atoms import Atoms, build_atoms
from onnxsplit.model.dimensions import bind, sized_dimensions, with_formulas
from onnxsplit.model.example_inputs import accept, dimension_choices, guesses, sizes_in
from onnxsplit.model.graph import OpGraph, build_graph
from onnxsplit.model.graph_io import check_handed_on, constant_text, defaults, select
from onnxsplit.model.in_memory import ModelLike, open_any
from onnxsplit.model.protobuf import node_tensors, tensor_bytes
from onnxsplit.model.shapes import Shapes, infer_shapes, input_specs
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import load_npz
from onnxsplit.partitioner import Problem, Transfer, Weight
from onnxsplit.planning.target import Target, alike
from onnxsplit.progress import Say, silent
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array


@dataclass(frozen=True)
class Subject:
    """A model, ready to be cut: its graph, its costs, its atoms, and inputs it runs on.

    Attributes:
        graph: the model's ops.
        costs: compute times, with the shapes they were found with.
        atoms: what may be parted.
        inputs: example inputs.
        dims: sizes of the free dimensions in them.
        note: why costs are analytic, when they are.
        custom_ops: libraries of custom ops that the user named for it.
    """

    graph: OpGraph
    costs: OpCosts
    atoms: Atoms
    inputs: Mapping[str, Array]
    dims: Mapping[str, int]
    note: str | None = None
    custom_ops: tuple[Library, ...] = ()

    def libraries(self, ops: Iterable[int]) -> tuple[Library, ...]:
        """The libraries that a stage of these ops needs: all of them where one is a custom op, else none.

        Where no op of the model looks like a custom one, they may have any of its ops, so every stage needs them.
        """
        custom = self.graph.custom_ops
        return self.custom_ops if not custom or not custom.isdisjoint(ops) else ()

    @property
    def shapes(self) -> Shapes:
        """Types and shapes of the tensors."""
        return self.costs.shapes

    def tied(self, together: Sequence[Sequence[int]]) -> Subject:
        """The same model with groups of ops that must stay together, too."""
        return replace(self, atoms=build_atoms(self.graph, self.shapes, together)) if together else self

    def as_ops(self) -> Subject:
        """The same model as if every op could be cut from every other."""
        return replace(self, atoms=build_atoms(self.graph, self.shapes, single=True))

    def problem(self, op_ns: Sequence[int], target: Target | None = None) -> Problem:
        """The numbers an algorithm sees, with these times of the ops on a device of speed 1."""
        target = target or alike(1)
        atom_of = {op: atom for atom, ops in enumerate(self.atoms.ops) for op in ops}
        times = [sum(op_ns[op] for op in ops) for ops in self.atoms.ops]
        for op in self.atoms.copied:  # the first reader is charged with its copy
            reader = next((atom_of[r] for r in self._readers(op) if r in atom_of), None)
            if reader is not None:
                times[reader] += op_ns[op]
        return Problem(
            kinds=target.kinds(self.graph.ops, self.atoms.ops, times),
            devices=target.kind_of,
            transfers=tuple(
                Transfer(flow.writer, flow.readers, self.shapes.bytes(flow.tensor), flow.to_caller)
                for flow in self.atoms.edges
            ),
            weights=self._weights(atom_of, target.packs),
            inner_bytes=self._inner_bytes(),
            links=target.links,
            caller_links=target.caller_links,
            apart=tuple((atom_of[one], atom_of[other]) for one, other in target.apart),
            objective=target.objective,
        )

    def _weights(self, atom_of: Mapping[int, int], packs: bool) -> tuple[Weight, ...]:
        """Initializers, and tensors in the attributes of ops, with the atoms that read them, directly or by copies.

        On a CPU, bytes that initializers share are mapped once, and some kernels keep a packed copy for each
        initializer. Other devices hold every initializer by itself.
        """
        graph = self.graph
        held: dict[str, set[int]] = {}
        sizes: Counter[tuple[int, ...]] = Counter()
        for op in graph.ops:
            atoms = (
                {atom_of[op.index]}
                if op.index in atom_of
                else {atom_of[r] for r in self._readers(op.index) if r in atom_of}
            )
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

    def _inner_bytes(self) -> tuple[int, ...]:
        """By atom, the tensors that its ops write and that stay inside."""
        leaving = {flow.tensor for flow in self.atoms.edges}
        return tuple(
            sum(self.shapes.bytes(name) for op in ops for name in self.graph.ops[op].outputs if name not in leaving)
            for ops in self.atoms.ops
        )

    def _readers(self, op: int) -> Iterator[int]:
        for name in self.graph.ops[op].outputs:
            for reader in self.graph.readers.get(name, ()):
                yield reader
                if reader in self.atoms.copied:
                    yield from self._readers(reader)


def examine(
    model: ModelLike | SourceModel,
    *,
    costs: str | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: str | Path | Mapping[str, Array] | None = None,
    outputs: Sequence[str] | None = None,
    drop_outputs: Sequence[str] = (),
    keep_inputs: Sequence[str] = (),
    threads: int | None = None,
    provider: str = "cpu",
    custom_ops: object = (),
    say: Say = silent,
) -> Subject:
    """Read a model, find inputs it runs on, cost its ops and contract them.

    Args:
        model: the path of the model's file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; or one that was
            opened, which is changed where outputs or inputs are named.
        costs: ``measured`` or ``analytic``; None measures, and falls back with a note when the model does not run here.
        dims: sizes of free dimensions.
        inputs: example inputs, or an ``.npz`` with them; made up when None.
        outputs: outputs to cut for, others are left out; all when None.
        drop_outputs: outputs to leave out.
        keep_inputs: inputs that are initializers too and stay inputs, with the initializer as default.
        threads: threads of a session that is measured; all cores of this host when None.
        provider: execution provider that measures.
        custom_ops: libraries of custom ops, as :func:`~onnxsplit.custom_ops.find_libraries` takes them; measuring
            loads them.
        say: told what is being done.

    Raises:
        ModelError: the file is no usable model.
        InputError: inputs or dimensions do not fit it.
        PartitionError: it has outputs that cannot be handed to a caller, or none of those named.
        MissingDependency, ProviderError: measuring was asked for and is not possible.
        CustomOpsError: a library of custom ops cannot be read, or does not load.
    """
    libraries = find_libraries(custom_ops)
    check_names(libraries)
    say("reading the model")
    source = model if isinstance(model, SourceModel) else open_any(model)
    graph = build_graph(select(source, outputs=outputs, drop_outputs=drop_outputs, keep_inputs=keep_inputs))
    check_handed_on(graph)
    specs = input_specs(graph)
    kept = defaults(graph.source)
    sized = sized_dimensions(specs)
    fixed = {dim: size for dim, size in sizes_in(specs, kept).items() if dim in sized} | dict(dims or {})
    given: Mapping[str, Array] | None = load_npz(Path(inputs)) if isinstance(inputs, str | Path) else inputs
    if given is not None:
        given = _given(graph, given, kept)
        fixed |= accept(graph, specs, given)
    threads = threads or threads_per_node(1)
    note = None
    if costs != "analytic" and graph.ops:
        try:
            _check_memory(graph)
            example: Mapping[str, Array] | None = given
            sizes = fixed
            if example is None:
                found = find_example(
                    graph, specs, fixed, threads=threads, provider=provider, say=say, custom_ops=libraries
                )
                example, sizes = found.inputs, dict(found.dims)
            shapes = infer_shapes(graph, {name: array.shape for name, array in example.items()})
            op_costs = measured_costs(
                graph, shapes, example, threads=threads, provider=provider, say=say, custom_ops=libraries
            )
            return _subject(graph, op_costs, example, sizes, None, libraries)
        except ModelRefused as error:
            raise ModelRefused(
                f"{error}. To cut it for another ONNX Runtime than this one: --costs analytic"
            ) from error
        except (ModelError, InputError, MissingDependency) as error:
            if costs == "measured" or given is not None:
                raise
            note = str(error)
    if given is None:
        fixed = next(dimension_choices(specs, fixed))
        *_, given = guesses(graph, specs, bind(specs, fixed), kept)  # the last is the most careful
        fixed = with_formulas(specs, fixed)
    shapes = infer_shapes(graph, {name: array.shape for name, array in given.items()})
    return _subject(graph, analytic_costs(graph, shapes), given, fixed, note, libraries)


def _given(graph: OpGraph, given: Mapping[str, Array], kept: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs a user gave, without those that are no longer needed, and with the defaults of those left out.

    Raises:
        InputError: a value is given for an input that becomes a constant.
    """
    constant = [
        f"input {name!r} becomes a constant ({constant_text(graph.source, name)}) when the model is cut; "
        f"add --keep-input {name} to give values"
        for name in graph.overridable
        if name in given
    ]
    if constant:
        raise InputError(". ".join(constant))
    gone = graph.source.io_changes.dropped_inputs if graph.source.io_changes is not None else ()
    return {**kept, **{name: array for name, array in given.items() if name not in gone}}


def _check_memory(graph: OpGraph) -> None:
    """Refuse to run a model whose weights alone take more memory than this host has free."""
    needed, free = sum(stored.size_bytes for stored in graph.stored), free_memory_bytes()
    if needed > free:
        raise ModelError(
            f"{graph.source.path} does not run here: its weights take {needed} bytes, and {free} bytes of memory are "
            "free. Free some, or cut it without running it: --costs analytic"
        )


def _subject(
    graph: OpGraph,
    costs: OpCosts,
    inputs: Mapping[str, Array],
    dims: Mapping[str, int],
    note: str | None,
    custom_ops: tuple[Library, ...],
) -> Subject:
    for name in graph.outputs:
        if name in graph.producer and not costs.shapes.travels(name):
            raise PartitionError(
                f"output {name!r} is not a tensor that can be handed to a caller (a sequence, a map, an optional, or a "
                "type that ONNX Runtime cannot pass on); remove it from the model's outputs"
            )
    return Subject(graph, costs, build_atoms(graph, costs.shapes), inputs, dims, note, custom_ops)
