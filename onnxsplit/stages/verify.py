"""Verify a plan: the chained stages must give the outputs of the whole model.

There are two comparisons for each output:

- With optimisation off, the stages must equal the model bit for bit, or within the tolerance.
- At the plan's optimisation levels, and on the providers of its stages that this host has, the distance from the
  unoptimised model on the CPU may be at most twice the distance by which optimisation alone, or one of the providers
  alone, moves the whole model, or the tolerance if that is larger.

The tolerance is 1e-4 of the output's scale. It is larger if the model computes in a float type narrower than float32,
or if such a type crosses a border between stages (see :mod:`onnxsplit.model.precision`). Such a model may amplify
rounding far beyond the type's epsilon, so twice the distance of optimisation alone is then allowed with optimisation
off too. More than half of the scale is never allowed, even if a wrong optimiser moves the whole model that far.

If borders are narrow, the largest difference that is allowed is at least the budget of error in the plan.

The scale of an output is its largest finite magnitude. Integers, strings and booleans have no scale: they must be
equal, and at the plan's levels they may differ in at most twice as many elements as optimisation alone changes.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from onnxsplit.custom_ops import Library, check_wanted, find_libraries, needed_libraries
from onnxsplit.errors import ModelError, ModelRefused, PlanError, ProviderError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.graph_io import select
from onnxsplit.model.in_memory import ModelFile, ModelLike, open_any, runnable
from onnxsplit.model.precision import computed_types
from onnxsplit.model.shapes import infer_shapes
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import load_npz
from onnxsplit.plan import PLAN_FILE, Level, Plan
from onnxsplit.plan_files import default_files, example_file, load_plan
from onnxsplit.providers import CPU, parse_provider, provider_problem
from onnxsplit.session import Session, open_session
from onnxsplit.stages.chain import StageFile, StageOnProvider, run_chain
from onnxsplit.stages.comparison import Comparison, compared
from onnxsplit.tensors import Array, check_inputs, numpy_dtype


def _check_order(folder: Path, model: ModelLike) -> None:
    """Refuse a model and a plan that were given the other way round."""
    if isinstance(model, str | Path) and folder.is_file() and (Path(model) / PLAN_FILE).is_file():
        raise PlanError(
            f"{folder} is not a plan directory, and {model} is one. Name the plan first: onnxsplit verify "
            f"{shlex.quote(str(model))} {shlex.quote(str(folder))}"
        )


def verify(
    folder: str | Path,
    model: ModelLike,
    *,
    inputs: str | Path | Sequence[str | Path] | None = None,
    threads: int = 1,
    custom_ops: object = (),
    tell: Callable[[StageOnProvider], None] = lambda _: None,
) -> tuple[Comparison, ...]:
    """Run the model and its stages in this process, and compare every output.

    With several inputs, the comparison of an output is that of the inputs on which it is worst.

    Args:
        folder: the plan directory.
        model: the model that the plan was made from, as :func:`~onnxsplit.planning.planner.partition` takes it.
        inputs: an ``.npz`` with inputs, or several; the plan's own example when None.
        threads: threads of each session.
        custom_ops: the libraries of custom ops that the plan names, as ``partition`` takes them; they are loaded here.
        tell: called with each stage for another provider than the CPU, once it ran.

    Raises:
        PlanError: the plan is damaged, or was made from another file.
        CustomOpsError: a library that the plan names was not given, or is another build.
        ModelError, InputError: a stage or the model does not run on the inputs.
    """
    folder = Path(folder)
    _check_order(folder, model)
    plan = load_plan(folder)
    source = open_any(model)
    name = str(model) if isinstance(model, str | Path) else source.path.name
    needed = needed_libraries(libraries := find_libraries(custom_ops), plan)
    check_wanted(libraries, (plan,))
    _check_model(folder, plan, name, source)
    files = [inputs] if isinstance(inputs, str | Path) else list(inputs or [])
    examples = [_given(folder, plan, Path(file)) for file in files or [example_file(folder, plan)]]
    own = {value.name for value in source.proto.graph.input}  # the plan of a decoder may have another input
    source = select(source, outputs=plan.outputs, keep_inputs=[name for name in plan.defaults if name in own])
    hint = "" if files else "; these inputs were made up, give real ones with --inputs FILE.npz"
    with runnable(source) as file:
        try:
            plain, again = (
                [_run_whole(file, plan, x, "disabled", threads, needed) for x in examples] for _ in range(2)
            )
        except ModelError as error:
            raise ModelError(f"{name} does not run on the inputs: {error}{hint}") from error
    types = _float_types(source, plan, examples[0])
    with runnable(source, as_in_stages=True) as file:
        optimized = [
            [_run_optimized(file, plan, given, level, threads, needed) for level in _levels(plan)] for given in examples
        ]
        others = [list(_on_providers(file, plan, given, threads, needed)) for given in examples]
    comparisons: list[list[Comparison]] = []
    for number, given in enumerate(examples):
        chained = run_stages(folder, plan, given, threads=threads, level="disabled", custom_ops=needed)
        at_levels = run_stages(folder, plan, given, threads=threads, custom_ops=needed, tell=tell)
        wholes = (plain[number], again[number])
        comparisons.append(_compared(plan, types, wholes, optimized[number], others[number], chained, at_levels))
    return tuple(map(_worst, zip(*comparisons, strict=True)))


def _compared(
    plan: Plan,
    types: frozenset[str],
    plain: Sequence[Mapping[str, Array]],
    optimized: Sequence[Mapping[str, Array]],
    on_providers: Sequence[Mapping[str, Array]],
    chained: Mapping[str, Array],
    at_levels: Mapping[str, Array],
) -> list[Comparison]:
    """The comparison of each output for the same inputs."""
    return [
        compared(
            output,
            plain=[answers[output] for answers in plain],
            optimized=[answers[output] for answers in optimized],
            on_providers=[answers[output] for answers in on_providers],
            stages=chained[output],
            optimized_stages=at_levels[output],
            types=types,
            budget=plan.borders.tolerance if plan.borders is not None and plan.borders.tensors else 0.0,
        )
        for output in plan.outputs
    ]


def _worst(comparisons: Sequence[Comparison]) -> Comparison:
    return max(comparisons, key=lambda one: (not one.good, one.difference))


def _check_model(folder: Path, plan: Plan, name: str, source: SourceModel) -> None:
    if source.sha256 != plan.model.sha256:
        raise PlanError(
            f"{folder} was made from another model than {name}: SHA-256 {plan.model.sha256[:12]} "
            f"and {source.sha256[:12]}. Name the model it was made from, or partition this one"
        )


def _float_types(source: SourceModel, plan: Plan, inputs: Mapping[str, Array]) -> frozenset[str]:
    """The types that cross a border of the plan, without narrow borders, and the types that the model computes in."""
    graph = build_graph(source)
    shapes = infer_shapes(graph, {name: inputs[name].shape for name in graph.inputs if name in inputs})
    wire = plan.borders.wire if plan.borders is not None else frozenset()
    return computed_types(graph, shapes) | {spec.dtype for name, spec in plan.tensors.items() if name not in wire}


def _given(folder: Path, plan: Plan, file: Path) -> dict[str, Array]:
    """The inputs in a file, without those that the plan leaves out, and with the defaults of missing ones.

    Raises:
        InputError: the inputs do not fit the plan.
    """
    given = {name: array for name, array in load_npz(file).items() if name not in plan.dropped_inputs}
    specs = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in plan.inputs}
    check_inputs(given, specs, unread_inputs(plan) | plan.defaults.keys(), refused=plan.refused_inputs())
    defaults = {name: load_npz(path)[name] for name, path in default_files(folder, plan).items() if name not in given}
    return {**defaults, **given, **_fixed(plan)}


def _fixed(plan: Plan) -> dict[str, Array]:
    """The values of inputs that the plan of a decoder fixes: those that no stage reads, and the first scored position.

    The whole model computes the scores of all positions, so the stages do so too.
    """
    unread = unread_inputs(plan)
    controls = plan.decoder.controls if plan.decoder is not None else ()
    return {
        control.input: np.full_like(_zeros(plan, control.input), control.value or 0)
        for control in controls
        if control.role == "first-scored" or (control.role == "fixed" and control.input in unread)
    }


def unread_inputs(plan: Plan) -> frozenset[str]:
    """Inputs of the model that no stage reads and no output passes on; they may be left out."""
    read = {name for stage in plan.stages for name in stage.inputs}
    read |= {source.input for source in plan.passthrough.values() if source.input is not None}
    return frozenset(plan.inputs) - read


def run_stages(
    folder: Path,
    plan: Plan,
    inputs: Mapping[str, Array],
    *,
    threads: int,
    level: Level | None = None,
    custom_ops: Sequence[Library] = (),
    tell: Callable[[StageOnProvider], None] | None = None,
) -> dict[str, Array]:
    """Run the stages one after the other in this process, on the CPU or on the providers of the plan.

    Args:
        folder: the plan directory.
        plan: the plan.
        inputs: the inputs by name.
        threads: threads of each session.
        level: optimisation level; each stage's own when None.
        custom_ops: libraries of custom ops; each stage loads those that it needs.
        tell: called with each stage for another provider than the CPU. If None, all stages run on the CPU.

    Returns:
        The inputs, every tensor that a stage writes, and every output, by name.

    Raises:
        ModelError: a stage does not load, or does not run on its inputs.
    """
    problems = {stage.provider: provider_problem(stage.provider) if tell else "" for stage in plan.stages}
    stages = [
        StageFile(
            path=folder / stage.file,
            inputs=stage.inputs,
            outputs=stage.outputs,
            threads=threads,
            level=level or stage.optimization_level,
            provider=stage.provider if problems[stage.provider] is None else "cpu",
            custom_ops=needed_libraries(custom_ops, plan, stage.index),
        )
        for stage in plan.stages
    ]
    written = [name for stage in plan.stages for name in stage.outputs]
    run_here = _InThisProcess()
    values = {**inputs, **run_chain(stages, inputs, written, run_here)}
    for stage, file in zip(plan.stages, stages, strict=True):
        if tell is not None and parse_provider(stage.provider).name != CPU:
            tell(
                StageOnProvider(
                    stage.index, stage.provider, file.provider, problems[stage.provider], run_here.left[file.path]
                )
            )
    for name, origin in plan.passthrough.items():
        values[name] = values[origin.input] if origin.input is not None else _constant(folder, plan, name)
    return values


class _InThisProcess:
    """Runs a stage once in this process, and keeps what its provider left to the CPU, by the stage's file."""

    def __init__(self) -> None:
        self.left: dict[Path, Counter[str]] = {}

    def __call__(self, stage: StageFile, inputs: Mapping[str, Array]) -> dict[str, Array]:
        session = open_session(
            stage.path,
            threads=stage.threads,
            level=stage.level,
            provider=stage.provider,
            custom_ops=stage.custom_ops,
        )
        self.left[stage.path] = Counter(kind for _, kind in session.left_to_cpu or ())
        return session.run(inputs)


def _constant(folder: Path, plan: Plan, name: str) -> Array:
    file = plan.passthrough[name].file
    assert file is not None
    return load_npz(folder / file.name)[name]


def _run_whole(
    file: ModelFile,
    plan: Plan,
    inputs: Mapping[str, Array],
    level: Level,
    threads: int,
    custom_ops: Sequence[Library],
    provider: str = "cpu",
) -> dict[str, Array]:
    apart = file.data_folder is not None
    session: Session = open_session(
        file.path.read_bytes() if apart else file.path,
        threads=threads,
        level=level,
        external_data_folder=file.data_folder,
        provider=provider,
        custom_ops=custom_ops,
    )
    given = {name: inputs[name] if name in inputs else _zeros(plan, name) for name, _ in session.inputs}
    return session.run(given)


def _levels(plan: Plan) -> tuple[Level, ...]:
    """The levels of the plan, each once."""
    return tuple(dict.fromkeys([plan.costs.whole_optimization_level, *(s.optimization_level for s in plan.stages)]))


def _run_optimized(
    file: ModelFile, plan: Plan, inputs: Mapping[str, Array], first: Level, threads: int, custom_ops: Sequence[Library]
) -> dict[str, Array]:
    """Run the whole model at a level of the plan, or at the next lower one that ONNX Runtime accepts.

    ONNX Runtime cannot optimise some models a second time.
    """
    levels: tuple[Level, ...] = ("all", "extended", "basic")
    for level in levels[levels.index(first) :] if first in levels else ():
        with suppress(ModelRefused):
            return _run_whole(file, plan, inputs, level, threads, custom_ops)
    return _run_whole(file, plan, inputs, "disabled", threads, custom_ops)


def _on_providers(
    file: ModelFile, plan: Plan, inputs: Mapping[str, Array], threads: int, custom_ops: Sequence[Library]
) -> Iterator[dict[str, Array]]:
    """Run the whole model on each provider of the plan but the CPU that this host has and that runs all of it."""
    for stage in {stage.provider: stage for stage in plan.stages}.values():
        if parse_provider(stage.provider).name != CPU and provider_problem(stage.provider) is None:
            with suppress(ModelError, ProviderError):
                yield _run_whole(
                    file, plan, inputs, stage.optimization_level, threads, custom_ops, provider=stage.provider
                )


def _zeros(plan: Plan, name: str) -> Array:
    spec = plan.tensors[name]
    return np.zeros([d if isinstance(d, int) else 1 for d in spec.shape or ()], numpy_dtype(spec.dtype))
