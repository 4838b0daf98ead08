"""From a model to a plan directory: the whole offline half.

    examine -> partition -> stage files -> measure -> correct, and cut again -> plan

A plan directory appears as a whole or not at all: it is written beside its place and then renamed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from onnxsplit.arguments import check_names, option_names
from onnxsplit.cluster_files import load_cluster
from onnxsplit.effort import TimeBudget
from onnxsplit.errors import ProviderError
from onnxsplit.files import new_folder
from onnxsplit.model.in_memory import ModelLike, open_any
from onnxsplit.model.source import SourceModel
from onnxsplit.plan import PLAN_FILE, Plan
from onnxsplit.plan_files import check_plan_folder, checked_json
from onnxsplit.planning.batch_axes import with_batch_axes
from onnxsplit.planning.examine import ModelArguments, ModelOptions, examine
from onnxsplit.planning.model_partitioner import model_partitioner
from onnxsplit.planning.op_costs import known_costs, save_costs, with_costs
from onnxsplit.planning.options import CutArguments, CutOptions, by_current_name
from onnxsplit.planning.providers import reference_provider, with_assignment
from onnxsplit.planning.result import PlanningResult
from onnxsplit.planning.rounds import Rounds
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say, silent
from onnxsplit.providers import gpu_count, provider_here, provider_problem, providers_by_stage
from onnxsplit.session import threads_per_node
from onnxsplit.stages.batch.trials import Axes
from onnxsplit.timed import reused_workers


class PartitionArguments(CutArguments, ModelArguments, total=False):
    """The options of :func:`partition`, for editors and type checkers."""


def partition(
    model: ModelLike,
    *,
    out: str | Path | None = None,
    say: Say = silent,
    **options: Unpack[PartitionArguments],
) -> Plan:
    """Cut a model into cost-balanced stages and write the plan directory.

    Args:
        model: the path of the model's file, its bytes, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
        out: the plan directory; None for ``MODEL.plan`` in the current folder, where MODEL is the file's name, or the
            graph's for a model in memory. An existing plan is replaced as a whole.
        say: called with each step.
        options: how to cut: the attributes of :class:`~onnxsplit.planning.options.CutOptions`, such as ``stages``,
            ``max_memory`` and ``cluster``; and how to read the model: those of
            :class:`~onnxsplit.planning.examine.ModelOptions`, such as ``inputs``, ``dims`` and ``outputs``.

    Raises:
        PartitionError: the model cannot be cut as asked.
        PlanError: ``out`` is something other than a plan.
        ClusterError: the cluster file is not usable.
        InputError: an option is unknown or invalid, or example inputs do not fit the model.
        ModelError, CustomOpsError, MissingDependency, ProviderError: as
            :func:`~onnxsplit.planning.examine.examine`.
    """
    given = by_current_name(options, _warn_of_former_name)
    cut, read = option_names(CutOptions), option_names(ModelOptions)
    check_names(given, [*cut, *read, "out", "say"])
    wanted = CutOptions(**{name: value for name, value in given.items() if name in cut})
    source = open_any(model)
    folder = Path(out) if out is not None else default_plan_folder(source.path)
    check_plan_folder(folder)
    with reused_workers():
        reading = {name: value for name, value in given.items() if name in read}
        subject = examine_for(source, wanted, say=say, **reading)
        return write_plan(subject, folder, wanted, say=say).plan


def _warn_of_former_name(former: str, name: str) -> None:
    """Tell a Python caller the current name of an argument of :func:`partition`."""
    warnings.warn(f"the option {former!r} is now {name!r}; the next version refuses the former name", FutureWarning, 4)


@reused_workers()
def examine_for(model: ModelLike | SourceModel, options: CutOptions, *, say: Say = silent, **examined: Any) -> Subject:
    """Examine a model with the provider and the number of threads that its stages will have.

    Args:
        model: the model, as :func:`~onnxsplit.planning.examine.examine` takes it.
        options: how the model is to be cut.
        say: called with each step.
        examined: the attributes of :class:`~onnxsplit.planning.examine.ModelOptions`.
    """
    options.check()
    if options.cluster is not None:
        first = load_cluster(options.cluster).devices[0]
        provider, threads = provider_here(first.provider), first.threads
    else:
        guess = options.devices or (options.stages if isinstance(options.stages, int) else gpu_count() or 2)
        providers = providers_by_stage(options.provider, guess)
        provider, threads = reference_provider(providers, in_cluster=False), threads_per_node(guess)
    return examine(model, threads=threads, provider=provider, budget=options.budget, say=say, **examined)


@reused_workers()
def write_plan(subject: Subject, folder: Path, options: CutOptions, *, say: Say = silent) -> PlanningResult:
    """Cut an examined model and write the plan directory.

    Raises:
        PartitionError: the model cannot be cut as asked.
        ProviderError: this host cannot run the stages that are to be measured.
        PlanError: something other than a plan is in the folder's place, or it cannot be written.
    """
    check_plan_folder(folder)
    say = _with_time_left(say, options.budget, subject)
    partitioner = model_partitioner(subject, options, say)
    if subject.costs.source == "measured" and options.cluster is None and options.budget.rounds:
        _require_providers([device.provider for device in partitioner.target.devices])
    with new_folder(folder) as draft:
        made = Rounds(partitioner, draft, say).make(options.budget)
        axes: Axes = {}
        if made.plan.costs.source == "measured":
            plan = with_assignment(made.plan, draft, subject, partitioner.target, say)
            say("looking for the batch axis")
            plan, axes = with_batch_axes(plan, draft, subject, options.budget, say)
            made = replace(made, plan=plan)
        costs = known_costs(made, partitioner.target, axes)
        made = replace(made, plan=with_costs(made.plan, save_costs(draft, costs)))
        (draft / PLAN_FILE).write_bytes(checked_json(made.plan))
    return made


def _require_providers(providers: Sequence[str]) -> None:
    """Refuse providers that cannot run their stages here, before any stage is written."""
    for provider in dict.fromkeys(providers):
        problem = provider_problem(provider)
        if problem is not None:
            raise ProviderError(
                f"{problem}. To cut for a device of another host, give --costs analytic or --cluster FILE"
            )


def _with_time_left(say: Say, budget: TimeBudget, subject: Subject) -> Say:
    """Progress that also tells how much time is left, beside writing files and loading models."""
    runs_s = budget.runs * subject.costs.whole_ns / 1e9 if subject.costs.source == "measured" else 0.0
    end = time.monotonic() + budget.search_s + runs_s
    return lambda text: say(f"{text} (at most {max(1.0, end - time.monotonic()):.0f} s left)")


def dry_run(subject: Subject, options: CutOptions, *, say: Say = silent) -> PlanningResult:
    """The first plan that :func:`write_plan` would make, before any stage runs. Nothing is written."""
    return Rounds(model_partitioner(subject, options, say), None, say).make(replace(options.budget, rounds=0))


def default_plan_folder(model: Path) -> Path:
    """The plan directory of a model if none is named: ``MODEL.plan`` in the current folder."""
    return Path(f"{model.name.removesuffix('.onnx')}.plan")
