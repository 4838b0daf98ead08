"""Ways to run a model on this host or on a cluster: their plans, each cut once, and what they should give."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec.structs

from onnxsplit.cluster import LOCAL, Cluster
from onnxsplit.cluster_files import load_cluster
from onnxsplit.effort import EffortName
from onnxsplit.errors import InputError, PartitionError, ProviderError
from onnxsplit.files import new_folder
from onnxsplit.host_costs import host_costs
from onnxsplit.plan import Plan, Stage
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.candidates import (
    Candidate,
    Choice,
    RequestCost,
    Wishes,
    bottleneck_of,
    predict,
    some_counts,
    some_threads,
)
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import dry_run, examine_for, write_plan
from onnxsplit.planning.run_times import RunTimes, time_runs
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say, silent
from onnxsplit.providers import gpu_count, provider_here, providers_by_stage, threads_on_cores
from onnxsplit.session import host_cores, threads_per_node
from onnxsplit.tensors import Array

BATCHES = (4, 8)
"""The numbers of requests that are tried as one run, where the batch axis is proven."""

_WORTH = 0.95  # a batch is tried if a request in it takes less than this share of its time alone


@dataclass(frozen=True, kw_only=True)
class AdviceOptions:
    """What candidates are made from.

    Attributes:
        devices: the most nodes on this host; None for its GPUs, or else its cores.
        cluster: path of a cluster file, whose devices are used instead.
        providers: execution providers of this host to try, as ``--provider`` takes them.
        effort: how much time each plan may take.
        examined: how the model is read: the attributes of :class:`~onnxsplit.planning.examine.ModelOptions`.
    """

    devices: int | None = None
    cluster: Path | None = None
    providers: Sequence[str] = ("auto",)
    effort: EffortName = "normal"
    examined: Mapping[str, Any] = field(default_factory=dict)


class Advisor:
    """Makes candidates for a model, and their plans.

    Args:
        model: the model's file.
        folder: where the plans are written.
        wishes: what is asked for.
        options: what candidates are made from.
        say: called with each step.
    """

    def __init__(self, model: Path, folder: Path, wishes: Wishes, options: AdviceOptions, say: Say = silent) -> None:
        self._model, self._folder, self._wishes, self._options, self._say = model, folder, wishes, options, say
        self._subjects: dict[object, Subject] = {}
        self._plans: dict[str, Path] = {}
        self._dry: dict[str, Plan | str] = {}
        self._cuts: dict[Candidate, CutOptions] = {}
        self._times: dict[str, RunTimes] = {}
        self._cluster: Cluster | None = load_cluster(options.cluster) if options.cluster is not None else None
        self._devices = options.devices or gpu_count() or host_cores()

    def choices(self) -> list[Choice]:
        """All candidates with their predicted figures.

        Raises:
            InputError: the model is a decoder, or has no ops.
            ProviderError: the only provider cannot be used here. One of several is left out.
            OnnxsplitError: as :func:`~onnxsplit.planning.planner.partition`.
        """
        if self._cluster is not None:
            return self._on_cluster(self._cluster)
        found: list[Choice] = []
        for provider in self._options.providers:
            alone = Candidate(kind="session", replicas=(1,), threads=1, provider=provider)
            try:
                whole = self._whole(provider)
            except ProviderError as error:
                if len(self._options.providers) == 1:
                    raise
                found.append(_left_out(alone, str(error)))
                continue
            if isinstance(whole, str):
                found.append(_left_out(alone, whole))
            else:
                found += self._whole_choices(whole, provider)
            found += self._cut_choices(provider, fits_whole=isinstance(whole, Plan))
        return found

    def plan_folder(self, candidate: Candidate) -> Path:
        """The folder of a candidate's plan, which is made if no candidate before had the same one."""
        return self._written(self._cuts[candidate])

    def keep(self, candidate: Candidate, folder: Path) -> None:
        """Copy a candidate's plan to a folder, which appears as a whole or not at all."""
        made = self.plan_folder(candidate)
        with new_folder(folder) as draft:
            shutil.copytree(made, draft, dirs_exist_ok=True)

    def inputs(self) -> Mapping[str, Array]:
        """Example inputs of a request."""
        return next(iter(self._subjects.values())).inputs

    def options_of(self, candidate: Candidate) -> CutOptions:
        """The options with which a candidate's plan is cut."""
        return self._cuts[candidate]

    def after_cut(self, choice: Choice) -> Choice:
        """A choice with the figures of its plan, whose stages were run while it was made."""
        candidate = choice.candidate
        plan = load_plan(self.plan_folder(candidate))
        if self._cluster is not None or candidate.kind in ("session", "replicas"):
            return choice
        options = self._cuts[candidate]
        candidate = msgspec.structs.replace(candidate, replicas=tuple(stage.replicas for stage in plan.stages))
        self._cuts[candidate] = options
        return self._choice(candidate, plan, measured=True)

    # Plans

    def _subject(self, options: CutOptions) -> Subject:
        """The model, examined once for each number of threads and provider."""
        count = options.devices or (options.stages if isinstance(options.stages, int) else 2)
        key = (options.cluster, options.provider, threads_per_node(count) if options.cluster is None else 0)
        if key not in self._subjects:
            subject = examine_for(self._model, options, say=self._say, **self._options.examined)
            if subject.decoding is not None:
                raise InputError(
                    f"{self._model} is a decoder, whose steps are measured in tokens per second, which advise does not "
                    f"compare yet. Cut it with 'onnxsplit partition {self._model}', and measure the plan with "
                    "'onnxsplit bench DIR --decode 8x128'; or give --decoder off to compare requests that carry caches"
                )
            if not subject.graph.ops:
                raise InputError(f"{self._model} has no ops, so there is nothing to run")
            self._subjects[key] = subject
        return self._subjects[key]

    def _written(self, options: CutOptions) -> Path:
        key = repr(options)
        if key not in self._plans:
            folder = self._folder / f"{len(self._plans)}.plan"
            self._say("cutting for a run")
            write_plan(self._subject(options), folder, options, say=self._say)
            self._plans[key] = folder
        return self._plans[key]

    def _tried(self, options: CutOptions) -> Plan | str:
        """The plan by the costs alone, or why there is none."""
        key = repr(options)
        if key not in self._dry:
            quick = replace(options, effort="quick")
            try:
                self._dry[key] = dry_run(self._subject(options), quick, say=self._say).plan
            except PartitionError as error:
                self._dry[key] = str(error)
        return self._dry[key]

    def _whole_options(self, provider: str) -> CutOptions:
        return CutOptions(parallel="data", devices=1, provider=provider, effort=self._options.effort)

    def _whole(self, provider: str) -> Plan | str:
        """The plan of the whole model in one stage, or why it cannot be used."""
        options = self._whole_options(provider)
        tried = self._tried(options)
        if isinstance(tried, str):
            return tried
        limit, needs = self._wishes.max_memory_bytes, tried.stages[0].peak_memory_bytes
        if limit is not None and needs > limit:
            return f"the whole model needs {needs} bytes, more than the {limit} of --max-memory"
        return load_plan(self._written(options))

    # Candidates of this host

    def _whole_choices(self, plan: Plan, provider: str) -> list[Choice]:
        """Sessions of the whole model, and nodes with the whole model, with all numbers of threads."""
        known, options = _known(provider), self._whole_options(provider)
        cores = host_cores() if threads_on_cores(known, 1) else 1
        rows = self._rows(plan)
        self._say("timing sessions of the whole model")
        times = self._times[known] = time_runs(
            self._subject(options), self._written(options), some_threads(1, cores), rows, copies=self._devices
        )
        batches = [1, *(b for b in rows if times.alone_ns[1, b] < _WORTH * b * times.alone_ns[1, 1])]
        candidates = [
            Candidate(kind="session", replicas=(1,), threads=t, provider=known) for t in some_threads(1, cores)
        ]
        for nodes in some_counts(self._devices):
            candidates += [
                Candidate(kind="replicas", replicas=(nodes,), threads=t, provider=known, max_batch=b)
                for t in some_threads(nodes, cores)
                for b in batches
            ]
        self._cuts.update(dict.fromkeys(candidates, options))
        return [self._choice(candidate, plan) for candidate in candidates]

    def _cut_choices(self, provider: str, *, fits_whole: bool) -> list[Choice]:
        """Pipelines of stages, and of stages with replicas."""
        limit, effort = self._wishes.max_memory_bytes, self._options.effort
        known = _known(provider)
        cores = host_cores() if threads_on_cores(known, 1) else 1
        counts = [count for count in some_counts(max(2, self._devices)) if count > 1]
        if not fits_whole and limit is not None:  # the fewest that fit may be more than the devices
            fewest = self._tried(CutOptions(stages="auto", max_memory=limit, provider=provider))
            counts += [] if isinstance(fewest, str) or len(fewest.stages) in counts else [len(fewest.stages)]
        common: dict[str, Any] = {"provider": provider, "max_memory": limit, "effort": effort}
        wanted = [CutOptions(stages=count, **common) for count in counts]
        if self._devices > 2:
            wanted.append(CutOptions(parallel="hybrid", devices=self._devices, **common))
        found, seen = [], set()
        for options in wanted:
            plan = self._tried(options)
            if isinstance(plan, str):
                count = int(options.stages or self._devices)  # never auto here
                found.append(_left_out(Candidate(kind="stages", replicas=(1,) * count, threads=1), plan))
                continue
            replicas = tuple(stage.replicas for stage in plan.stages)
            if len(replicas) == 1 or replicas in seen:  # a hybrid that is one of the others
                continue
            seen.add(replicas)
            kind = "hybrid" if max(replicas) > 1 else "stages"
            for threads in some_threads(sum(replicas), cores):
                candidate = Candidate(kind=kind, replicas=replicas, threads=threads, provider=known)  # type: ignore[arg-type]
                self._cuts[candidate] = options
                found.append(self._choice(candidate, plan))
        return found

    def _rows(self, plan: Plan) -> tuple[int, ...]:
        """The batches to try: those of a model whose requests can be joined."""
        proven = plan.batch is not None and not plan.batch.why_not
        return BATCHES if proven and all(plan.tensors[name].batch_axis is not None for name in plan.inputs) else ()

    def _choice(self, candidate: Candidate, plan: Plan, *, measured: bool = False) -> Choice:
        """A candidate of this host with its predicted figures."""
        times = self._times.get(candidate.provider, RunTimes({}, 1.0))
        cores = host_cores() if threads_on_cores(candidate.provider, 1) else 0
        base = plan.stages[0].threads
        nodes = 1 if measured else candidate.nodes  # stages are measured all at once
        factor = times.factor(candidate.threads, base, candidate.max_batch, nodes, max(1, cores))
        host = host_costs()
        whole = candidate.kind in ("session", "replicas")
        runs = [times.alone_ns.get((base, 1), _time_ns(stage)) if whole else _time_ns(stage) for stage in plan.stages]
        work = RequestCost(
            runs_ns=tuple(
                round(run_ns * factor) + transfers_ns(plan, number, host.tensor_ns, host.bytes_per_s)
                for number, run_ns in enumerate(runs)
            ),
            host=host,
            cores=cores,
        )
        bottleneck_ns, alone_ns = bottleneck_of(candidate, work)
        needs = [_memory_bytes(stage, candidate.max_batch) for stage in plan.stages]
        limit = self._wishes.max_memory_bytes
        over = limit is not None and max(needs) > limit
        return Choice(
            candidate=candidate,
            memory_bytes=max(needs),
            total_bytes=sum(size * count for size, count in zip(needs, candidate.replicas, strict=True)),
            predicted=predict(bottleneck_ns, alone_ns, min(candidate.replicas), self._wishes),
            left_out=f"it needs {max(needs)} bytes on a device, more than the {limit} of --max-memory" if over else "",
        )

    # Candidates of a cluster

    def _on_cluster(self, cluster: Cluster) -> list[Choice]:
        """The fastest device alone, all devices with the whole model each, pipelines, and stages with replicas."""
        common: dict[str, Any] = {"cluster": self._options.cluster, "effort": self._options.effort}
        common["max_memory"] = self._wishes.max_memory_bytes
        wanted = [CutOptions(parallel="data", **common)]
        wanted.append(CutOptions(**common))  # as many stages as help
        wanted += [CutOptions(stages=count, **common) for count in some_counts(len(cluster.devices))]
        wanted += [CutOptions(parallel="hybrid", **common)] if len(cluster.devices) > 2 else []
        found, seen = [], set()
        for options in wanted:
            plan = self._tried(options)
            if isinstance(plan, str):
                whole = options.parallel == "data"
                count = len(cluster.devices) if whole else int(options.stages or 2)
                candidate = (
                    Candidate(kind="replicas", replicas=(count,), threads=1)
                    if whole
                    else Candidate(kind="stages", replicas=(1,) * count, threads=1)
                )
                found.append(_left_out(candidate, plan))
                continue
            choice = self._cluster_choice(plan, options)
            if choice.candidate not in seen:
                seen.add(choice.candidate)
                found.append(choice)
        return found

    def _cluster_choice(self, plan: Plan, options: CutOptions) -> Choice:
        replicas = tuple(stage.replicas for stage in plan.stages)
        kind = "replicas" if len(replicas) == 1 else "hybrid" if max(replicas) > 1 else "stages"
        candidate = Candidate(
            kind=kind,  # type: ignore[arg-type]
            replicas=replicas,
            threads=max(stage.threads for stage in plan.stages),
            provider=plan.stages[0].provider,
            devices=tuple(name for stage in plan.stages for name in stage.devices),
        )
        self._cuts[candidate] = options
        far = sorted({host for stage in plan.stages for host in stage.hosts if host != LOCAL})
        needs = [stage.peak_memory_bytes for stage in plan.stages]
        return Choice(
            candidate=candidate,
            memory_bytes=max(needs),
            total_bytes=sum(size * count for size, count in zip(needs, replicas, strict=True)),
            predicted=predict(plan.prediction.bottleneck_ns, plan.prediction.latency_ns, min(replicas), self._wishes),
            not_run=f"predicted only: it needs the host {', '.join(far)}" if far else "",
        )


def _known(provider: str) -> str:
    """The provider that a name stands for here, such as ``auto``."""
    return provider_here(providers_by_stage(provider, 1)[0])


def _left_out(candidate: Candidate, why: str) -> Choice:
    """A candidate that has no plan."""
    return Choice(candidate=candidate, memory_bytes=0, total_bytes=0, left_out=why)


def transfers_ns(plan: Plan, stage: int, tensor_ns: int, bytes_per_s: float) -> int:
    """The time that the tensors which a stage sends and receives take it."""
    sizes = [cut.bytes for cut in plan.cuts if cut.from_stage == stage or stage in cut.to_stages]
    return round(sum(tensor_ns + size * 1e9 / bytes_per_s for size in sizes))


def _time_ns(stage: Stage) -> int:
    return stage.measured_time_ns or stage.predicted_time_ns


def _memory_bytes(stage: Stage, rows: int) -> int:
    """Estimated memory of a stage whose runs have several requests: its tensors grow, its weights do not."""
    return stage.peak_memory_bytes + (rows - 1) * max(0, stage.peak_memory_bytes - stage.weight_bytes)
