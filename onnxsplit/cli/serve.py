"""The command ``onnxsplit serve``."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from click.core import ParameterSource

from onnxsplit.cli.help import (
    LANGUAGE_MODELS,
    MODELS,
    NETWORK,
    NODES,
    OTHER_HOSTS,
    REQUESTS,
    SECURITY,
    add_options,
    under,
)
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.running import keywords, parameter_names, serving_options
from onnxsplit.cli.serve_options import (
    ACCESS,
    ADDRESSES,
    FILE,
    NODE_SOURCE,
    OTHER,
    QUEUE,
    REBALANCE,
    SEQUENCES,
    TEXTS,
    VERSIONS,
)
from onnxsplit.cli.settings import different

if TYPE_CHECKING:
    from runtime.balance.replicas import Replicas
    from runtime.gateway.models.loader import StartPipeline
    from runtime.gateway.models.version import Version
    from runtime.gateway.serve_options import ServeOptions
    from runtime.gateway.server import Serving
    from runtime.launch.ray import Placement
    from runtime.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class _NodeSource:
    """Where the nodes come from: the options of ``NODE_SOURCE``, and the libraries of custom ops."""

    launcher: str
    placement: Placement
    elastic: bool
    bind: str | None
    ports: tuple[int, int] | None
    keys: Path | None
    insecure: bool
    custom_ops: tuple[str, ...]

    def check(self, plans: tuple[Path, ...]) -> None:
        """Refuse options that do not fit each other."""
        if self.launcher == "none" and (self.bind is None or len(plans) > 1):
            raise click.UsageError("--launcher none waits for the nodes of one plan: give --bind, and one DIR")
        if self.launcher == "none" and self.custom_ops:
            raise click.UsageError(
                "give custom ops to each node that is started by hand: onnxsplit node --custom-ops FILE.so"
            )
        if self.launcher != "none" and (self.bind is not None or self.elastic or self.ports is not None):
            raise click.UsageError("--bind, --ports and --elastic are for nodes started by hand; add --launcher none")
        if self.bind is not None:
            from runtime.wire.security import Security, check_address

            check_address(self.bind, Security(insecure=True))  # only its form: it is checked again with the keys

    def check_versions(self, versions: list[Version], *, newest: int, poll: bool) -> None:
        """Refuse several pipelines at once at the one address that nodes started by hand connect to."""
        from onnxsplit.errors import InputError

        if self.launcher == "none" and (poll or min(newest, len(versions)) > 1):
            raise InputError(
                "--launcher none waits for the nodes of one plan at one address, so it has neither --poll nor several "
                "--versions at once; start another server for another plan"
            )

    def check_rebalance(self, context: click.Context) -> None:
        """Refuse to change plans where a second coordinator cannot listen, and a gain that nothing asks for."""
        mode = context.params["rebalance"]
        if mode == "off" and context.get_parameter_source("rebalance_gain") is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                "--rebalance-gain says when a new cut is worth it, and --rebalance is off: add --rebalance advise or "
                "--rebalance auto, or leave it out"
            )
        if mode == "auto" and self.ports is not None:
            raise click.UsageError(
                "--rebalance auto needs ports of its own for each plan, so it does not go with --ports: leave --ports "
                "out, or choose --rebalance advise, which changes nothing"
            )

    def check_replicas(self, replicas: Replicas) -> None:
        """Refuse a range of replicas for nodes that are not started on this host."""
        from runtime.balance.replicas import first_range

        wanted = first_range(replicas)
        if wanted is None or self.launcher == "local":
            return
        others = {
            "ray": "A pipeline on Ray has a fixed number of nodes, and Ray's autoscaler adds hosts for them",
            "none": "Nodes that are started by hand come and go with --elastic; on Kubernetes, the autoscalers that "
            "onnxsplit deploy kubernetes writes start and end them",
        }
        raise click.UsageError(
            f"--replicas {wanted} lets the load decide, which is for --launcher local; give a number. "
            + others[self.launcher]
        )

    def check_hosts(self, versions: list[Version], *, chosen: bool) -> None:
        """Refuse to start the nodes of other hosts here, unless the launcher was chosen."""
        from onnxsplit.errors import InputError
        from onnxsplit.plan_summary import stages_by_host

        for version in versions if self.launcher == "local" and not chosen else ():
            hosts = stages_by_host(version.plan)
            if len(hosts) > 1:
                placed = "; ".join(f"{host}: {_stages(stages)}" for host, stages in hosts.items())
                raise InputError(
                    f"the stages of {version.folder} are placed on several hosts ({placed}). To wait for nodes there: "
                    "--launcher none --bind tcp://HOST:PORT, with HOST this host's address; with Ray: --launcher ray; "
                    "to start all of them here: --launcher local"
                )

    def starter(self, output: Output, versions: list[Version], options: dict[str, Any]) -> StartPipeline:
        """Return a function that starts a plan's pipeline with ``options`` for :class:`~runtime.options.RunOptions`."""
        from onnxsplit.custom_ops import check_wanted, find_libraries, needed_libraries
        from onnxsplit.plan_files import load_plan
        from runtime import Pipeline

        if self.launcher == "none":
            return lambda folder, abandoned: self._listen(output, folder, abandoned, options)
        if self.launcher == "ray":
            return lambda folder, abandoned: self._launch_on_ray(folder, abandoned, options)
        libraries = find_libraries(self.custom_ops)
        check_wanted(libraries, [version.plan for version in versions])

        def start(folder: Path, abandoned: Callable[[], bool]) -> Pipeline:
            names = [library.path for library in needed_libraries(libraries, load_plan(folder))]
            return Pipeline.launch(folder, abandoned=abandoned, custom_ops=names, **options)

        return start

    def _listen(self, output: Output, folder: Path, abandoned: Callable[[], bool], options: dict[str, Any]) -> Pipeline:
        from onnxsplit.plan_files import load_plan
        from onnxsplit.plan_summary import stages_by_host
        from runtime import Pipeline

        assert self.bind is not None
        keys = "" if self.keys is None else " --keys FOLDER"
        command = f"onnxsplit node --connect {self.bind}{keys}"
        hosts = stages_by_host(load_plan(folder))
        if len(hosts) > 1:
            output.note("waiting for nodes:")
            for host, stages in hosts.items():
                output.note(f"  on {host}, {_stages(stages)}: {command} --host {host}")
        else:
            output.note(f"waiting for nodes: {command}")
        return Pipeline.listen(
            folder,
            bind=self.bind,
            ports=self.ports,
            keys=self.keys,
            insecure=self.insecure,
            elastic=self.elastic,
            abandoned=abandoned,
            **options,
        )

    def _launch_on_ray(self, folder: Path, abandoned: Callable[[], bool], options: dict[str, Any]) -> Pipeline:
        from onnxsplit.plan_files import load_plan
        from runtime import Pipeline
        from runtime.launch.ray import RayLauncher
        from runtime.options import RunOptions

        plan = load_plan(folder)
        counts = RunOptions(replicas=options["replicas"]).counts(plan)
        launcher = RayLauncher(plan, placement=self.placement, replicas=counts, custom_ops=self.custom_ops)
        return Pipeline.launch(folder, launcher=launcher, abandoned=abandoned, **options)


@make_command
@click.argument("plans", type=FILE, metavar="DIR|FILE.py:NAME...", nargs=-1, required=True)
@add_options(under(NETWORK, ADDRESSES))
@serving_options
@add_options(
    [
        *under(NODES, REBALANCE),
        *under(REQUESTS, QUEUE),
        *under(REQUESTS, SEQUENCES),
        *under(MODELS, VERSIONS),
        *under(LANGUAGE_MODELS, TEXTS),
        *OTHER,
    ]
)
@add_options(under(SECURITY, ACCESS))
@add_options(under(OTHER_HOSTS, NODE_SOURCE))
def command(output: Output, *, plans: tuple[Path, ...], **values: Any) -> None:
    """Serve the plans in DIR... to clients of the Open Inference Protocol (KServe v2, Triton), until SIGTERM.

    A folder of numbered folders is one model with these versions. FILE.py[:NAME] is a service: a class in Python, with
    steps before and after models. After SIGTERM, accepted requests are answered before the server stops.
    """
    gateway = {
        name: values.pop(name) for name in parameter_names(ADDRESSES, QUEUE, SEQUENCES, VERSIONS, TEXTS, OTHER, ACCESS)
    }
    nodes = _NodeSource(
        **{name: values.pop(name) for name in parameter_names(NODE_SOURCE)}, custom_ops=values["custom_ops"]
    )
    nodes.check_replicas(values["replicas"])
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nodes are started by exec, not by fork
    try:
        from runtime.gateway.server import serve
    except ImportError as error:
        from onnxsplit.errors import InputError

        raise InputError(f"serving needs more packages: pip install 'onnxsplit[serve]' ({error})") from error
    from runtime.gateway.models.version import find_versions, is_empty
    from runtime.gateway.services.served import read_services

    services, plans = read_services(plans, output.say)
    nodes.check(plans)
    nodes.check_rebalance(click.get_current_context())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    chosen = different(click.get_current_context())
    if chosen:
        output.note("settings that differ from the defaults: " + ", ".join(chosen))
    for pem in (gateway["tls_cert"], gateway["tls_key"]):
        if pem is not None:
            _check_pem(pem)
    options = keywords(output, values)
    del options["custom_ops"]
    if gateway["max_batch"] > 1 and options["micro_batch"] is None:
        options["micro_batch"] = gateway["max_batch"]
    versions = [] if gateway["poll"] and is_empty(plans) else find_versions(plans)
    source = click.get_current_context().get_parameter_source("launcher")
    nodes.check_versions(versions, newest=gateway["versions"], poll=bool(gateway["poll"]))
    nodes.check_hosts(versions, chosen=source is not ParameterSource.DEFAULT)
    if len(versions) > 1:
        _share_host(options, versions)
    serve(
        plans,
        _serve_options(**gateway),
        nodes.starter(output, versions, options),
        services=services,
        on_ready=lambda serving: _announce(
            output, serving, host=gateway["host"], tokens=gateway["token_file"] is not None
        ),
        progress=output.say,
    )


def _stages(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _serve_options(
    *,
    max_delay: float,
    versions: int,
    served_model_name: tuple[str, ...],
    drain: float,
    otel: bool,
    warmup: tuple[str, ...],
    poll: float,
    state: tuple[str, ...],
    sequence_idle: float,
    ready_grace: float,
    **same: Any,
) -> ServeOptions:
    from runtime.gateway.models.warmup import Warmup
    from runtime.gateway.serve_options import ServeOptions

    return ServeOptions(
        max_delay_ms=max_delay,
        newest=versions,
        served_names=served_model_name,
        drain_s=drain,
        spans=otel,
        warmup=Warmup.read(warmup),
        poll_s=poll,
        states=state,
        sequence_idle_s=sequence_idle,
        ready_grace_s=ready_grace,
        **same,
    )


def _share_host(options: dict[str, Any], versions: list[Version]) -> None:
    """Divide threads and memory among the pipelines, unless they were given."""
    from onnxsplit.session import threads_per_node
    from runtime.options import RunOptions, memory_for_requests_bytes

    wanted = RunOptions(replicas=options["replicas"])
    nodes = sum(sum(wanted.most_counts(version.plan)) for version in versions)
    options["threads"] = options["threads"] or threads_per_node(nodes)
    options["inflight_bytes"] = options["inflight_bytes"] or memory_for_requests_bytes() // len(versions)
    options["cache_bytes"] = options["cache_bytes"] or memory_for_requests_bytes() // nodes


def _check_pem(file: Path) -> None:
    """Refuse files on which OpenSSL would wait or read forever."""
    from onnxsplit.errors import InputError
    from onnxsplit.files import MOST_TEXT_BYTES, check_regular

    try:
        check_regular(file, most_bytes=MOST_TEXT_BYTES)
    except FileNotFoundError:
        raise InputError(f"no such file: {file}") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _announce(output: Output, serving: Serving, *, host: str, tokens: bool) -> None:
    """Print the addresses of the server, and warn if other hosts reach it without TLS or tokens."""
    from runtime.gateway.access import LOOPBACK

    output.done()
    models = ", ".join(f"{name} (version {', '.join(numbers)})" for name, numbers in serving.models.items())
    first = next(iter(serving.models), "MODEL")
    header = " -H 'Authorization: Bearer TOKEN'" if tokens else ""
    if host not in LOOPBACK and not (tokens and serving.http.startswith("https")):
        output.note(f"other hosts can reach {host}, and " + ("TLS" if tokens else "a token file") + " is not set")
    output.line(f"Serving {models or ('services' if serving.services else 'no model yet')}")
    output.line(f"  HTTP   {serving.http}" + (f"   gRPC {serving.grpc}" if serving.grpc else ""))
    output.line(f"  Page   {serving.http}/   Metrics {serving.http}/metrics")
    for path in serving.services:
        output.line(f"  POST   {serving.http}{path}")
    if serving.models or not serving.services:
        output.line(f"  Try    curl -s{header} {shlex.quote(f'{serving.http}/v2/models/{quote(first)}')}")
    if serving.texts:
        body = {"model": serving.texts[0], "messages": [{"role": "user", "content": "Hello"}]}
        output.line(f"  OpenAI {serving.http}/v1   models {', '.join(serving.texts)}")
        output.line(f"  Try    curl -s{header} {serving.http}/v1/chat/completions -d {shlex.quote(json.dumps(body))}")
    output.line("  Stop   Ctrl-C or SIGTERM; accepted requests are answered first")
    output.result(
        {
            "http": serving.http,
            "grpc": serving.grpc,
            "models": serving.models,
            "texts": serving.texts,
            "services": serving.services,
        }
    )
