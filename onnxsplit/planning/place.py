"""Placing a plan on other devices than it was made for. The stages stay as they are.

Each stage is one atom of the problem; search and score are the same as when a model is cut.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec.structs

from onnxsplit.cluster import Cluster, Device
from onnxsplit.cluster_files import load_cluster
from onnxsplit.errors import PartitionError, PlanError
from onnxsplit.files import check_parent, new_folder, replacing
from onnxsplit.model.graph import build_graph
from onnxsplit.model.source import open_model
from onnxsplit.partitioner import (
    NEVER,
    DeviceKind,
    Infeasible,
    Parallel,
    Problem,
    Transfer,
    Weight,
    line_up,
    search,
)
from onnxsplit.plan import CALLER, PLAN_FILE, Objective, Plan, Stage
from onnxsplit.plan_files import checked_json, load_plan
from onnxsplit.plan_target import PlanTarget
from onnxsplit.planning.compressed import with_compression
from onnxsplit.planning.prediction import prediction
from onnxsplit.planning.target import of_cluster
from onnxsplit.planning.target_block import described, options_of
from onnxsplit.planning.verdict import tensor_bytes, verdict


def place(
    plan: str | Path, cluster: str | Path, *, out: str | Path | None = None, parallel: Parallel = "model"
) -> Plan:
    """Give the stages of a plan devices of a cluster.

    Args:
        plan: the plan directory.
        cluster: the cluster file.
        out: the directory to write the resulting plan and its files to; None replaces the old ``plan.json``.
        parallel: ``model``: one device for each stage; ``hybrid``: devices that are left run replicas.

    Returns:
        The plan that results.

    Raises:
        PlanError: the directory holds no usable plan, or ``out`` exists and is not an empty folder.
        ClusterError: the cluster file is not usable.
        PartitionError: the cluster has too few devices, or too little memory.
    """
    folder, target_cluster = Path(plan), load_cluster(cluster)
    before = load_plan(folder)
    result = placed(before, target_cluster, parallel, ops=_ops(before, folder, target_cluster))
    destination = folder if out is None else Path(out)
    if destination.resolve() == folder.resolve():
        with replacing(destination / PLAN_FILE) as temporary:
            temporary.write_bytes(checked_json(result))
        return result
    if destination.is_symlink() or (destination.exists() and (not destination.is_dir() or any(destination.iterdir()))):
        raise PlanError(f"{destination} already exists; nothing was touched. Choose another place with -o DIR")
    check_parent(destination)
    with new_folder(destination) as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
        (made / PLAN_FILE).write_bytes(checked_json(result))
    return result


def _ops(plan: Plan, folder: Path, cluster: Cluster) -> Sequence[Set[str]]:
    """The op types of each stage, if a device of the cluster may not run all op types; else empty."""
    if not any(device.only_ops or device.not_ops for device in cluster.devices):
        return ()
    op_types = []
    for stage in plan.stages:
        graph = build_graph(open_model(folder / stage.file))
        op_types.append({op.op_type for op in graph.ops})
    return op_types


def placed(plan: Plan, cluster: Cluster, parallel: Parallel = "model", *, ops: Sequence[Set[str]] = ()) -> Plan:
    """The same plan on the devices of a cluster.

    Args:
        plan: the plan.
        cluster: the cluster.
        parallel: as for :func:`place`.
        ops: op types of each stage; empty if every device may run all.

    Raises:
        PartitionError: the cluster has too few devices, or too little memory.
    """
    stages, devices = len(plan.stages), cluster.devices
    if stages > len(devices):
        raise PartitionError(
            f"the plan has {stages} stages and the cluster {len(devices)} devices; add devices, or cut the model again"
        )
    problem = _problem(plan, cluster, ops)
    try:
        result = search(problem, line_up(problem, stages, parallel))
    except Infeasible:
        needs = ", ".join(f"{stage.peak_memory_bytes >> 20} MiB" for stage in plan.stages)
        raise PartitionError(
            f"no placement of the stages, which need {needs}, fits the devices' memory and the ops they may run"
        ) from None
    numbers_of = result.partition.devices
    homes = [tuple(devices[number] for number in numbers) for numbers in numbers_of]
    everything = math.ceil(sum(map(reference_ns, plan.stages)) / sum(device.speed for device in devices))
    placed = msgspec.structs.replace(
        plan,
        parallel=parallel,
        stages=tuple(
            _moved(stage, homes[stage.index], numbers_of[stage.index], result.score.compute_ns[stage.index])
            for stage in plan.stages
        ),
        prediction=prediction(result.score, result.bound, min(result.bound, everything)),
        target=_target(plan, cluster),
    )
    placed = msgspec.structs.replace(placed, verdict=verdict(placed, None, of_cluster(cluster)))
    return with_compression(placed, cluster)


def reference_ns(stage: Stage) -> int:
    """Time of a stage on a device of speed 1, in nanoseconds."""
    if stage.reference_time_ns is not None:
        return stage.reference_time_ns
    return stage.measured_time_ns or stage.predicted_time_ns


def _problem(plan: Plan, cluster: Cluster, ops: Sequence[Set[str]]) -> Problem:
    target = of_cluster(cluster, objective=cast(Objective, plan.objective))
    numbers = target.kind_of
    first = {kind: cluster.devices[device] for device, kind in reversed(list(enumerate(numbers)))}
    times = [reference_ns(stage) for stage in plan.stages]

    def time_ns(stage: int, device: Device) -> int:
        able = not ops or all(map(device.may_run, ops[stage]))
        return round(times[stage] / device.speed) if able else NEVER

    return Problem(
        kinds=tuple(
            DeviceKind(tuple(time_ns(stage, first[kind]) for stage in range(len(times))), first[kind].memory_bytes)
            for kind in range(len(first))
        ),
        devices=numbers,
        transfers=tuple(_transfers(plan)),
        weights=tuple(Weight(stage.peak_memory_bytes, (stage.index,)) for stage in plan.stages),
        inner_bytes=(0,) * len(plan.stages),
        link=target.link,
        links=target.links,
        caller_links=target.caller_links,
        overhead=target.overhead,
        objective=target.objective,
    )


def _transfers(plan: Plan) -> Iterator[Transfer]:
    crossing = set()
    for cut in plan.cuts:
        crossing.add(cut.tensor)
        yield Transfer(cut.from_stage, cut.to_stages, cut.bytes, cut.tensor in plan.outputs)
    for name in plan.inputs:
        readers = tuple(stage.index for stage in plan.stages if name in stage.inputs)
        if readers:
            yield Transfer(CALLER, readers, tensor_bytes(plan, name))
    for name, stage in plan.producers().items():
        if name in plan.outputs and name not in crossing:
            yield Transfer(stage, (), tensor_bytes(plan, name), to_caller=True)


def _target(plan: Plan, cluster: Cluster) -> PlanTarget | None:
    """What the plan is for on the cluster; ops that the user placed may go to any of its devices."""
    if plan.target is None:
        return None
    options = replace(options_of(plan, plan.target), place={})
    return described(of_cluster(cluster), plan.target.stages, options)


def _moved(stage: Stage, homes: tuple[Device, ...], numbers: tuple[int, ...], time_ns: int) -> Stage:
    return msgspec.structs.replace(
        stage,
        provider=homes[0].provider,
        threads=homes[0].threads,
        predicted_time_ns=time_ns,
        measured_time_ns=None,
        reference_time_ns=reference_ns(stage),
        replicas=len(homes),
        device=homes[0].name,
        devices=tuple(device.name for device in homes),
        hosts=tuple(device.host for device in homes),
        device_numbers=numbers,
    )
