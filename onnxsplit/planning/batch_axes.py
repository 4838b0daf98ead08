"""Find the batch axis of each tensor: the structure of the model must prove it, and trials must confirm it.

First, the rows are followed through the model op by op (:mod:`onnxsplit.planning.batch_structure`); an op that mixes
rows, or whose effect on rows is not known, ends the claim. Then the stages run on whole batches whose rows differ in
every input, and on parts of these batches (:mod:`onnxsplit.stages.batch.trials`). The outputs of the parts together
must equal the outputs of the whole batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from onnxsplit.cost.profile import shapes_of_run
from onnxsplit.custom_ops import Library
from onnxsplit.distance import tolerance
from onnxsplit.effort import TimeBudget
from onnxsplit.errors import OnnxsplitError, one_line, shown
from onnxsplit.model.example_inputs import table_size
from onnxsplit.model.precision import computed_types
from onnxsplit.plan import BatchClaim, Plan
from onnxsplit.planning.batch_structure import axes_by_structure
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say
from onnxsplit.providers import provider_here
from onnxsplit.stages.batch.trials import Axes, apart, equal_rows, trials
from onnxsplit.stages.chain import StageFile, StageProcesses, run_chain

_LEAST_TRIALS = 3
_MORE_TRIALS = 0.3  # the share of the proof's time after which no more than the least number of trials run
_FREE_RUNS = 4  # runs of the model that the proof may take beside its seconds
_LEAST_RUNS = 21  # runs of the model with one row that the proof takes at least


def with_batch_axes(plan: Plan, folder: Path, subject: Subject, budget: TimeBudget, say: Say) -> tuple[Plan, Axes]:
    """Add the claim about batches to a plan, and the batch axis of every tensor for which it holds.

    Args:
        plan: the plan; its stages must be able to run on this host.
        folder: the folder of its stage files.
        subject: the model that the plan was made from.
        budget: how long the proof may take.
        say: called with each step.

    Returns:
        The plan, and the axes of all tensors of the model, also of those that do not cross.
    """
    subject = _small(subject)
    needed_s = _LEAST_RUNS * subject.costs.whole_ns / 1e9
    if subject.decoding is None and needed_s > budget.proof_s + _FREE_RUNS * subject.costs.whole_ns / 1e9:
        why_not = f"it was not tried, because the proof takes about {needed_s:.0f} s; add --effort thorough"
        return msgspec.structs.replace(plan, batch=BatchClaim(why_not=why_not)), {}
    until = time.monotonic() + budget.proof_s * _MORE_TRIALS
    axes, why_not = axes_by_structure(subject, plan.defaults)
    tried = 0
    if axes:
        say("trying batches and their parts")
        tried, why_not = _by_trials(plan, folder, subject, axes, until)
    if why_not:
        return msgspec.structs.replace(plan, batch=BatchClaim(why_not=why_not)), {}
    plan = msgspec.structs.replace(plan, batch=BatchClaim(trials=tried))
    return with_axes(plan, axes), axes


def with_axes(plan: Plan, axes: Axes) -> Plan:
    """The plan with the batch axis of each of its tensors; a narrowed tensor crosses with the axis of the full one."""
    for border in plan.borders.tensors if plan.borders is not None else ():
        if border.tensor in axes:
            axes = {**axes, border.wire[0]: axes[border.tensor]}
    tensors = {name: msgspec.structs.replace(spec, batch_axis=axes.get(name)) for name, spec in plan.tensors.items()}
    return msgspec.structs.replace(plan, tensors=tensors)


def _small(subject: Subject) -> Subject:
    """The model with small example inputs, and the shapes that its tensors have with them."""
    if subject.inputs is subject.small_inputs:
        return subject
    inputs = subject.small_inputs
    sizes = shapes_of_run(subject.graph, inputs, custom_ops=subject.custom_ops)
    shapes = subject.shapes.observed({**{name: array.shape for name, array in inputs.items()}, **sizes}, {})
    return replace(subject, inputs=inputs, costs=replace(subject.costs, shapes=shapes))


def _by_trials(plan: Plan, folder: Path, subject: Subject, axes: Axes, until: float) -> tuple[int, str]:
    """Run the trials; none starts after ``until`` by the monotonic clock, once the least number have run.

    Returns:
        The number of trials that confirmed the claim and an empty text; or 0 and why the claim fails.
    """
    graph = subject.graph
    of_inputs = {name: axis for name, axis in axes.items() if name in graph.inputs}
    limits = {name: size for name in of_inputs if (size := table_size(graph, name)) is not None}
    allowed = tolerance(computed_types(graph, subject.shapes))
    if plan.borders is not None and plan.borders.tensors:  # a last bit may decide over a step of a narrow border
        allowed = max(allowed, plan.borders.tolerance)
    count, failure = 0, "the rows of its inputs cannot be made to differ"
    stages = _stage_files(plan, folder, subject.custom_ops)
    with StageProcesses(keep=True) as run_stage:
        for trial in trials(subject.inputs, of_inputs, limits):
            if equal_rows(trial.inputs, of_inputs, limits):
                continue
            try:
                whole, *parts = [
                    run_chain(stages, inputs, plan.outputs, run_stage)
                    for inputs in (trial.inputs, *trial.split(of_inputs))
                ]
            except OnnxsplitError as error:  # the model does not take such values
                failure = one_line(error)
                continue
            for name in plan.outputs:
                problem = apart(whole[name], [part[name] for part in parts], axes[name], allowed)
                if problem is not None:
                    return (
                        0,
                        f"in a trial ({trial.what}) output {shown(name)} depends on how the batch is split: {problem}",
                    )
            count += 1
            if count >= _LEAST_TRIALS and time.monotonic() > until:
                break
    if count < _LEAST_TRIALS:
        return 0, f"only {count} of at least {_LEAST_TRIALS} trials ran: {failure}"
    return count, ""


def _stage_files(plan: Plan, folder: Path, libraries: Sequence[Library]) -> list[StageFile]:
    """The stages of a plan as they run on this host."""
    return [
        StageFile(
            path=folder / stage.file,
            inputs=stage.inputs,
            outputs=stage.outputs,
            threads=stage.threads,
            level=stage.optimization_level,
            provider=provider_here(stage.provider),
            custom_ops=tuple(libraries),
        )
        for stage in plan.stages
    ]
