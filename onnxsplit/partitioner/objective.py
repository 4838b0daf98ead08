"""The problem that partitioning algorithms solve, and the score of a partition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from onnxsplit.cluster import Link
from onnxsplit.partitioner.overhead import Overhead
from onnxsplit.plan import CALLER, Objective

NEVER = 1 << 62
"""The time of an atom on a device that may not run it, in nanoseconds."""


@dataclass(frozen=True)
class Way:
    """A form in which a tensor may cross between stages: its bytes, and nanoseconds of conversion at each end."""

    size_bytes: int
    convert_ns: int = 0


@dataclass(frozen=True)
class Transfer:
    """A tensor that stages may have to send to each other.

    Attributes:
        writer: the atom that writes the tensor, or :data:`CALLER`.
        readers: the atoms that read the tensor, ascending, without the writer.
        size_bytes: the size of the tensor in the memory of a stage that writes or reads it, and on a link to or from
            the caller; also on a link between stages, unless there are ``ways``.
        to_caller: True when the tensor also goes to the caller, whichever stage its writer is in.
        ways: the forms in which it may cross between stages; the fastest one on the link counts.
    """

    writer: int
    readers: tuple[int, ...]
    size_bytes: int
    to_caller: bool = False
    ways: tuple[Way, ...] = ()

    def arrival_ns(self, link: Link) -> int:
        """Nanoseconds for which the tensor occupies each end when it goes to another stage over a link."""
        if not self.ways or self.writer == CALLER:
            return link.transfer_ns(self.size_bytes)
        return min(link.transfer_ns(way.size_bytes) + way.convert_ns for way in self.ways)

    def answer_ns(self, link: Link) -> int:
        """Nanoseconds for which the tensor occupies its stage when it goes to the caller over a link."""
        return link.transfer_ns(self.size_bytes)


@dataclass(frozen=True)
class Weight:
    """A constant: every stage that holds one of its readers holds the constant once."""

    size_bytes: int
    readers: tuple[int, ...]


@dataclass(frozen=True)
class DeviceKind:
    """A kind of devices that are all alike.

    Attributes:
        time_ns: compute time of every atom in nanoseconds; :data:`NEVER` for an atom that may not run here.
        max_memory_bytes: memory that a stage may need here; None for no limit.
        pays: False when transfers cost such a device nothing, regardless of the link.
    """

    time_ns: tuple[int, ...]
    max_memory_bytes: int | None = None
    pays: bool = True


@dataclass(frozen=True)
class Problem:
    """A graph of atoms in topological order, and the devices it is for.

    Attributes:
        kinds: the kinds of devices.
        devices: the kind of every device, as an index into ``kinds``.
        transfers: the tensors between atoms; every reader's index is greater than its writer's.
        weights: the constants.
        inner_bytes: for each atom, the bytes of the tensors that never leave it.
        link: the link between two devices, and between the caller and a device, unless another one is given.
        links: other links by their pair of devices, the lower number first.
        caller_links: other links of the caller by device.
        send_once: True when a sender pays once for a tensor, False when it pays for each stage that reads it.
        apart: pairs of atoms that must be in different stages.
        overhead: what a request costs beside its runs and tensors; None for nothing.
        objective: the value to minimise: ``throughput`` the time of the slowest stage, ``latency`` the longest path
            over the stages, ``memory`` the largest memory of a stage.
    """

    kinds: tuple[DeviceKind, ...]
    devices: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    weights: tuple[Weight, ...] = ()
    inner_bytes: tuple[int, ...] = ()
    link: Link = Link()  # noqa: RUF009 - it is frozen
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    caller_links: Mapping[int, Link] = field(default_factory=dict)
    send_once: bool = False
    apart: tuple[tuple[int, int], ...] = ()
    overhead: Overhead | None = None
    objective: Objective = "throughput"

    @cached_property
    def atoms(self) -> int:
        """The number of atoms."""
        return len(self.kinds[0].time_ns)

    @cached_property
    def cheapest_link(self) -> Link:
        """A link over which no transfer costs more than over any link between devices."""
        return _cheapest((self.link, *self.links.values()))

    @cached_property
    def cheapest_caller_link(self) -> Link:
        """A link over which no transfer costs more than over any link between the caller and a device."""
        return _cheapest(tuple(self.caller_links.get(device, self.link) for device in range(len(self.devices))))

    @cached_property
    def capped(self) -> bool:
        """Whether some device has a memory limit."""
        return any(kind.max_memory_bytes is not None for kind in self.kinds)

    def without_idle_caps(self) -> Problem:
        """The same problem without memory limits that all constants and tensors together do not exceed."""
        total = sum(weight.size_bytes for weight in self.weights) + sum(self.inner_bytes)
        total += sum(transfer.size_bytes for transfer in self.transfers)
        kinds = tuple(
            replace(kind, max_memory_bytes=None) if (kind.max_memory_bytes or 0) >= total else kind
            for kind in self.kinds
        )
        return replace(self, kinds=kinds)

    def kind_of(self, device: int) -> DeviceKind:
        """The kind of a device."""
        return self.kinds[self.devices[device]]

    def link_between(self, one: Iterable[int], other: Iterable[int]) -> Link:
        """The slowest link between one of some devices and one of others, for a tensor of 1 MiB."""
        if not self.links:
            return self.link
        pairs = {(min(a, b), max(a, b)) for a in one for b in other}
        return max((self.links.get(pair, self.link) for pair in pairs), key=lambda link: link.transfer_ns(1 << 20))

    def caller_link(self, devices: Iterable[int]) -> Link:
        """The slowest link between the caller and one of some devices, for a tensor of 1 MiB."""
        if not self.caller_links:
            return self.link
        return max((self.caller_links.get(d, self.link) for d in devices), key=lambda link: link.transfer_ns(1 << 20))


def _cheapest(links: Sequence[Link]) -> Link:
    """A link that has the best value of each property among some links."""
    return Link(
        latency_ns=min(link.latency_ns for link in links),
        bytes_per_s=max(link.bytes_per_s for link in links),
        overlapped=any(link.overlapped for link in links),
        delay_ns=min(link.delay_ns for link in links),
    )


@dataclass(frozen=True)
class Partition:
    """An assignment of atoms to stages, and of stages to devices.

    Attributes:
        stage_of: the stage of every atom; no tensor goes to a lower stage.
        devices: for each stage, the devices that run a replica of it.
    """

    stage_of: tuple[int, ...]
    devices: tuple[tuple[int, ...], ...]


class Infeasible(Exception):
    """No partition was found that keeps every limit."""


@dataclass(frozen=True)
class Score:
    """The figures of a partition. All times are for one request, in nanoseconds.

    Attributes:
        compute_ns: for each stage, compute time on its slowest replica.
        transfer_ns: for each stage, time of the tensors it sends and receives.
        stage_ns: for each stage, its time divided by its replicas: compute plus transfers, or the larger of the two
            where the link moves tensors while the device computes; and the overhead of a request. Replicas of different
            speeds share the requests so that all are busy: 1 over the sum of their rates.
        host_ns: the least time between two requests that the cores of the caller's host allow; 0 if not known.
        latency_ns: the longest path over the stages.
        memory_bytes: for each stage, the memory it needs; empty when memory is neither limited nor the objective.
        feasible: True when every limit is kept.
        objective: the objective that :attr:`value` measures.
    """

    compute_ns: tuple[int, ...]
    transfer_ns: tuple[int, ...]
    stage_ns: tuple[int, ...]
    latency_ns: int
    memory_bytes: tuple[int, ...]
    feasible: bool
    objective: Objective
    host_ns: int = 0

    @property
    def bottleneck_ns(self) -> int:
        """Time between two requests with all stages busy: that of the slowest stage, or what the cores allow."""
        return max((*self.stage_ns, self.host_ns), default=0)

    @property
    def value(self) -> int:
        """The value of the objective: nanoseconds, or bytes for ``memory``. Smaller is better."""
        match self.objective:
            case "throughput":
                return self.bottleneck_ns
            case "latency":
                return self.latency_ns
            case "memory":
                return max(self.memory_bytes, default=0)

    @property
    def rank(self) -> tuple[bool, int, int, int]:
        """The order of partitions, smaller is better: feasible ones first, then by value, bottleneck and latency."""
        return (not self.feasible, self.value, self.bottleneck_ns, self.latency_ns)


def score(problem: Problem, partition: Partition) -> Score:
    """Score a partition. Takes time linear in the graph.

    Every stage that reads a tensor receives it once. Sender and receiver both pay for the transfer, unless their kind
    of device does not pay.
    """
    stage_of = partition.stage_of
    stages = len(partition.devices)
    kinds = [problem.kind_of(devices[0]) for devices in partition.devices]
    slowest = [_slowest(problem, devices) for devices in partition.devices]
    compute, blocking, overlapped = [0] * stages, [0] * stages, [0] * stages
    for atom, stage in enumerate(stage_of):
        compute[stage] += slowest[stage][atom]

    def charge(stage: int, link: Link, time_ns: int) -> None:
        if kinds[stage].pays:
            (overlapped if link.overlapped else blocking)[stage] += time_ns

    sources: list[dict[int, int]] = [{} for _ in range(stages)]  # for each stage: the delay from each sender
    entering, leaving = [0] * stages, [0] * stages  # delays from and to the caller
    callers = [problem.caller_link(devices) for devices in partition.devices]
    for transfer in problem.transfers:
        sender = None if transfer.writer == CALLER else stage_of[transfer.writer]
        sent: list[tuple[Link, int]] = []
        for stage in sorted({stage_of[reader] for reader in transfer.readers} - {sender}):
            if sender is None:
                charge(stage, callers[stage], transfer.arrival_ns(callers[stage]))
                entering[stage] = callers[stage].delay_ns
            else:
                link = problem.link_between(partition.devices[sender], partition.devices[stage])
                sent.append((link, transfer.arrival_ns(link)))
                charge(stage, *sent[-1])
                sources[stage][sender] = link.delay_ns
        if sender is not None:
            if transfer.to_caller:
                sent.append((callers[sender], transfer.answer_ns(callers[sender])))
                leaving[sender] = callers[sender].delay_ns
            if problem.send_once:
                sent = [max(sent, key=lambda one: one[1])] if sent else []
            for link, time_ns in sent:
                charge(sender, link, time_ns)

    node_ns = problem.overhead.node_ns if problem.overhead is not None else 0
    total = [max(c + b, o) + node_ns for c, b, o in zip(compute, blocking, overlapped, strict=True)]
    path = [c + b + o + node_ns for c, b, o in zip(compute, blocking, overlapped, strict=True)]
    memory = stage_memory(problem, stage_of, stages) if problem.capped or problem.objective == "memory" else ()
    besides = [(b + node_ns, o + node_ns) for b, o in zip(blocking, overlapped, strict=True)]
    stage_ns = tuple(_stage_ns(problem, partition, stage, total[stage], *besides[stage]) for stage in range(stages))
    return Score(
        compute_ns=tuple(compute),
        transfer_ns=tuple(b + o for b, o in zip(blocking, overlapped, strict=True)),
        stage_ns=stage_ns,
        host_ns=problem.overhead.host_ns(stage_ns, partition.devices) if problem.overhead and stages else 0,
        latency_ns=_latency_ns(path, sources, entering, leaving),
        memory_bytes=memory,
        feasible=_feasible(problem, partition, compute, memory),
        objective=problem.objective,
    )


def _latency_ns(
    path_ns: Sequence[int], sources: Sequence[Mapping[int, int]], entering: Sequence[int], leaving: Sequence[int]
) -> int:
    """The longest path over the stages, in nanoseconds.

    Args:
        path_ns: for each stage, its time.
        sources: for each stage, the delay from each stage that sends to it.
        entering: for each stage, the delay from the caller.
        leaving: for each stage, the delay to the caller.
    """
    done = [0] * len(path_ns)
    for stage, time_ns in enumerate(path_ns):
        starts = [done[source] + delay_ns for source, delay_ns in sources[stage].items()]
        done[stage] = max(*starts, entering[stage], 0) + time_ns
    return max((time_ns + delay_ns for time_ns, delay_ns in zip(done, leaving, strict=True)), default=0)


def _slowest(problem: Problem, devices: tuple[int, ...]) -> Sequence[int]:
    """The largest time of each atom over the devices of a stage."""
    rows = {problem.devices[device]: problem.kind_of(device).time_ns for device in devices}
    return next(iter(rows.values())) if len(rows) == 1 else [max(column) for column in zip(*rows.values(), strict=True)]


def _stage_ns(
    problem: Problem, partition: Partition, stage: int, total_ns: int, blocking_ns: int, overlapped_ns: int
) -> int:
    """The time between two requests of a stage whose replicas are all busy, in nanoseconds.

    Args:
        problem: the problem.
        partition: the partition.
        stage: the stage.
        total_ns: the time of a request on the slowest replica.
        blocking_ns: time that a replica spends on a request besides the computation.
        overlapped_ns: time that a request takes at least, whatever it computes.
    """
    kinds = [problem.devices[device] for device in partition.devices[stage]]
    if len(set(kinds)) == 1:
        return -(-total_ns // len(kinds))
    atoms = [atom for atom, home in enumerate(partition.stage_of) if home == stage]
    compute = {kind: sum(problem.kinds[kind].time_ns[atom] for atom in atoms) for kind in set(kinds)}
    times = [max(compute[kind] + blocking_ns, overlapped_ns, 1) for kind in kinds]
    return math.ceil(1 / sum(1 / time_ns for time_ns in times))


def _feasible(problem: Problem, partition: Partition, compute: Sequence[int], memory: Sequence[int]) -> bool:
    caps = [
        min((c for d in devices if (c := problem.kind_of(d).max_memory_bytes) is not None), default=None)
        for devices in partition.devices
    ]
    return (
        all(time_ns < NEVER for time_ns in compute)
        and all(cap is None or need <= cap for cap, need in zip(caps, memory, strict=False))
        and all(partition.stage_of[one] != partition.stage_of[other] for one, other in problem.apart)
    )


def stage_memory(problem: Problem, stage_of: Sequence[int], stages: int) -> tuple[int, ...]:
    """The bytes that each stage needs: its constants, and the largest sum of live tensors while its atoms run in order.

    A tensor is live from its writer (or from the stage's start if another stage writes it) to its last reader in the
    stage (or to the stage's end if it leaves the stage). Linear in the graph.
    """
    held = [0] * stages
    for weight in problem.weights:
        for stage in {stage_of[reader] for reader in weight.readers}:
            held[stage] += weight.size_bytes
    # Atoms of a stage run in order of their numbers: changes of the live sum before (+) and after (-) each.
    begins, ends = [0] * problem.atoms, [0] * problem.atoms
    start = [0] * stages
    last: dict[int, int] = {}
    for transfer in problem.transfers:
        home = None if transfer.writer == CALLER else stage_of[transfer.writer]
        last.clear()
        for reader in transfer.readers:
            last[stage_of[reader]] = reader
        for stage, reader in last.items():
            if stage != home:
                start[stage] += transfer.size_bytes
                ends[reader] += transfer.size_bytes
        if home is not None:
            begins[transfer.writer] += transfer.size_bytes
            if not transfer.to_caller and set(last) <= {home}:
                ends[last.get(home, transfer.writer)] += transfer.size_bytes
    alive, peak = list(start), list(start)
    inner = problem.inner_bytes or (0,) * problem.atoms
    for atom, stage in enumerate(stage_of):
        alive[stage] += begins[atom]
        peak[stage] = max(peak[stage], alive[stage] + inner[atom])
        alive[stage] -= ends[atom]
    return tuple(h + p for h, p in zip(held, peak, strict=True))
