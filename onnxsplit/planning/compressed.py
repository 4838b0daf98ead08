"""The int8 borders that cross compressed, by the links of a cluster."""

from __future__ import annotations

import msgspec

from onnxsplit.cluster import Cluster, Device
from onnxsplit.plan import Plan
from onnxsplit.plan_borders import Border


def with_compression(plan: Plan, cluster: Cluster | None) -> Plan:
    """The same plan, where each ``int8`` border names the stages to which it goes compressed.

    These are the stages with a device on another host than the writer's, over a link that the cluster file marks
    ``compressed``.

    Args:
        plan: the plan.
        cluster: the cluster that it is for; None for this host alone.
    """
    if plan.borders is None:
        return plan
    named = {device.name: device for device in cluster.devices} if cluster is not None else {}
    devices = [[named[name] for name in stage.devices if name in named] for stage in plan.stages]

    def is_slow(one: Device, other: Device) -> bool:
        return cluster is not None and one.host != other.host and cluster.link(one, other).compressed

    def marked(border: Border) -> Border:
        writer = plan.producers()[border.tensor]
        stages = [
            stage.index
            for stage in plan.stages
            if border.form == "int8"
            and border.wire[0] in stage.inputs
            and any(is_slow(one, other) for one in devices[writer] for other in devices[stage.index])
        ]
        return msgspec.structs.replace(border, compressed=tuple(stages))

    borders = msgspec.structs.replace(plan.borders, tensors=tuple(map(marked, plan.borders.tensors)))
    return msgspec.structs.replace(plan, borders=borders)
