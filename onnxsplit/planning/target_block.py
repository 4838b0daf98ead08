"""The target of a cut as a plan describes it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.partitioner import Parallel
from onnxsplit.plan import TYPICAL_HOST, Objective, Plan
from onnxsplit.plan_target import PlanTarget, TargetDevice, TargetLink
from onnxsplit.planning.options import CutOptions, Strategy
from onnxsplit.planning.target import Target


def described(target: Target, stages: int | None, options: CutOptions) -> PlanTarget:
    """Describe what a model is cut for.

    Args:
        target: the devices.
        stages: the exact number of stages; None for any number.
        options: the options of the cut.
    """
    cluster = target.cluster
    links = cluster.links if cluster is not None else {}
    return PlanTarget(
        devices=tuple(
            TargetDevice(
                name=device.name,
                host=device.host,
                provider=device.provider,
                threads=device.threads,
                speed=device.speed,
                memory_bytes=device.memory_bytes,
                only_ops=device.only_ops,
                not_ops=device.not_ops,
            )
            for device in target.devices
        ),
        cluster=cluster is not None,
        links=tuple(
            TargetLink(
                between=pair,
                latency_ns=link.latency_ns,
                bytes_per_s=link.bytes_per_s,
                delay_ns=link.delay_ns,
                overlapped=link.overlapped,
                compressed=link.compressed,
            )
            for pair, link in links.items()
        ),
        caller=cluster.caller if cluster is not None else None,
        cores=target.cores,
        stages=stages,
        ordered=target.ordered,
        falls_back=target.falls_back,
        cut_at=tuple(options.cut_at),
        also_cut=tuple(options.also_cut),
        no_cut=tuple(options.no_cut),
        together=tuple(options.together),
        place=dict(options.place),
        tasks=tuple(map(tuple, options.tasks)),
        search_gap=options.gap,
    )


def target_of(plan: Plan, made_for: PlanTarget, speeds: Mapping[str, float]) -> Target:
    """The target that a plan describes.

    Args:
        plan: the plan.
        made_for: its target block.
        speeds: the speed of devices relative to the one in the plan, by name.
    """
    devices = tuple(
        Device(
            name=device.name,
            host=device.host,
            provider=device.provider,
            speed=device.speed * speeds.get(device.name, 1.0),
            memory_bytes=device.memory_bytes,
            threads=device.threads,
            only_ops=device.only_ops,
            not_ops=device.not_ops,
        )
        for device in made_for.devices
    )
    links = {
        link.between: Link(
            latency_ns=link.latency_ns,
            bytes_per_s=link.bytes_per_s,
            overlapped=link.overlapped,
            delay_ns=link.delay_ns,
            compressed=link.compressed,
        )
        for link in made_for.links
    }
    return Target(
        devices,
        Cluster(devices, links, made_for.caller) if made_for.cluster else None,
        cast(Objective, plan.objective),
        ordered=made_for.ordered,
        falls_back=made_for.falls_back,
        host=plan.costs.host or TYPICAL_HOST,
        cores=made_for.cores,
    )


def options_of(plan: Plan, made_for: PlanTarget) -> CutOptions:
    """The options of the cut that a plan describes, but for those that its target holds."""
    return CutOptions(
        strategy=cast(Strategy, plan.strategy),
        parallel=cast(Parallel, plan.parallel),
        objective=cast(Objective, plan.objective),
        tasks=made_for.tasks,
        cut_at=made_for.cut_at,
        also_cut=made_for.also_cut,
        no_cut=made_for.no_cut,
        together=made_for.together,
        place=made_for.place,
        gap=made_for.search_gap,
        border=plan.borders.asked if plan.borders is not None else "float32",
        tolerance=plan.borders.tolerance if plan.borders is not None else None,
    )
