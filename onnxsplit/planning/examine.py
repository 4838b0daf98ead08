"""Reading a model for a cut: its ops, their costs, its atoms, and inputs that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from onnxsplit.cost import OpCosts
from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.cost.example import find_example
from onnxsplit.cost.measured import measured_costs
from onnxsplit.custom_ops import Library, check_names, find_libraries
from onnxsplit.decoder.claim import NoDecoder
from onnxsplit.decoder.inputs import example_step
from onnxsplit.decoder.prepare import AUTO, prepare
from onnxsplit.decoder.proven import ProvenDecoder
from onnxsplit.effort import EFFORTS, TimeBudget
from onnxsplit.errors import InputError, MissingDependency, ModelError, ModelRefused, PartitionError, shown
from onnxsplit.memory import free_memory_bytes
from onnxsplit.model.atoms import build_atoms
from onnxsplit.model.dimensions import bind, sized_dimensions, with_formulas
from onnxsplit.model.example_inputs import accept, dimension_choices, guesses, sizes_in
from onnxsplit.model.graph import OpGraph, build_graph
from onnxsplit.model.graph_io import check_outputs_are_tensors, constant_text, defaults, select
from onnxsplit.model.in_memory import ModelLike, open_any
from onnxsplit.model.shapes import infer_shapes, input_specs
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import load_npz
from onnxsplit.numbers import MOST_BYTES, MOST_STEP_ROWS, as_int, whole_problem
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_decoder import MOST_LENGTH
from onnxsplit.planning.decoding import StepSize, decoding, measured_prefill, step_size
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say, silent
from onnxsplit.session import threads_per_node
from onnxsplit.tensors import Array

Example = str | Path | Mapping[str, Array]
"""Example inputs by name, or an ``.npz`` with them."""


class ModelArguments(TypedDict, total=False):
    """The attributes of :class:`ModelOptions`, for editors and type checkers."""

    costs: str | None
    dims: Mapping[str, int] | None
    inputs: Example | Sequence[Example] | None
    outputs: Sequence[str] | None
    drop_outputs: Sequence[str]
    keep_inputs: Sequence[str]
    custom_ops: object
    decoder: str | Path
    decode_rows: int
    context: int
    cache_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is read before it is cut.

    Attributes:
        costs: ``measured`` or ``analytic``; None measures, and estimates with a note when the model does not run here.
        dims: sizes of free dimensions that costs are taken at; the plan runs at any sizes.
        inputs: example inputs by name, or an ``.npz`` with them; None makes them up. Of several in a sequence, costs
            are measured with the first, and answers are compared on all.
        outputs: outputs to keep; the others are left out, with the ops and inputs that only they need. None keeps all.
        drop_outputs: outputs to leave out.
        keep_inputs: inputs that are also initializers and stay inputs, with the initializer as default.
        custom_ops: libraries of custom ops that the model needs, as :func:`~onnxsplit.custom_ops.find_libraries` takes
            them. They are code that runs with the rights of this process's user; measuring loads them.
        decoder: ``auto`` finds out whether the model is a decoder, and proves it by runs; ``off`` cuts it as any
            other model; a path names a TOML file with what is to be taken for granted. Without runs (``costs`` is
            ``analytic``), only a file makes it a decoder.
        decode_rows: for a decoder, the number of sequences in the step that costs are taken at.
        context: the number of positions of each of these sequences before the step.
        cache_tokens: the positions, over all sequences, for which stages need memory; None for those of the step.
    """

    costs: str | None = None
    dims: Mapping[str, int] | None = None
    inputs: Example | Sequence[Example] | None = None
    outputs: Sequence[str] | None = None
    drop_outputs: Sequence[str] = ()
    keep_inputs: Sequence[str] = ()
    custom_ops: object = ()
    decoder: str | Path = AUTO
    decode_rows: int = 4
    context: int = 512
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        """Turn integers of NumPy into Python's."""
        for name in ("decode_rows", "context", "cache_tokens"):
            object.__setattr__(self, name, as_int(getattr(self, name)))

    def check(self) -> None:
        """Refuse numbers that are out of range, words that are none of those allowed, and a text for a list.

        Raises:
            InputError, PartitionError: names the options, and what is allowed.
        """
        if self.costs not in (None, "measured", "analytic"):
            raise InputError(f"--costs must be measured or analytic, not {shown(self.costs)}")
        for name in ("outputs", "drop_outputs", "keep_inputs"):
            value = getattr(self, name)
            if isinstance(value, str | bytes):
                raise PartitionError(f"{name} must be a list of names, as in ['y'], not {shown(value)}")
        checks = [
            whole_problem("--decode-rows", self.decode_rows, 1, MOST_STEP_ROWS),
            whole_problem("--context", self.context, 0, MOST_LENGTH),
            self.cache_tokens is not None and whole_problem("--cache-tokens", self.cache_tokens, 0, MOST_BYTES),
        ]
        problems = [problem for problem in checks if problem]
        if problems:
            raise InputError("; ".join(problems))


@dataclass(frozen=True)
class _Reading:
    """A model that was read: whether it is a decoder, its graph and inputs' types, and what the user gave."""

    options: ModelOptions
    decoder: ProvenDecoder | NoDecoder
    graph: OpGraph
    specs: Mapping[str, TensorSpec]
    defaults: Mapping[str, Array]
    dims: Mapping[str, int]
    inputs: Mapping[str, Array] | None
    custom_ops: tuple[Library, ...]
    more_inputs: tuple[Mapping[str, Array], ...] = ()

    @property
    def step(self) -> StepSize | None:
        """The step that costs are taken at; None for a model that is no decoder, and with inputs that are given."""
        options = self.options
        if isinstance(self.decoder, NoDecoder) or self.inputs is not None:
            return None
        wanted = StepSize(options.decode_rows, options.context)
        return step_size(self.decoder, self.specs, wanted, options.dims or {})


def examine(
    model: ModelLike | SourceModel,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    budget: TimeBudget = EFFORTS["normal"],
    say: Say = silent,
    **options: Any,
) -> Subject:
    """Read a model, find inputs that it runs on, find the costs of its ops, and group the ops into atoms.

    Args:
        model: the path of the model's file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; or an opened
            model, which is changed where outputs or inputs are named.
        threads: threads of the session that is measured; all cores of this host when None.
        provider: execution provider that measures.
        budget: how long to measure.
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
    wanted.check()
    threads = threads or threads_per_node(1)
    reading = _read(model, wanted, threads, say)
    note = None
    if wanted.costs != "analytic" and reading.graph.ops:
        try:
            return _measured(reading, threads, provider, budget, say)
        except ModelRefused as error:
            raise ModelRefused(
                f"{error}. To cut it for another ONNX Runtime than this one: --costs analytic"
            ) from error
        except (ModelError, InputError, MissingDependency) as error:
            if wanted.costs == "measured" or reading.inputs is not None:
                raise
            note = str(error)
    return _estimated(reading, note)


def _read(model: ModelLike | SourceModel, options: ModelOptions, threads: int, say: Say) -> _Reading:
    """Open the model, select its outputs, find out whether it is a decoder, and check the inputs and sizes given."""
    libraries = find_libraries(options.custom_ops)
    check_names(libraries)
    say("reading the model")
    source = model if isinstance(model, SourceModel) else open_any(model)
    selected = select(
        source, outputs=options.outputs, drop_outputs=options.drop_outputs, keep_inputs=options.keep_inputs
    )
    runs = options.costs != "analytic"
    prepared = prepare(selected, options.decoder, runs=runs, threads=threads, custom_ops=libraries, say=say)
    graph = build_graph(prepared.source)
    check_outputs_are_tensors(graph)
    specs = input_specs(graph)
    kept = defaults(graph.source)
    sized = sized_dimensions(specs)
    dims = {dim: size for dim, size in sizes_in(specs, kept).items() if dim in sized} | dict(options.dims or {})
    examples = [_given(graph, one, kept) for one in _examples(options.inputs)]
    sizes = [accept(graph, specs, one) for one in examples]
    dims |= sizes[0] if sizes else {}
    first = examples[0] if examples else None
    return _Reading(options, prepared.decoder, graph, specs, kept, dims, first, libraries, tuple(examples[1:]))


def _examples(inputs: Example | Sequence[Example] | None) -> list[Mapping[str, Array]]:
    """The example inputs that the user gave."""
    several = [inputs] if isinstance(inputs, str | Path | Mapping) else inputs or ()
    return [load_npz(Path(one)) if isinstance(one, str | Path) else one for one in several]


def _measured(reading: _Reading, threads: int, provider: str, budget: TimeBudget, say: Say) -> Subject:
    """Measure the costs, on the inputs that are given or on made-up ones."""
    graph, libraries = reading.graph, reading.custom_ops
    _check_memory(graph)
    inputs, dims = reading.inputs, reading.dims
    step = reading.step
    if inputs is None and step is not None:
        inputs, dims = _step_inputs(reading, step)
    elif inputs is None:
        example = find_example(
            graph, reading.specs, dims, threads=threads, provider=provider, say=say, custom_ops=libraries
        )
        inputs, dims = example.inputs, example.dims
    shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()})
    costs = measured_costs(
        graph,
        shapes,
        inputs,
        threads=threads,
        provider=provider,
        budget=budget,
        say=say,
        custom_ops=libraries,
        in_place=reading.decoder.in_place if isinstance(reading.decoder, ProvenDecoder) and step is not None else (),
    )
    subject = _subject(reading, costs, inputs, dims, None)
    if subject.decoding is None:
        return subject
    say("timing a prompt")
    prefill = measured_prefill(
        graph.source,
        subject.decoding.decoder,
        reading.specs,
        threads=threads,
        level=costs.level,
        provider=provider,
        custom_ops=libraries,
    )
    return replace(subject, decoding=replace(subject.decoding, prefill=prefill))


def _estimated(reading: _Reading, note: str | None) -> Subject:
    """Estimate the costs by arithmetic; made-up inputs are not tried."""
    graph, specs, inputs, dims = reading.graph, reading.specs, reading.inputs, reading.dims
    step = reading.step
    if inputs is None and step is not None:
        inputs, dims = _step_inputs(reading, step)
    elif inputs is None:
        dims = next(dimension_choices(specs, dims))
        *_, inputs = guesses(graph, specs, bind(specs, dims), reading.defaults)  # the last is the most careful
        dims = with_formulas(specs, dims)
    shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()})
    return _subject(reading, analytic_costs(graph, shapes), inputs, dims, note)


def _step_inputs(reading: _Reading, step: StepSize) -> tuple[dict[str, Array], dict[str, int]]:
    """Inputs of a step of a decoder, and the sizes of the free dimensions in them."""
    assert isinstance(reading.decoder, ProvenDecoder)
    inputs = example_step(reading.decoder.claim, reading.specs, rows=step.rows, context=step.context, new=step.new)
    return inputs, sizes_in(reading.specs, inputs)


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
    reading: _Reading, costs: OpCosts, inputs: Mapping[str, Array], dims: Mapping[str, int], note: str | None
) -> Subject:
    graph, decoder = reading.graph, reading.decoder
    for name in graph.outputs:
        if name in graph.producer and not costs.shapes.travels(name):
            raise PartitionError(
                f"output {name!r} is not a tensor that can be returned to a caller (a sequence, a map, an optional, or "
                "a type that ONNX Runtime cannot pass on); remove it from the model's outputs"
            )
    known = Subject(
        graph, costs, build_atoms(graph, costs.shapes), inputs, dims, note, reading.custom_ops,
        no_decoder=decoder.reason if isinstance(decoder, NoDecoder) else "", more_inputs=reading.more_inputs,
    )  # fmt: skip
    if isinstance(decoder, NoDecoder):
        return known
    how = decoding(
        graph,
        decoder,
        reading.specs,
        reading.step or StepSize(0, 0),
        reading.options.cache_tokens,
        costs.time_ns,
        runs=costs.source == "measured",
        custom_ops=reading.custom_ops,
    )
    atoms = build_atoms(graph, costs.shapes, how.together, local=how.local)
    return replace(known, atoms=atoms, decoding=how)
