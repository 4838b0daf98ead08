"""The model of a plan with its costs and devices: the score of the plan's own cut, and a new cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec.structs

from onnxsplit.errors import PlanError
from onnxsplit.partitioner import Partition, SearchResult, score
from onnxsplit.plan import Level, Plan, Stage
from onnxsplit.planning.batch_axes import with_axes
from onnxsplit.planning.border_forms import Narrowed
from onnxsplit.planning.borders import as_chosen, narrowed_untried
from onnxsplit.planning.from_plan import Carried, carried, carried_origin, with_times
from onnxsplit.planning.model_partitioner import partitioner_for
from onnxsplit.planning.op_costs import load_costs, save_costs, with_costs
from onnxsplit.planning.place import reference_ns
from onnxsplit.planning.plan_builder import CandidateCut, PlanBuilder, stage_file
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import ProviderFacts
from onnxsplit.planning.target_block import options_of, target_of
from onnxsplit.progress import silent
from onnxsplit.stages.borders import NarrowTensor
from onnxsplit.stages.extract import write_stage
from onnxsplit.stages.parts import StageParts, stage_parts


class Replanning:
    """The model of a plan with its costs and devices, and the cuts of it.

    Args:
        folder: the plan directory.
        plan: the plan.
        speeds: the relative speed of every device, by name.
        stage_times_ns: what each stage takes now, as for :func:`~onnxsplit.planning.replan.replan`.
    """

    def __init__(
        self, folder: Path, plan: Plan, speeds: Mapping[str, float], stage_times_ns: Sequence[int] | None
    ) -> None:
        assert plan.target is not None
        assert plan.costs.ops is not None
        self._folder, self._plan = folder, plan
        self._known = known = load_costs(folder / plan.costs.ops.name)
        self._model = carried(folder, plan, known)
        subject = self._model.subject
        self._op_ns = _scaled(self._model, plan, stage_times_ns)
        whole_ns = plan.costs.whole_time_ns * sum(self._op_ns) // max(1, sum(subject.costs.time_ns))
        subject = replace(subject, costs=replace(subject.costs, time_ns=self._op_ns, whole_ns=whole_ns))
        index_of = {name: index for index, op in enumerate(subject.graph.ops) for name in op.outputs}
        left = {
            provider: frozenset(index_of[name] for name in names if name in index_of)
            for provider, names in known.left.items()
        }
        facts = {provider: ProviderFacts(left=ops) for provider, ops in left.items()}
        target = replace(target_of(plan, plan.target, speeds), facts=facts)
        stages = plan.target.stages
        made = partitioner_for(subject, options_of(plan, plan.target), lambda _: (stages, target), silent)
        self._partitioner = replace(made, subject=_with_proven_borders(made.subject, plan))

    def old_cut(self) -> CandidateCut:
        """The cut of the plan, with its figures for the costs and speeds of now.

        Raises:
            PlanError: it breaks a constraint of its own.
        """
        plan, subject = self._plan, self._partitioner.subject
        stages = [{self._model.stage_of[op] for op in ops} for ops in subject.atoms.ops]
        if any(len(found) != 1 for found in stages):
            raise PlanError(
                f"{self._folder} has ops in different stages that must stay together; partition the model again"
            )
        partition = Partition(
            tuple(found.pop() for found in stages), tuple(stage.device_numbers for stage in plan.stages)
        )
        tensors = plan.borders.tensors if plan.borders is not None else ()
        narrow = tuple(NarrowTensor(one.tensor, one.form, one.wire, plan.tensors[one.tensor]) for one in tensors)
        known = score(subject.problem(self._op_ns, self._partitioner.target), partition)
        cut = self._cut(SearchResult(partition, known, 0))
        cut = replace(cut, borders=Narrowed(narrow) if subject.borders is not None else None)
        problem = as_chosen(cut, subject).problem(self._op_ns, self._partitioner.target)
        return replace(cut, score=score(problem, partition))

    def new_cut(self) -> CandidateCut:
        """The best cut that a quick search finds.

        Raises:
            PartitionError: no cut was found that keeps every limit.
        """
        return narrowed_untried(self._cut(self._partitioner(self._op_ns, quick=True)), self._partitioner)

    def times(self, cut: CandidateCut) -> list[tuple[tuple[str, ...], int]]:
        """For each stage, the names of its devices, and its time between two requests in nanoseconds."""
        devices = self._partitioner.target.devices
        names = [tuple(devices[number].name for number in numbers) for numbers in cut.result.partition.devices]
        return list(zip(names, cut.score.stage_ns, strict=True))

    def written(self, cut: CandidateCut, draft: Path, parent: str) -> Plan:
        """Write the files of a cut; returns its plan, which is not yet among them.

        Args:
            cut: the cut.
            draft: the folder of the new plan.
            parent: the identity of the old plan.

        Raises:
            PartitionError, PlanError: a file cannot be written.
        """
        before, subject = self._plan, self._partitioner.subject
        write = partial(write_stage, subject.graph, subject.shapes)
        files = tuple(write(part, draft, stage_file(index)) for index, part in enumerate(cut.parts))
        cut = replace(cut, files=files, folder=draft)
        cut = self._with_known_errors(narrowed_untried(cut, self._partitioner))
        origin = carried_origin(self._folder, before, draft)
        plan = PlanBuilder(self._partitioner, draft, origin).plan(cut, cut.result.bound, ())
        costs = msgspec.structs.replace(
            plan.costs,
            note=f"they follow from the costs of the plan {parent[:12]}, which was planned anew",
            interval=before.costs.interval,
            disturbed=before.costs.disturbed,
            moved=before.costs.moved,
        )
        stages = tuple(self._with_left(stage, part) for stage, part in zip(plan.stages, cut.parts, strict=True))
        plan = msgspec.structs.replace(
            plan, costs=costs, stages=stages, providers=before.providers, batch=before.batch, parent=parent
        )
        known = with_times(self._known, subject.graph, self._op_ns)
        return with_costs(with_axes(plan, known.batch_axes), save_costs(draft, known))

    def _cut(self, result: SearchResult) -> CandidateCut:
        subject = self._partitioner.subject
        alike = subject.decoding.alike if subject.decoding is not None else {}
        parts = stage_parts(subject.graph, subject.atoms, result.partition.stage_of, alike)
        return CandidateCut(
            result=result,
            parts=parts,
            files=(),
            folder=Path(),
            op_ns=self._op_ns,
            score=result.score,
            levels=tuple(map(self._level, parts)),
        )

    def _level(self, part: StageParts) -> Level:
        """The optimisation level at which most of the time of a stage's ops was spent in the old stages."""
        spent: Counter[Level] = Counter()
        for op in part.ops:
            spent[self._plan.stages[self._model.stage_of[op]].optimization_level] += 1 + self._op_ns[op]
        return spent.most_common(1)[0][0]

    def _with_known_errors(self, cut: CandidateCut) -> CandidateCut:
        """The cut with the errors that are known of its narrow borders: together only if they are those of before."""
        before = self._plan.borders
        if cut.borders is None or before is None:
            return cut
        alone = {one.tensor: one.error for one in before.tensors if one.error is not None}
        forms = {one.tensor: one.form for one in before.tensors}
        kept = {name: error for name, error in alone.items() if cut.borders.chosen.get(name) == forms[name]}
        same = cut.borders.chosen == forms
        borders = replace(
            cut.borders,
            alone=kept,
            error=before.error if same else 0.0 if not cut.borders.tensors else None,
            inputs=before.inputs if same else 0,
        )
        return replace(cut, borders=borders)

    def _with_left(self, stage: Stage, part: StageParts) -> Stage:
        """A stage with the number of its ops that its provider leaves to the CPU, by their types."""
        facts = self._partitioner.target.facts.get(stage.provider)
        if facts is None:
            return stage
        ops = self._partitioner.subject.graph.ops
        counted = Counter(ops[op].op_type for op in part.ops if op in facts.left)
        return msgspec.structs.replace(stage, left_to_cpu=dict(sorted(counted.items())))


def _scaled(model: Carried, plan: Plan, stage_times_ns: Sequence[int] | None) -> tuple[int, ...]:
    """The times of the ops, so that the stages of the plan take as long as was measured now."""
    op_ns = model.subject.costs.time_ns
    if stage_times_ns is None or plan.target is None:
        return op_ns
    devices = plan.target.devices
    known = [reference_ns(stage) / devices[stage.device_numbers[0]].speed for stage in plan.stages]
    factors = [now / before if before else 1.0 for now, before in zip(stage_times_ns, known, strict=True)]
    return tuple(round(time_ns * factors[stage]) for time_ns, stage in zip(op_ns, model.stage_of, strict=True))


def _with_proven_borders(subject: Subject, plan: Plan) -> Subject:
    """The model with the forms of narrow borders that need no run.

    If the forms were chosen by the error of the outputs, only tensors that the plan narrows may be narrow again.
    """
    forms, before = subject.borders, plan.borders
    if forms is None or before is None or before.asked != "auto":
        return subject
    proven = {one.tensor: one.form for one in before.tensors}
    kept = {name: tuple(f for f in found if f in ("float32", proven.get(name))) for name, found in forms.forms.items()}
    return replace(subject, borders=replace(forms, forms=kept))
