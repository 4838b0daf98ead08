"""What a cut is made for: the devices and links, the objective, and what must hold whatever it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnxsplit.cluster import Cluster, Device, Link
from onnxsplit.model.graph import Op
from onnxsplit.partitioner import NEVER, DeviceKind
from onnxsplit.plan import Objective


@dataclass(frozen=True)
class Target:
    """Devices and wishes, for every cut of a model.

    Attributes:
        devices: what stages may run on.
        cluster: links between them; None for alike devices of one host.
        objective: what is to be small.
        placed: op -> names of the devices it may run on, for ops that the user placed.
        apart: pairs of ops, by index, that a wanted cut must part.
    """

    devices: tuple[Device, ...]
    cluster: Cluster | None = None
    objective: Objective = "throughput"
    placed: Mapping[int, frozenset[str]] = field(default_factory=dict)
    apart: tuple[tuple[int, int], ...] = ()

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """The kind of every device: alike devices share one."""
        numbers: dict[object, int] = {}
        return tuple(numbers.setdefault(self._nature(device), len(numbers)) for device in self.devices)

    def kinds(self, ops: Sequence[Op], atoms: Sequence[Sequence[int]], times: Sequence[int]) -> tuple[DeviceKind, ...]:
        """Each kind, with what every atom takes there.

        Args:
            ops: ops by index.
            atoms: the ops of every atom.
            times: of every atom on a device of speed 1.
        """
        first = dict(reversed(list(zip(self.kind_of, self.devices, strict=True))))
        return tuple(
            DeviceKind(
                tuple(
                    round(time_ns / device.speed) if all(self._may_run(device, ops[op]) for op in atom) else NEVER
                    for atom, time_ns in zip(atoms, times, strict=True)
                ),
                device.memory_bytes,
            )
            for device in (first[kind] for kind in range(len(first)))
        )

    @property
    def packs(self) -> bool:
        """Whether a device keeps packed copies of weights, as ONNX Runtime does on a CPU."""
        return any(device.provider == "cpu" for device in self.devices)

    @cached_property
    def links(self) -> dict[tuple[int, int], Link]:
        """Links by pair of devices, where a cluster says so."""
        if self.cluster is None:
            return {}
        links = {
            (a, b): self.cluster.link(self.devices[a], self.devices[b])
            for b in range(len(self.devices))
            for a in range(b)
        }
        return links if any(link != Link() for link in links.values()) else {}

    @cached_property
    def caller_links(self) -> dict[int, Link]:
        """The caller's link by device, where a cluster says where the caller is."""
        if self.cluster is None or self.cluster.caller is None:
            return {}
        return {number: self.cluster.caller_link(device) for number, device in enumerate(self.devices)}

    def _may_run(self, device: Device, op: Op) -> bool:
        return device.may_run(op.op_type) and device.name in self.placed.get(op.index, {device.name})

    def _nature(self, device: Device) -> object:
        named = any(device.name in names for names in self.placed.values())
        return (device.speed, device.memory_bytes, device.only_ops, device.not_ops, device.name if named else None)


def alike(
    count: int,
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int = 1,
    max_memory_bytes: int | None = None,
    objective: Objective = "throughput",
) -> Target:
    """So many devices of one host that are all alike; each with its provider, the last one's where there are fewer."""
    devices = tuple(
        Device(
            name=f"{number}",
            provider=providers[min(number, len(providers) - 1)],
            threads=threads,
            memory_bytes=max_memory_bytes,
        )
        for number in range(count)
    )
    return Target(devices, objective=objective)


def of_cluster(cluster: Cluster, *, max_memory_bytes: int | None = None, objective: Objective = "throughput") -> Target:
    """The devices of a cluster, none with more memory than that."""

    def smaller(limits: Iterable[int | None]) -> int | None:
        return min((limit for limit in limits if limit is not None), default=None)

    devices = tuple(replace(d, memory_bytes=smaller((d.memory_bytes, max_memory_bytes))) for d in cluster.devices)
    return Target(devices, cluster, objective)
