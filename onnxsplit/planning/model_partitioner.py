"""From options to a partition of a model: devices, constraints, strategy, and the search."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from onnxsplit.cluster import Cluster
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import PartitionError
from onnxsplit.model.dominant_op import explain_dominant_op
from onnxsplit.partitioner import (
    Effort,
    Infeasible,
    Lineup,
    Partition,
    Problem,
    Progress,
    SearchResult,
    fewest_stages,
    fixed_lineup,
    line_up,
    lower_bound,
    score,
    search,
    slice_order,
)
from onnxsplit.plan_borders import DEFAULT_TOLERANCE
from onnxsplit.planning.border_rules import border_forms
from onnxsplit.planning.cut_at import assignment_at, check_cuts
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.providers import with_providers
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import Target, alike, of_cluster
from onnxsplit.progress import Say
from onnxsplit.providers import gpu_count, providers_by_stage
from onnxsplit.session import threads_per_node

_QUICK_GAP, _QUICK_SECONDS = 0.002, 2.0  # when a quick search ends


@dataclass(frozen=True)
class ModelPartitioner:
    """Partitions one model for one target, for any costs of its ops.

    Attributes:
        subject: the model; ops that must stay together are in one atom.
        target: devices, objective and constraints.
        stages: the exact number of stages; None for any number.
        options: the options of the cut.
        say: called with the progress of the search.
    """

    subject: Subject
    target: Target
    stages: int | None
    options: CutOptions
    say: Say

    def __call__(self, op_ns: Sequence[int], *, quick: bool = False) -> SearchResult:
        """Find a partition.

        Args:
            op_ns: time of each op on a device of speed 1, in nanoseconds.
            quick: True for a short search with a weaker proof.

        Raises:
            PartitionError: no partition was found that keeps every limit.
        """
        problem = self.subject.problem(op_ns, self.target)
        try:
            found = self._chosen(problem, self.lineup(problem), quick)
            return found if self.stages is not None else self._with_fewer_stages(problem, found, quick)
        except Infeasible:
            raise PartitionError(self._why_not(problem)) from None

    def _with_fewer_stages(self, problem: Problem, found: SearchResult, quick: bool) -> SearchResult:
        """A partition into fewer stages if it is better: each stage adds the overhead of a node to the host's cores."""
        best = found
        while best.score.host_ns == best.score.value and (count := len(found.partition.devices)) > 1:
            try:
                found = self._chosen(problem, line_up(problem, count - 1, self.options.parallel), quick)
            except Infeasible:
                break
            if found.score.rank >= best.score.rank:
                break
            best = replace(found, bound=min(best.bound, found.score.value))
        return best

    def where_ops_may_fall_back(self) -> ModelPartitioner:
        """This partitioner, or one that lets providers leave ops to the CPU if every cut needs that."""
        if not any(map(self.target.left, self.target.devices)):
            return self
        try:
            self(self.subject.costs.time_ns, quick=True)
        except PartitionError:
            self.say("every cut leaves some ops of a provider to the CPU")
            return replace(self, target=replace(self.target, falls_back=True))
        return self

    def lineup(self, problem: Problem) -> Lineup:
        """The orders in which the devices can be assigned to stages."""
        if self.target.ordered:
            return fixed_lineup(problem, [(device,) for device in range(len(problem.devices))], self.stages)
        return line_up(problem, self.stages, self.options.parallel)

    def _chosen(self, problem: Problem, lineup: Lineup, quick: bool) -> SearchResult:
        options = self.options
        if options.cut_at:
            stage_of = assignment_at(self.subject, options.cut_at)
            fixed = Partition(stage_of, tuple((stage,) for stage in range(max(stage_of, default=-1) + 1)))
            return SearchResult(fixed, score(problem, fixed), lower_bound(problem, lineup))
        if options.strategy == "network" or not problem.atoms:
            gap, seconds = options.gap, options.budget.search_s
            if quick:
                gap, seconds = max(gap, _QUICK_GAP), min(seconds, _QUICK_SECONDS)
            return search(problem, lineup, Effort(gap=gap, seconds=seconds), self._progress)
        order, walls = list(range(problem.atoms)), []
        if options.strategy == "task":
            group_of = task_groups(self.subject, options.tasks)
            order.sort(key=lambda atom: group_of[atom])
            walls = [i for i in range(1, len(order)) if group_of[order[i - 1]] != group_of[order[i]]]
        sliced = slice_order(problem, lineup, order, walls=walls)
        if sliced is None or not (figures := score(problem, sliced)).feasible:
            raise Infeasible
        return SearchResult(sliced, figures, min(lower_bound(problem, lineup), figures.value))

    @property
    def _progress(self) -> Progress:
        bytes_wanted = self.options.objective == "memory"

        def tell(best: int, least: int) -> None:
            shown = (f"{v / (1 << 20):.1f} MiB" if bytes_wanted else f"{v / 1e6:.3f} ms" for v in (best, least))
            proven = f" (gap {best / least - 1:.2%})" if least else ""
            self.say("searching: best {}, none is below {}".format(*shown) + proven)

        return tell

    def _why_not(self, problem: Problem) -> str:
        limits = [
            name
            for name, given in (
                ("the memory of the devices", problem.capped),
                (
                    "the ops they may run",
                    any(d.only_ops or d.not_ops or self.target.left(d) for d in self.target.devices)
                    or self.target.placed,
                ),
                ("the required cuts", self.target.apart),
            )
            if given
        ]
        if limits == ["the memory of the devices"] and self.options.max_memory is not None and not self.options.cluster:
            return _too_little_memory(self.subject, self.options.max_memory)
        return f"no cut was found that fits {' and '.join(limits) or 'the number of stages'}; relax a requirement"


def model_partitioner(subject: Subject, options: CutOptions, say: Say) -> ModelPartitioner:
    """Prepare to partition a model.

    Args:
        subject: the model.
        options: the options of the cut.
        say: called with the progress of the search.

    Raises:
        PartitionError: the options contradict each other, or do not fit the model.
        ClusterError: the cluster file is not usable.
        ProviderError: a provider is unknown.
    """
    options.check()
    cluster = load_cluster(options.cluster) if options.cluster is not None else None
    made = partitioner_for(subject, options, partial(_devices, options=options, cluster=cluster), say)
    subject, stages = made.subject, made.stages
    largest = len(subject.atoms.ops)
    if stages is not None and stages > max(1, largest) and not options.cut_at:
        why = explain_dominant_op(subject.graph) or (
            f"its {len(subject.graph.ops)} ops form {largest} parts that can be separated. Ask for {largest} stages or "
            "fewer"
        )
        raise PartitionError(f"{subject.graph.source.path} cannot be cut into {stages} stages: {why}")
    return replace(made, target=with_providers(subject, made.target, say)).where_ops_may_fall_back()


def partitioner_for(
    subject: Subject, options: CutOptions, devices: Callable[[Subject], tuple[int | None, Target]], say: Say
) -> ModelPartitioner:
    """Prepare to partition a model for known devices: apply the constraints in the options.

    Args:
        subject: the model.
        options: the options of the cut.
        devices: returns the exact number of stages (None for any number) and the devices, for the model with its ops
            tied together.
        say: called with the progress of the search.

    Raises:
        PartitionError: the options do not fit the model.
    """
    subject = subject.tied(_ties(subject, options))
    subject = replace(subject, borders=border_forms(subject, options.border, options.tolerance or DEFAULT_TOLERANCE))
    stages, target = devices(subject)
    target = replace(target, placed=_placed(subject, options.place, target), apart=_apart(subject, options.also_cut))
    return ModelPartitioner(subject, target, stages, options, say)


def _devices(subject: Subject, options: CutOptions, cluster: Cluster | None) -> tuple[int | None, Target]:
    """The exact number of stages (None for any number), and the target with its devices."""
    atoms = len(subject.atoms.ops)
    objective, limit = options.objective, options.max_memory
    if cluster is not None:
        target = of_cluster(cluster, max_memory_bytes=limit, objective=objective)
        return (1 if options.parallel == "data" else options.stages), target  # type: ignore[return-value]
    if options.cut_at:
        count = max(assignment_at(subject, options.cut_at), default=-1) + 1
    elif options.stages == "auto":
        try:
            count = fewest_stages(subject.problem(subject.costs.time_ns, alike(1, max_memory_bytes=limit)))
        except Infeasible:
            raise PartitionError(_too_little_memory(subject, limit or 0)) from None
    elif options.parallel == "model" and options.stages is not None:
        count = int(options.stages)
    else:
        count = options.devices or gpu_count() or 2
        if options.parallel == "model":
            groups = set(task_groups(subject, options.tasks)) if options.strategy == "task" else ()
            count = options.devices or min(max(count, len(groups)), atoms)
    stages = {"model": count, "data": 1, "hybrid": options.stages}[options.parallel] if atoms else 0
    providers = providers_by_stage(options.provider, max(1, count))
    target = alike(
        max(1, count),
        providers=providers,
        threads=threads_per_node(count),
        max_memory_bytes=limit,
        objective=objective,
    )
    target = replace(target, ordered=options.parallel == "model" and len(set(providers)) > 1)
    return stages, target  # type: ignore[return-value]


def task_groups(subject: Subject, tasks: Sequence[Sequence[str]]) -> list[int]:
    """The task of each atom: 0 for the backbone, which several tasks need, else the number of its only task, from 1.

    Args:
        subject: the model.
        tasks: groups of outputs, one for each task; every other output is a task of its own.

    Raises:
        PartitionError: a name is not an output, or an output is in two groups.
    """
    outputs = [name for name in subject.graph.outputs if name in subject.graph.producer]
    groups = [list(group) for group in tasks]
    named = [name for group in groups for name in group]
    for name in named:
        if name not in outputs:
            raise PartitionError(
                f"--task: {name!r} is not an output that an op computes; outputs: {', '.join(outputs)}"
            )
        if named.count(name) > 1:
            raise PartitionError(f"--task: the output {name!r} is in more than one group")
    groups += [[name] for name in outputs if name not in named]
    atom_of = {op: atom for atom, ops in enumerate(subject.atoms.ops) for op in ops}
    needed: list[set[int]] = [set() for _ in subject.atoms.ops]
    for number, group in enumerate(groups, 1):
        pending = [atom_of[subject.graph.producer[name]] for name in group]
        while pending:
            atom = pending.pop()
            if number not in needed[atom]:
                needed[atom].add(number)
                pending.extend(subject.atoms.digraph.predecessors(atom))
    return [min(tasks_of) if len(tasks_of) == 1 else 0 for tasks_of in needed]


def _ties(subject: Subject, options: CutOptions) -> list[list[int]]:
    """Groups of ops that must stay together, because of patterns or of tensors that must not be cut."""
    graph = subject.graph
    ties = [_matching(subject, pattern, "--together") for pattern in options.together]
    for name in options.no_cut:
        if name not in graph.producer:
            raise PartitionError(f"--no-cut: {name!r} is not a tensor that an op of the model's main graph writes")
        ties.append([graph.producer[name], *graph.readers.get(name, ())])
    return ties


def _placed(subject: Subject, place: Mapping[str, str], target: Target) -> dict[int, frozenset[str]]:
    """The devices that each placed op may run on."""
    names = [device.name for device in target.devices]
    placed: dict[int, frozenset[str]] = {}
    for pattern, device in place.items():
        if device not in names:
            raise PartitionError(f"--place: {device!r} is not a device of the cluster; it has {', '.join(names)}")
        for op in _matching(subject, pattern, "--place"):
            placed[op] = placed.get(op, frozenset(names)) & {device}
    return placed


def _apart(subject: Subject, tensors: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of ops that cuts at these tensors separate: the writer, and each reader that is not copied."""
    check_cuts(subject, tensors)
    graph, atoms = subject.graph, subject.atoms
    first = {op: ops[0] for ops in atoms.ops for op in ops}
    edges = {edge.tensor: edge for edge in atoms.edges}
    return tuple(
        (first[graph.producer[name]], atoms.ops[reader][0]) for name in tensors for reader in edges[name].readers
    )


def _matching(subject: Subject, pattern: str, where: str) -> list[int]:
    ops = [op.index for op in subject.graph.ops if fnmatch.fnmatchcase(op.name, pattern)]
    if not ops:
        some = ", ".join(repr(op.name) for op in subject.graph.ops[:3])
        raise PartitionError(f"{where}: no op's name matches {pattern!r}; names are like {some}")
    return ops


def _too_little_memory(subject: Subject, limit: int) -> str:
    problem = subject.problem(subject.costs.time_ns)
    alone = [
        sum(weight.size_bytes for weight in problem.weights if atom in weight.readers) for atom in range(problem.atoms)
    ]
    atom = max(range(len(alone)), key=alone.__getitem__)
    name = subject.graph.ops[subject.atoms.ops[atom][0]].name
    capped = subject.problem(subject.costs.time_ns, alike(1, max_memory_bytes=limit))
    try:
        fits = f"The fewest stages that fit are {fewest_stages(capped)}"
    except Infeasible:
        fits = (
            f"Allow more: op {name!r} alone holds {alone[atom]} bytes of weights and packed copies, besides its tensors"
        )
    return f"no cut keeps every stage within {limit} bytes. {fits}"
