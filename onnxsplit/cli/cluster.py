"""The command ``onnxsplit cluster``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxsplit.cli.help import CommandGroup, option, path_option
from onnxsplit.cli.model_options import MODEL, custom_ops_option, dims_option
from onnxsplit.cli.output import Output, make_command

if TYPE_CHECKING:
    from onnxsplit.cluster import Cluster, Link

_FILE = path_option("-c", "--cluster", "file", default="cluster.toml", metavar="FILE", help="Cluster file to use.")


@click.group(cls=CommandGroup)
def command() -> None:
    """Describe devices and links in a cluster file; partition --cluster cuts for them."""


@make_command
@_FILE
@option("--force", is_flag=True, help="Replace the file if it exists.")
def init(output: Output, *, file: Path, force: bool) -> None:
    """Write a cluster file for this host."""
    from onnxsplit.errors import ClusterError
    from onnxsplit.planning.calibrate import this_host

    if file.exists() and not force:
        raise ClusterError(f"{file} already exists; give another name with --cluster FILE, or --force to replace it")
    cluster = this_host()
    _write(file, cluster)
    output.line(f"Wrote {file} with {', '.join(device.name for device in cluster.devices)}.")
    output.line(f"Next: onnxsplit cluster measure MODEL --cluster {file}")
    output.result({"file": file, "devices": [device.name for device in cluster.devices]})


def _parse_agents(context: click.Context, parameter: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """Addresses of agents by host."""
    agents = {}
    for text in value:
        host, equals, address = text.partition("=")
        if equals and host and address and "://" not in address:
            raise click.BadParameter(f"{text!r} has no scheme; write {host}=tcp://{address}", context, parameter)
        if not equals or not host or not address:
            raise click.BadParameter(f"{text!r} is not HOST=tcp://ADDRESS:PORT", context, parameter)
        agents[host] = address
    return agents


@make_command
@MODEL
@_FILE
@dims_option
@custom_ops_option
@option(
    "--agent",
    "agents",
    multiple=True,
    metavar="HOST=ADDR",
    callback=_parse_agents,
    help="Address of an agent (onnxsplit cluster agent) on another host of the file. Repeatable.",
)
@path_option("--keys", metavar="DIR", help="Folder with the keys for links to agents.")
@option("--insecure", is_flag=True, help="Allow unencrypted links to agents on other hosts.")
def measure(
    output: Output,
    *,
    model: Path,
    file: Path,
    dims: dict[str, int],
    custom_ops: tuple[str, ...],
    agents: dict[str, str],
    keys: Path | None,
    insecure: bool,
) -> None:
    """Measure devices and links, and write both to the cluster file.

    Devices are measured by running MODEL, links by sending data. This covers the devices of this host and of
    every host with an agent, and the links between these hosts.
    """
    from onnxsplit.cluster import LOCAL
    from onnxsplit.cluster_files import load_cluster
    from onnxsplit.planning.calibrate import measured
    from runtime.measure.client import Agents
    from runtime.measure.link import measure_link
    from runtime.wire.keys import Keys

    cluster = load_cluster(file)
    known = {device.host for device in cluster.devices}
    _check_hosts(file, agents, known)
    with Agents(agents, keys=Keys(keys) if keys is not None else None, insecure=insecure) as elsewhere:
        links = {pair: link for pair, link in elsewhere.links(output.say).items() if set(pair) <= known | {LOCAL}}
        if LOCAL not in known | {cluster.caller}:
            links = {pair: link for pair, link in links.items() if LOCAL not in pair}
        cluster = measured(
            cluster,
            model,
            dims=dims,
            hosts=agents,
            elsewhere=elsewhere if agents else None,
            custom_ops=custom_ops,
            say=output.say,
            note=output.note,
        )
    links = _marked(links, model, dims, custom_ops, output)
    if LOCAL in known:
        output.say("measuring the link between two processes of this host")
        links[LOCAL, LOCAL] = measure_link()
    cluster = replace(cluster, links={**cluster.links, **links})
    _write(file, cluster)
    output.done()
    _show(output, cluster)
    output.line(f"\nWrote {file}. Next: onnxsplit partition {model} --cluster {file}")
    speeds = {device.name: device.speed for device in cluster.devices}
    not_ops = {device.name: device.not_ops for device in cluster.devices}
    figures = [{"between": pair, **asdict(link)} for pair, link in cluster.links.items()]
    output.result({"file": file, "speeds": speeds, "not_ops": not_ops, "links": figures})


def _marked(
    links: dict[tuple[str, str], Link], model: Path, dims: dict[str, int], custom_ops: tuple[str, ...], output: Output
) -> dict[tuple[str, str], Link]:
    """The links, where those on which compression of the model's int8 borders pays are marked."""
    from onnxsplit.planning.border_sample import border_sample
    from runtime.measure.compression import is_slow, pays
    from runtime.wire.compression import can_compress

    slow = [pair for pair, link in links.items() if is_slow(pair, link)]
    if slow and not can_compress():
        output.note("links below 100 Mbit/s are not compressed: zstandard is not installed here (extra: hosts)")
    if not slow or not can_compress():
        return links
    output.say("compressing numbers of the model")
    sample = border_sample(model, dims=dims, custom_ops=custom_ops)
    return links | {pair: replace(links[pair], compressed=pays(sample, links[pair])) for pair in slow}


def _check_hosts(file: Path, agents: Iterable[str], known: set[str]) -> None:
    """Refuse agents on hosts that the cluster file does not name."""
    from onnxsplit.errors import ClusterError

    unknown = [host for host in agents if host not in known]
    if unknown:
        raise ClusterError(f"{file} has no device on the host {unknown[0]!r}; it has {', '.join(sorted(known))}")


def _show(output: Output, cluster: Cluster) -> None:
    """Print the measured devices and links."""
    output.table(
        ("device", "host", "provider", "threads", "speed", "not its ops"),
        [
            (d.name, d.host, d.provider, f"{d.threads}", f"{d.speed:g}", ", ".join(d.not_ops) or "-")
            for d in cluster.devices
        ],
        may_go=("threads", "not its ops", "provider", "host", "speed"),
    )
    output.line()
    output.table(
        ("link", "latency", "delay", "MB/s", "int8 borders"),
        [
            (
                " - ".join(pair),
                f"{link.latency_ns / 1000:,.0f} us",
                f"{link.delay_ns / 1000:,.0f} us",
                f"{link.bytes_per_s / 1e6:,.0f}",
                "compressed" if link.compressed else "as they are",
            )
            for pair, link in cluster.links.items()
        ],
        may_go=("delay", "int8 borders", "latency", "MB/s"),
    )


@make_command
@option("--bind", required=True, metavar="ADDR", help="Address to listen at, as tcp://10.0.0.2:7000.")
@path_option("--keys", metavar="DIR", help="Folder with the keys that protect TCP links.")
@option("--insecure", is_flag=True, help="Allow unencrypted links to other hosts.")
@custom_ops_option
def agent(output: Output, *, bind: str, keys: Path | None, insecure: bool, custom_ops: tuple[str, ...]) -> None:
    """Answer onnxsplit cluster measure on other hosts.

    Runs the models that they send and measures links to them, until Ctrl-C.
    """
    from onnxsplit.custom_ops import find_libraries
    from runtime.measure.agent import serve
    from runtime.wire.keys import Keys

    serve(
        bind,
        keys=Keys(keys) if keys is not None else None,
        insecure=insecure,
        custom_ops=find_libraries(custom_ops),
        told=lambda address: output.note(f"Answering onnxsplit cluster measure at {address}. Stop with Ctrl-C."),
    )


def _write(file: Path, cluster: Cluster) -> None:
    """Write a cluster file."""
    from onnxsplit.errors import ClusterError
    from onnxsplit.files import replacing

    try:
        with replacing(file) as temporary:
            temporary.write_text(cluster.to_toml(), encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"cannot write {file}: {error.strerror}") from error


command.add_command(init, "init")
command.add_command(measure, "measure")
command.add_command(agent, "agent")
