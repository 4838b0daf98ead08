"""Reading a model for a cut: its ops, their costs, its atoms, and inputs that it runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from onnxsplit.model.graph_io import check_outputs_are_tensors, constant_text, defaults, select
from onnxsplit.model.in_memory import ModelLike, open_any
from onnxsplit.model.protobuf import node_tensors, tensor_bytes
from onnxsplit.model.shapes import Shapes, infer_shapes, input_specs
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import load_npz
from onnxsplit.partitioner import Problem, Transfer, Weight
from onnxsplit.plan import TensorSpec
from onnxsplit.planning.target import Target, alike
from onnxsplit.progress import Say, silent
from onnxsplit.session import threads_per_node
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
    """

    graph: OpGraph
    costs: OpCosts
    atoms: Atoms
    inputs: Mapping[str, Array]
    dims: Mapping[str, int]
    note: str | None = None
    custom_ops: tuple[Library, ...] = ()

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

    def tied(self, together: Sequence[Sequence[int]]) -> Subject:
        """The same model with further groups of ops that must stay together."""
        return replace(self, atoms=build_atoms(self.graph, self.shapes, together)) if together else self

    def as_ops(self) -> Subject:
        """The same model as if every op could be cut from every other."""
        return replace(self, atoms=build_atoms(self.graph, self.shapes, single=True))

    def problem(self, op_ns: Sequence[int], target: Target | None = None) -> Problem:
        """The numeric problem that a partitioning algorithm solves.

        Args:
            op_ns: time of each op on a device of speed 1, in nanoseconds.
            target: the devices and constraints; one device of this host when None.
        """
        target = target or alike(1)
        atom_of = {op: atom for atom, ops in enumerate(self.atoms.ops) for op in ops}
        times = [sum(op_ns[op] for op in ops) for ops in self.atoms.ops]
        for op in self.atoms.copied:  # the copy is charged to the first reader
            reader = next((atom_of[r] for r in self._readers(op) if r in atom_of), None)
            if reader is not None:
                times[reader] += op_ns[op]
        return Problem(
            kinds=target.kinds(self.graph.ops, self.atoms.ops, times),
            devices=target.kind_of,
            transfers=tuple(
                Transfer(edge.writer, edge.readers, self.shapes.bytes(edge.tensor), edge.to_caller)
                for edge in self.atoms.edges
            ),
            weights=self._weights(atom_of, target.packs),
            inner_bytes=self._inner_bytes(),
            links=target.links,
            caller_links=target.caller_links,
            apart=tuple((atom_of[one], atom_of[other]) for one, other in target.apart),
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
        """By atom, the bytes of the tensors that its ops write and that no other atom reads."""
        leaving = {edge.tensor for edge in self.atoms.edges}
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


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is read before it is cut.

    Attributes:
        costs: ``measured`` or ``analytic``; None measures, and estimates with a note when the model does not run here.
        dims: sizes of free dimensions that costs are taken at; the plan runs at any sizes.
        inputs: example inputs by name, or an ``.npz`` with them; None makes them up.
        outputs: outputs to keep; the others are left out, with the ops and inputs that only they need. None keeps all.
        drop_outputs: outputs to leave out.
        keep_inputs: inputs that are also initializers and stay inputs, with the initializer as default.
        custom_ops: libraries of custom ops that the model needs, as :func:`~onnxsplit.custom_ops.find_libraries` takes
            them. They are code that runs with the rights of this process's user; measuring loads them.
    """

    costs: str | None = None
    dims: Mapping[str, int] | None = None
    inputs: str | Path | Mapping[str, Array] | None = None
    outputs: Sequence[str] | None = None
    drop_outputs: Sequence[str] = ()
    keep_inputs: Sequence[str] = ()
    custom_ops: object = ()


@dataclass(frozen=True)
class _Reading:
    """A model that was read: its graph and inputs' types, the sizes and inputs that are given, and libraries."""

    graph: OpGraph
    specs: Mapping[str, TensorSpec]
    defaults: Mapping[str, Array]
    dims: Mapping[str, int]
    inputs: Mapping[str, Array] | None
    custom_ops: tuple[Library, ...]


def examine(
    model: ModelLike | SourceModel,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    say: Say = silent,
    **options: Any,
) -> Subject:
    """Read a model, find inputs that it runs on, find the costs of its ops, and group the ops into atoms.

    Args:
        model: the path of the model's file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; or an opened
            model, which is changed where outputs or inputs are named.
        threads: threads of the session that is measured; all cores of this host when None.
        provider: execution provider that measures.
        say: called with each step.
        options: the attributes of :class:`ModelOptions`.

    Raises:
        ModelError: the file is not a usable model.
        InputError: inputs or dimensions do not fit the model.
        PartitionError: an output cannot be returned to a caller, or no output has a name that was given.
        MissingDependency, ProviderError: measuring was requested and is not possible.
        CustomOpsError: a library of custom ops cannot be read, or does not load.
    """
    wanted = ModelOptions(**options)
    reading = _read(model, wanted, say)
    note = None
    if wanted.costs != "analytic" and reading.graph.ops:
        try:
            return _measured(reading, threads or threads_per_node(1), provider, say)
        except ModelRefused as error:
            raise ModelRefused(
                f"{error}. To cut it for another ONNX Runtime than this one: --costs analytic"
            ) from error
        except (ModelError, InputError, MissingDependency) as error:
            if wanted.costs == "measured" or reading.inputs is not None:
                raise
            note = str(error)
    return _estimated(reading, note)


def _read(model: ModelLike | SourceModel, options: ModelOptions, say: Say) -> _Reading:
    """Open the model, select its outputs, and check the inputs and sizes that are given."""
    libraries = find_libraries(options.custom_ops)
    check_names(libraries)
    say("reading the model")
    source = model if isinstance(model, SourceModel) else open_any(model)
    selected = select(
        source, outputs=options.outputs, drop_outputs=options.drop_outputs, keep_inputs=options.keep_inputs
    )
    graph = build_graph(selected)
    check_outputs_are_tensors(graph)
    specs = input_specs(graph)
    kept = defaults(graph.source)
    sized = sized_dimensions(specs)
    dims = {dim: size for dim, size in sizes_in(specs, kept).items() if dim in sized} | dict(options.dims or {})
    given = load_npz(Path(options.inputs)) if isinstance(options.inputs, str | Path) else options.inputs
    if given is not None:
        given = _given(graph, given, kept)
        dims |= accept(graph, specs, given)
    return _Reading(graph, specs, kept, dims, given, libraries)


def _measured(reading: _Reading, threads: int, provider: str, say: Say) -> Subject:
    """Measure the costs, on the inputs that are given or on made-up ones."""
    graph, libraries = reading.graph, reading.custom_ops
    _check_memory(graph)
    inputs, dims = reading.inputs, reading.dims
    if inputs is None:
        example = find_example(
            graph, reading.specs, dims, threads=threads, provider=provider, say=say, custom_ops=libraries
        )
        inputs, dims = example.inputs, example.dims
    shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()})
    costs = measured_costs(graph, shapes, inputs, threads=threads, provider=provider, say=say, custom_ops=libraries)
    return _subject(graph, costs, inputs, dims, None, libraries)


def _estimated(reading: _Reading, note: str | None) -> Subject:
    """Estimate the costs by arithmetic; made-up inputs are not tried."""
    graph, specs, inputs, dims = reading.graph, reading.specs, reading.inputs, reading.dims
    if inputs is None:
        dims = next(dimension_choices(specs, dims))
        *_, inputs = guesses(graph, specs, bind(specs, dims), reading.defaults)  # the last is the most careful
        dims = with_formulas(specs, dims)
    shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()})
    return _subject(graph, analytic_costs(graph, shapes), inputs, dims, note, reading.custom_ops)


def _given(graph: OpGraph, given: Mapping[str, Array], kept: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs that the user gave, without those that are no longer needed, and with the defaults of the others.

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
    dropped = graph.source.io_changes.dropped_inputs if graph.source.io_changes is not None else ()
    return {**kept, **{name: array for name, array in given.items() if name not in dropped}}


def _check_memory(graph: OpGraph) -> None:
    """Refuse to run a model whose weights alone need more memory than this host has free."""
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
                f"output {name!r} is not a tensor that can be returned to a caller (a sequence, a map, an optional, or "
                "a type that ONNX Runtime cannot pass on); remove it from the model's outputs"
            )
    return Subject(graph, costs, build_atoms(graph, costs.shapes), inputs, dims, note, custom_ops)
