"""Clusters of the available hosts: the devices of this host, and measured speeds of devices."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from onnxsplit.cluster import LOCAL, Cluster, Device
from onnxsplit.cost.assignment import ask_provider
from onnxsplit.custom_ops import Library
from onnxsplit.errors import ClusterError, OnnxsplitError
from onnxsplit.model.external_data import is_external, location_of
from onnxsplit.model.in_memory import runnable
from onnxsplit.model.protobuf import graph_tensors
from onnxsplit.model.source import open_model
from onnxsplit.npz import save_npz
from onnxsplit.planning.examine import examine
from onnxsplit.planning.providers import types_left
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say, silent
from onnxsplit.providers import CPU, gpu_count, parse_provider, provider_here
from onnxsplit.session import host_cores
from onnxsplit.timed import typical_ns

_CPU_DEVICES = 2


def this_host() -> Cluster:
    """A cluster of this host: a device for each GPU; without a GPU, two devices that share the cores."""
    gpus = tuple(Device(name=f"gpu{number}", provider=f"cuda:{number}") for number in range(gpu_count()))
    threads = max(1, host_cores() // _CPU_DEVICES)
    cpus = tuple(Device(name=f"cpu{number}", threads=threads) for number in range(_CPU_DEVICES))
    return Cluster(gpus or cpus, {})


class RemoteTimer(Protocol):
    """Times models on other hosts."""

    def send(self, files: Sequence[Path], say: Say) -> None:
        """Send files to all hosts."""
        ...

    def time_ns(self, model: Path, inputs: Path, device: Device) -> int | None:
        """Time of one run of a model on a device of another host, in nanoseconds; None when it cannot run there."""
        ...


def measured(
    cluster: Cluster,
    model: str | Path,
    *,
    dims: Mapping[str, int] | None = None,
    hosts: Collection[str] = (),
    elsewhere: RemoteTimer | None = None,
    custom_ops: object = (),
    say: Say = silent,
    note: Say = silent,
) -> Cluster:
    """Measure the speeds of a cluster's devices on a model, relative to the first device that runs it.

    A device keeps its speed if its host is neither this host nor one of ``hosts``, if its host lacks its provider, or
    if the model does not run on it. The op types of the model that a device of this host leaves to the CPU join its
    ``not_ops``.

    Args:
        cluster: the cluster.
        model: the path of the model's file.
        dims: sizes of free dimensions.
        hosts: other hosts whose devices are measured, through ``elsewhere``.
        elsewhere: times models on these hosts.
        custom_ops: libraries of custom ops for the devices of this host; agents have their own.
        say: called with each step.
        note: called with a message about each device of this host or of ``hosts`` that keeps its speed.

    Raises:
        ClusterError: no device could run the model, or the model cannot be sent to other hosts.
    """
    subject = examine(model, costs="analytic", dims=dims, custom_ops=custom_ops, say=say)
    model = Path(model)
    times: dict[tuple[str, str, int], int | None] = {}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        inputs = Path(folder) / "onnxsplit-inputs.npz"
        save_npz(inputs, subject.inputs)
        if elsewhere is not None:
            elsewhere.send([*_files(model), inputs], say)
        for device in cluster.devices:
            key = (device.host, device.provider, device.threads)
            if key in times:
                continue
            if device.host in hosts and elsewhere is not None:
                say(f"timing the model on {device.name}")
                times[key] = elsewhere.time_ns(model, inputs, device)
            elif device.host == LOCAL and provider_here(device.provider) == device.provider:
                say(f"timing the model on {device.name}")
                times[key] = _time_ns(model, inputs, device, subject.custom_ops)
    times_ns = [times.get((device.host, device.provider, device.threads)) for device in cluster.devices]
    for device, time_ns in zip(cluster.devices, times_ns, strict=True):
        if any(times_ns) and not time_ns and (device.host in hosts or device.host == LOCAL):
            note(f"{device.name} keeps its speed of {device.speed:g}: {model} did not run there")
    return _with_ops(_with_speeds(cluster, model, times_ns), subject, say)


def _left(subject: Subject, device: Device, say: Say) -> tuple[str, ...]:
    """The op types of a model that the provider of a device of this host leaves to the CPU."""
    if parse_provider(device.provider).name == CPU:
        return ()
    say(f"asking {device.provider} which ops it takes")
    with runnable(subject.graph.source, as_in_stages=True) as file:
        found = ask_provider(
            file,
            device.provider,
            threads=device.threads,
            custom_ops=subject.custom_ops,
            tensors=subject.shapes.specs,
        )
    return types_left(subject, found.left)


def _with_ops(cluster: Cluster, subject: Subject, say: Say) -> Cluster:
    """The cluster with the op types of a model that devices of this host leave to the CPU in their ``not_ops``."""
    here = [d for d in cluster.devices if d.host == LOCAL and provider_here(d.provider) == d.provider]
    left = {device.provider: _left(subject, device, say) for device in here}
    devices = tuple(
        replace(device, not_ops=tuple(dict.fromkeys((*device.not_ops, *left[device.provider]))))
        if device in here
        else device
        for device in cluster.devices
    )
    return replace(cluster, devices=devices)


def _with_speeds(cluster: Cluster, model: Path, times_ns: Sequence[int | None]) -> Cluster:
    """The cluster with speeds relative to the first time; a device without a time keeps its speed.

    Raises:
        ClusterError: there is no time.
    """
    first_ns = next((time_ns for time_ns in times_ns if time_ns), None)
    if first_ns is None:
        raise ClusterError(
            f"no device of this host (host = {LOCAL!r}) or of a host with an agent can run {model}; start agents where "
            "devices are (onnxsplit cluster agent), and name them with --agent HOST=ADDR"
        )
    devices = tuple(
        replace(device, speed=float(f"{first_ns / time_ns:.4g}")) if time_ns else device
        for device, time_ns in zip(cluster.devices, times_ns, strict=True)
    )
    return replace(cluster, devices=devices)


def _files(model: Path) -> list[Path]:
    """The model file and its external data."""
    tensors = graph_tensors(open_model(model).proto.graph)
    locations = sorted({location_of(tensor) for tensor in tensors if is_external(tensor)})
    away = [location for location in locations if len(Path(location).parts) != 1]
    if away:
        raise ClusterError(f"external data in folders of its own ({away[0]}) cannot be sent to agents")
    return [model, *(model.parent / location for location in locations)]


def _time_ns(model: Path, inputs: Path, device: Device, custom_ops: Sequence[Library]) -> int | None:
    try:
        return typical_ns(model, inputs, threads=device.threads, provider=device.provider, custom_ops=custom_ops)
    except OnnxsplitError:
        return None
