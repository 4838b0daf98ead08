"""The target of a cut: devices and links, the objective, and constraints on where ops may run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnxsplit.cluster import LOCAL, Cluster, Device, Link
from onnxsplit.host_costs import host_costs
from onnxsplit.model.graph import Op
from onnxsplit.partitioner import NEVER, DeviceKind, Overhead
from onnxsplit.plan import HostCosts, Objective
from onnxsplit.providers import threads_on_cores
from onnxsplit.session import host_cores


@dataclass(frozen=True)
class ProviderFacts:
    """What a provider of this host does with a model.

    Attributes:
        left: the ops that it leaves to the CPU, by index.
        refused: why it does not run the model as a whole; None if it does.
        whole_ns: time of one run of the model on it, in nanoseconds; None if that was not measured.
        speed: its speed on this host, relative to the provider that costs are measured on; 1 if it is not known.
    """

    left: frozenset[int] = frozenset()
    refused: str | None = None
    whole_ns: int | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class Target:
    """What a model is cut for.

    Attributes:
        devices: the devices that stages may run on.
        cluster: the cluster with the links between the devices; None for alike devices of this host.
        objective: the value to minimise.
        placed: for each op that the user placed, by index, the names of the devices that it may run on.
        apart: pairs of ops, by index, that a required cut must separate.
        host: what requests cost on a host.
        facts: what providers of this host do with the model, by the devices' provider.
        ordered: True if stage N runs on device N, because the user named a provider for each stage.
        cores: the cores of the host that the caller is on.
        falls_back: True if a device may run ops that its provider leaves to the CPU, because no cut avoids that.
    """

    devices: tuple[Device, ...]
    cluster: Cluster | None = None
    objective: Objective = "throughput"
    placed: Mapping[int, frozenset[str]] = field(default_factory=dict)
    apart: tuple[tuple[int, int], ...] = ()
    facts: Mapping[str, ProviderFacts] = field(default_factory=dict)
    ordered: bool = False
    falls_back: bool = False
    host: HostCosts = field(default_factory=lambda: host_costs())
    cores: int = field(default_factory=lambda: host_cores())

    @property
    def reference(self) -> Device:
        """A device of speed 1, which costs are measured on; the first if there is none."""
        return next((device for device in self.devices if device.speed == 1), self.devices[0])

    @property
    def link(self) -> Link:
        """The link between two devices of one host."""
        host = self.host
        return Link(latency_ns=host.tensor_ns, bytes_per_s=int(host.bytes_per_s), delay_ns=host.hop_ns)

    @cached_property
    def overhead(self) -> Overhead:
        """What a request costs beside its runs and tensors. The cores are known only if the caller is on this host.

        A device of this host that is slower than the reference gets a smaller share of a core, by a quota or beside
        other work. So its threads count as fewer.
        """
        caller = self.cluster.caller_host if self.cluster is not None else LOCAL
        return Overhead(
            node_ns=self.host.node_ns,
            caller_ns=self.host.caller_ns,
            threads=tuple(
                threads_on_cores(device.provider, device.threads) * min(1.0, device.speed)
                if caller == LOCAL == device.host
                else 0.0
                for device in self.devices
            ),
            cores=self.cores,
        )

    def left(self, device: Device) -> frozenset[int]:
        """The ops that a device's provider leaves to the CPU, by index, if it is on this host."""
        return self.facts.get(device.provider, ProviderFacts()).left

    def speed_here(self, provider: str) -> float:
        """The speed of a provider on this host, relative to the provider that costs are measured on."""
        return self.facts.get(provider, ProviderFacts()).speed

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """The kind of every device, as a number; devices that are alike have the same kind."""
        numbers: dict[object, int] = {}
        return tuple(numbers.setdefault(self._kind_key(device), len(numbers)) for device in self.devices)

    def kinds(self, ops: Sequence[Op], atoms: Sequence[Sequence[int]], times: Sequence[int]) -> tuple[DeviceKind, ...]:
        """The kinds of devices, each with the time of every atom.

        Args:
            ops: the ops by index.
            atoms: the ops of every atom, by index.
            times: time of every atom on a device of speed 1, in nanoseconds.
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
        """Whether some device keeps packed copies of weights, as ONNX Runtime does on a CPU."""
        return any(device.provider == "cpu" for device in self.devices)

    @cached_property
    def links(self) -> dict[tuple[int, int], Link]:
        """The links by pair of devices, the lower number first; empty if all are the default link."""
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
        """The caller's link by device; empty if the cluster does not say where the caller is."""
        if self.cluster is None or self.cluster.caller is None:
            return {}
        return {number: self.cluster.caller_link(device) for number, device in enumerate(self.devices)}

    def _may_run(self, device: Device, op: Op) -> bool:
        takes = self.falls_back or op.index not in self.left(device)
        return takes and device.may_run(op.op_type) and device.name in self.placed.get(op.index, {device.name})

    def _kind_key(self, device: Device) -> object:
        named = any(device.name in names for names in self.placed.values())
        left = self.left(device)
        return (device.speed, device.memory_bytes, device.only_ops, device.not_ops, left, device.name if named else "")


def alike(
    count: int,
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int = 1,
    max_memory_bytes: int | None = None,
    objective: Objective = "throughput",
) -> Target:
    """A target of alike devices on this host.

    Args:
        count: the number of devices.
        providers: the provider of each device; further devices have the last one's.
        threads: threads of a session on each device.
        max_memory_bytes: memory that a stage may need; None for no limit.
        objective: the value to minimise.
    """
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
    """A target of the devices of a cluster, each with at most ``max_memory_bytes`` of memory if that is given."""

    def smaller(limits: Iterable[int | None]) -> int | None:
        return min((limit for limit in limits if limit is not None), default=None)

    devices = tuple(replace(d, memory_bytes=smaller((d.memory_bytes, max_memory_bytes))) for d in cluster.devices)
    return Target(devices, cluster, objective)
