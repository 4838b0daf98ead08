"""What a plan was made for: devices, links and constraints. With the costs, it is enough to plan anew."""

from __future__ import annotations

from typing import Annotated

import msgspec

from onnxsplit.numbers import MOST_BYTES
from onnxsplit.plan_base import MOST_NODES, Count, PlanStruct, Rate, Threads

DeviceNumber = Annotated[int, msgspec.Meta(ge=0, lt=MOST_NODES)]
"""The position of a device among those that a plan was made for."""

_Speed = Annotated[float, msgspec.Meta(ge=1e-18, le=1e18)]
_BytesPerS = Annotated[int, msgspec.Meta(ge=1, le=10**18)]
_Memory = Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]


class TargetDevice(PlanStruct, frozen=True, kw_only=True, omit_defaults=True):
    """A device that the plan was made for, whether a stage is on it or not.

    Attributes:
        name: its name in the cluster; its number as text if there is no cluster.
        host: its host.
        provider: its execution provider.
        threads: threads of a stage's session.
        speed: its speed relative to the device that the costs hold for.
        memory_bytes: memory that a stage may need on it; None for no limit.
        only_ops: op types that it may run; empty for all.
        not_ops: op types that it may not run.
    """

    name: str
    host: str = "local"
    provider: str = "cpu"
    threads: Threads = 1
    speed: _Speed = 1.0
    memory_bytes: _Memory | None = None
    only_ops: tuple[str, ...] = ()
    not_ops: tuple[str, ...] = ()


class TargetLink(PlanStruct, frozen=True, kw_only=True, omit_defaults=True):
    """A link of the cluster.

    Attributes:
        between: the two hosts or devices that it joins, in order of name.
        latency_ns: time that a tensor of any size occupies both devices, in nanoseconds.
        bytes_per_s: bandwidth in bytes per second.
        delay_ns: further nanoseconds until a tensor arrives.
        overlapped: whether tensors move while the devices compute.
        compressed: whether int8 borders cross compressed.
    """

    between: tuple[str, str]
    latency_ns: Count
    bytes_per_s: _BytesPerS
    delay_ns: Count = 0
    overlapped: bool = False
    compressed: bool = False


class PlanTarget(PlanStruct, frozen=True, kw_only=True, omit_defaults=True):
    """What a plan was made for, and the constraints of the cut.

    Attributes:
        devices: the devices, also those without a stage. Their speeds are those of the time when the plan was made.
        cluster: whether they are a cluster; else they are devices of one host.
        links: the links of the cluster that are not the default.
        caller: the host or device that requests come from; None if it is not known.
        cores: the cores of the host that made the plan.
        stages: the exact number of stages; None for any number.
        ordered: whether stage N runs on device N.
        falls_back: whether devices may run ops that their provider leaves to the CPU.
        cut_at: the tensors that the user named as the only ones to cut at.
        also_cut: tensors that must be cut.
        no_cut: tensors that must not be cut.
        together: patterns of op names; all ops that match one pattern are in one stage.
        place: a device by pattern of op names; matching ops run on that device only.
        tasks: groups of outputs, for the strategy ``task``.
        search_gap: the search may stop when the cut is proven to be within this share of the best one.
    """

    devices: Annotated[tuple[TargetDevice, ...], msgspec.Meta(min_length=1, max_length=MOST_NODES)]
    cluster: bool = False
    links: tuple[TargetLink, ...] = ()
    caller: str | None = None
    cores: Threads = 1
    stages: Annotated[int, msgspec.Meta(ge=0, le=MOST_NODES)] | None = None
    ordered: bool = False
    falls_back: bool = False
    cut_at: tuple[str, ...] = ()
    also_cut: tuple[str, ...] = ()
    no_cut: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    place: dict[str, str] = msgspec.field(default_factory=dict)
    tasks: tuple[tuple[str, ...], ...] = ()
    search_gap: Rate = 0.0
