"""``onnxsplit cluster``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxsplit.cli.output import MODEL, Output, dims_option, make_command, option

if TYPE_CHECKING:
    from onnxsplit.cluster import Cluster

_FILE = option(
    "-c", "--cluster", "file", type=click.Path(path_type=Path), default="cluster.toml", metavar="FILE", help="The file."
)


@click.group()
def command() -> None:
    """Describe devices and links, to cut for them with partition --cluster."""


@make_command
@_FILE
@option("--force", is_flag=True, help="Replace a file that is there.")
def init(output: Output, *, file: Path, force: bool) -> None:
    """Write a cluster file for this host."""
    from onnxsplit.calibrate import this_host
    from onnxsplit.errors import ClusterError

    if file.exists() and not force:
        raise ClusterError(f"{file} is there already; give another name with --cluster FILE, or --force to replace it")
    cluster = this_host()
    _write(file, cluster)
    output.line(f"Wrote {file} with {', '.join(device.name for device in cluster.devices)}.")
    output.line(f"Next: onnxsplit cluster measure MODEL --cluster {file}")
    output.result({"file": file, "devices": [device.name for device in cluster.devices]})


@make_command
@MODEL
@_FILE
@dims_option
def measure(output: Output, *, model: Path, file: Path, dims: dict[str, int]) -> None:
    """Measure this host's devices on MODEL, and its link by real transfers; write both into the cluster file."""
    from onnxsplit.calibrate import measured
    from onnxsplit.cluster import LOCAL, Cluster, load_cluster
    from runtime.link import measure_link

    cluster = measured(load_cluster(file), model, dims=dims, say=output.say)
    output.say("sending messages between two processes")
    link = measure_link()
    cluster = Cluster(cluster.devices, {**cluster.links, (LOCAL, LOCAL): link})
    _write(file, cluster)
    output.done()
    output.table(
        ("device", "host", "provider", "threads", "speed"),
        [(d.name, d.host, d.provider, f"{d.threads}", f"{d.speed:g}") for d in cluster.devices],
    )
    output.line(
        f"\nLink on this host: {link.latency_ns / 1000:.0f} us and {link.bytes_per_s / 1e9:.1f} GB/s at each end."
    )
    output.line(f"Wrote {file}. Next: onnxsplit partition {model} --cluster {file}")
    speeds = {device.name: device.speed for device in cluster.devices}
    output.result(
        {"file": file, "speeds": speeds, "link": {"latency_ns": link.latency_ns, "bytes_per_s": link.bytes_per_s}}
    )


def _write(file: Path, cluster: Cluster) -> None:
    from onnxsplit.errors import ClusterError
    from onnxsplit.files import replacing

    try:
        with replacing(file) as temporary:
            temporary.write_text(cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"cannot write {file}: {error.strerror}") from error


command.add_command(init, "init")
command.add_command(measure, "measure")
