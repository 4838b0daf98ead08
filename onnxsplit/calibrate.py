"""Clusters from what is here: this host's devices, and their measured speeds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnxsplit.cluster import LOCAL, Cluster, Device
from onnxsplit.errors import ClusterError, ModelError, OnnxsplitError
from onnxsplit.examine import Say, examine, silent
from onnxsplit.providers import gpu_count, provider_here
from onnxsplit.session import host_cores
from onnxsplit.tensors import save_npz
from onnxsplit.timed import TimedModel, median_ns

_SECONDS = 1.0
_CPU_DEVICES = 2


def this_host() -> Cluster:
    """A device for each GPU; without one, this host's cores as two."""
    gpus = tuple(Device(name=f"gpu{number}", provider=f"cuda:{number}") for number in range(gpu_count()))
    threads = max(1, host_cores() // _CPU_DEVICES)
    cpus = tuple(Device(name=f"cpu{number}", threads=threads) for number in range(_CPU_DEVICES))
    return Cluster(gpus or cpus, {})


def measured(
    cluster: Cluster, model: str | Path, *, dims: Mapping[str, int] | None = None, say: Say = silent
) -> Cluster:
    """The cluster with the speeds of this host's devices on a model, the first of them being 1.

    Devices of other hosts, and those whose provider this host lacks, keep the speed they have.

    Raises:
        ClusterError: no device of this host could run the model.
    """
    subject = examine(model, costs="analytic", dims=dims, say=say)
    times: dict[tuple[str, int], int | None] = {}
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        inputs = Path(folder) / "inputs.npz"
        save_npz(inputs, subject.inputs)
        for device in cluster.devices:
            key = (device.provider, device.threads)
            if device.host == LOCAL and key not in times and provider_here(device.provider) == device.provider:
                say(f"timing the model on {device.name}")
                times[key] = _time_ns(Path(model), inputs, device)
    found = [
        times.get((device.provider, device.threads)) if device.host == LOCAL else None for device in cluster.devices
    ]
    first = next((time_ns for time_ns in found if time_ns), None)
    if first is None:
        raise ClusterError(f"no device of this host (host = {LOCAL!r}) can run {model}; measure where they are")
    devices = tuple(
        replace(device, speed=float(f"{first / time_ns:.4g}")) if time_ns else device
        for device, time_ns in zip(cluster.devices, found, strict=True)
    )
    return replace(cluster, devices=devices)


def _time_ns(model: Path, inputs: Path, device: Device) -> int | None:
    try:
        with TimedModel(model, inputs, threads=device.threads, level="all", provider=device.provider) as timed:
            timed.run(_SECONDS / 4)
            return median_ns(timed.run(_SECONDS, least=3))
    except ModelError:
        raise
    except OnnxsplitError:
        return None
