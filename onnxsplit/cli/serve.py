"""The command ``onnxsplit serve``."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from onnxsplit.cli.help import (
    LANGUAGE_MODELS,
    MODELS,
    NETWORK,
    OTHER_HOSTS,
    REQUESTS,
    SECURITY,
    OptionTable,
    add_options,
    under,
)
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.running import keywords, parameter_names, serving_options
from onnxsplit.cli.settings import different
from onnxsplit.cli.values import NumberParam, SizeParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE, parse_whole

if TYPE_CHECKING:
    from runtime.gateway.models.repository import StartPipeline
    from runtime.gateway.models.version import Version
    from runtime.gateway.server import ServeOptions, Serving
    from runtime.launch.ray import Placement
    from runtime.pipeline import Pipeline

_FILE = click.Path(path_type=Path)
_MOST_WARMUP = 100_000


def _port(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text.lower() == "off":
        return None
    port = parse_whole(text, 65535)
    if port is None:
        raise click.BadParameter(f"{text!r} is not a port; allowed: 0 to 65535, or off", context, parameter)
    return port


def _ports(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = [parse_whole(part.strip(), 65535) for part in text.split(",")]
    if len(numbers) != 2 or not all(numbers) or numbers[0] == numbers[1]:
        raise click.BadParameter(f"{text!r} is not two different ports, as 5556,5557", context, parameter)
    return numbers[0], numbers[1]  # type: ignore[return-value]  # neither is None


def _check_warmup(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if word.lstrip("-").isdecimal() and parse_whole(word, _MOST_WARMUP) is None:
            raise click.BadParameter(
                f"{word} requests are too many or too few; 0 to {_MOST_WARMUP}", context, parameter
            )
    return words


_ADDRESSES: OptionTable = [
    (("--host",), {"default": "127.0.0.1", "help": "Name or address to listen on. The default serves this host only."}),
    (
        ("--http-port",),
        {
            "type": click.IntRange(0, 65535),
            "default": 8000,
            "help": "Port of HTTP, the metrics and the page. 0: any free port.",
        },
    ),
    (
        ("--grpc-port",),
        {
            "default": "8001",
            "callback": _port,
            "metavar": "N|off",
            "help": "Port of gRPC. 0: any free port; off: no gRPC.",
        },
    ),
]
_REQUESTS: OptionTable = [
    (
        ("--max-batch",),
        {
            "type": click.IntRange(1, MOST_SIZE),
            "default": 1,
            "help": "Largest batch, in rows, to join requests into.",
        },
    ),
    (
        ("--max-delay",),
        {"type": NumberParam(0, 60_000), "default": 0.0, "help": "Milliseconds a request waits for others to join."},
    ),
    (
        ("--max-queue",),
        {"type": click.IntRange(1, 1_000_000), "default": 256, "help": "Most requests that wait; more are refused."},
    ),
    (
        ("--priority-levels",),
        {
            "type": click.IntRange(1, 1000),
            "default": 1,
            "metavar": "N",
            "help": "Let waiting requests of priority 1 enter first, and those of N last. With 1, all are equal.",
        },
    ),
    (("--max-queue-bytes",), {"type": SizeParam(), "default": "1G", "help": "Most bytes of requests that wait."}),
    (("--max-body",), {"type": SizeParam(), "default": "256M", "help": "Most bytes of one request."}),
    (
        ("--drain",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 30.0,
            "help": "Seconds to answer accepted requests after SIGTERM.",
        },
    ),
]
_MODELS: OptionTable = [
    (
        ("--versions",),
        {"type": click.IntRange(1, 1000), "default": 1, "help": "Number of the newest versions of a model to load."},
    ),
    (
        ("--poll",),
        {
            "type": NumberParam(0, MOST_SECONDS),
            "default": 0.0,
            "metavar": "SECONDS",
            "help": "Look so often for plans that were added, replaced or removed, and load or unload them. 0: never.",
        },
    ),
    (
        ("--response-cache",),
        {
            "type": SizeParam(0),
            "default": "0",
            "help": "Most bytes of outputs to keep, which answer requests with the same inputs without a run, as 256M. "
            "For models whose outputs depend on their inputs alone.",
        },
    ),
    (
        ("--warmup",),
        {
            "multiple": True,
            "metavar": "N|FILE.npz",
            "callback": _check_warmup,
            "help": "Requests that each model answers before it is ready: so many with the plan's example inputs, or "
            "those of a file. Repeatable.",
        },
    ),
]
_TEXTS: OptionTable = [
    (
        ("--served-model-name",),
        {
            "multiple": True,
            "metavar": "NAME",
            "help": "Name of the only language model for clients of OpenAI's API; may be repeated.",
        },
    ),
    (
        ("--tool-parser",),
        {
            "type": click.Choice(["hermes", "json"]),
            "help": "How the models write calls of tools: in tags, as Hermes and Qwen, or as JSON, as Llama 3.",
        },
    ),
]
_OTHER: OptionTable = [
    (("--otel",), {"is_flag": True, "help": "Send spans to OpenTelemetry; the OTEL_* variables configure it."}),
]
_ACCESS: OptionTable = [
    (
        ("--tls-cert",),
        {"type": _FILE, "metavar": "FILE.pem", "help": "Certificate chain. With it, only TLS is served."},
    ),
    (("--tls-key",), {"type": _FILE, "metavar": "FILE.pem", "help": "Private key of the certificate."}),
    (
        ("--token-file",),
        {"type": _FILE, "metavar": "FILE", "help": "File with one token on each line. Every request must carry one."},
    ),
    (
        ("--shared-memory",),
        {
            "is_flag": False,
            "flag_value": "",
            "metavar": "[PREFIX]",
            "help": "Let clients of this host register this user's shared memory, of names that begin with PREFIX if "
            "it is given.",
        },
    ),
]
_NODES: OptionTable = [
    (
        ("--launcher",),
        {
            "type": click.Choice(["local", "ray", "none"]),
            "default": "local",
            "help": "Start nodes on this host or on a Ray cluster, or wait at --bind for nodes started by hand.",
        },
    ),
    (
        ("--placement",),
        {
            "type": click.Choice(["spread", "strict-spread", "pack"]),
            "default": "spread",
            "help": "How Ray spreads nodes over hosts.",
        },
    ),
    (
        ("--elastic",),
        {
            "is_flag": True,
            "help": "With --launcher none: accept more nodes of a stage than the plan has, if they name it with "
            "--stage.",
        },
    ),
    (("--bind",), {"metavar": "ADDR", "help": "Address for nodes started by hand: tcp://HOST:PORT or ipc://PATH."}),
    (
        ("--ports",),
        {
            "metavar": "N,N",
            "callback": _ports,
            "help": "Ports for results and for stage files, beside that of --bind, for firewalls. Without it: any free "
            "ones.",
        },
    ),
    (("--keys",), {"type": _FILE, "metavar": "DIR", "help": "Keys that encrypt tcp links to those nodes."}),
    (("--insecure",), {"is_flag": True, "help": "Allow unencrypted links to nodes on other hosts."}),
]


@dataclass(frozen=True, kw_only=True)
class _NodeSource:
    """Where the nodes come from: the options of ``_NODES``, and the libraries of custom ops."""

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
        from runtime import Pipeline

        assert self.bind is not None
        keys = "" if self.keys is None else " --keys FOLDER"
        output.note(f"waiting for nodes: onnxsplit node --connect {self.bind}{keys}")
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
@click.argument("plans", type=_FILE, metavar="DIR...", nargs=-1, required=True)
@add_options(under(NETWORK, _ADDRESSES))
@serving_options
@add_options([*under(REQUESTS, _REQUESTS), *under(MODELS, _MODELS), *under(LANGUAGE_MODELS, _TEXTS), *_OTHER])
@add_options(under(SECURITY, _ACCESS))
@add_options(under(OTHER_HOSTS, _NODES))
def command(output: Output, *, plans: tuple[Path, ...], **values: Any) -> None:
    """Serve the plans in DIR... to clients of the Open Inference Protocol (KServe v2, Triton), until SIGTERM.

    A folder of numbered folders is one model with these versions. After SIGTERM, accepted requests are answered before
    the server stops.
    """
    gateway = {
        name: values.pop(name) for name in parameter_names(_ADDRESSES, _REQUESTS, _MODELS, _TEXTS, _OTHER, _ACCESS)
    }
    nodes = _NodeSource(**{name: values.pop(name) for name in parameter_names(_NODES)}, custom_ops=values["custom_ops"])
    nodes.check(plans)
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nodes are started by exec, not by fork
    try:
        from runtime.gateway.server import serve
    except ImportError as error:
        from onnxsplit.errors import InputError

        raise InputError(f"serving needs more packages: pip install 'onnxsplit[serve]' ({error})") from error
    from runtime.gateway.models.version import find_versions, is_empty

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
    if len(versions) > 1:
        _share_host(options, versions)
    serve(
        plans,
        _serve_options(**gateway),
        nodes.starter(output, versions, options),
        on_ready=lambda serving: _announce(
            output, serving, host=gateway["host"], tokens=gateway["token_file"] is not None
        ),
        progress=output.say,
    )


def _serve_options(
    *,
    max_delay: float,
    versions: int,
    served_model_name: tuple[str, ...],
    drain: float,
    otel: bool,
    warmup: tuple[str, ...],
    poll: float,
    **same: Any,
) -> ServeOptions:
    from runtime.gateway.models.warmup import Warmup
    from runtime.gateway.server import ServeOptions

    return ServeOptions(
        max_delay_ms=max_delay,
        newest=versions,
        served_names=served_model_name,
        drain_s=drain,
        spans=otel,
        warmup=Warmup.read(warmup),
        poll_s=poll,
        **same,
    )


def _share_host(options: dict[str, Any], versions: list[Version]) -> None:
    """Divide threads and memory among the pipelines, unless they were given."""
    from onnxsplit.session import threads_per_node
    from runtime.options import RunOptions, memory_for_requests_bytes

    nodes = sum(sum(RunOptions(replicas=options["replicas"]).counts(version.plan)) for version in versions)
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
    output.line(f"Serving {models or 'no model yet'}")
    output.line(f"  HTTP   {serving.http}" + (f"   gRPC {serving.grpc}" if serving.grpc else ""))
    output.line(f"  Page   {serving.http}/   Metrics {serving.http}/metrics")
    output.line(f"  Try    curl -s{header} {shlex.quote(f'{serving.http}/v2/models/{quote(first)}')}")
    if serving.texts:
        body = {"model": serving.texts[0], "messages": [{"role": "user", "content": "Hello"}]}
        output.line(f"  OpenAI {serving.http}/v1   models {', '.join(serving.texts)}")
        output.line(f"  Try    curl -s{header} {serving.http}/v1/chat/completions -d {shlex.quote(json.dumps(body))}")
    output.line("  Stop   Ctrl-C or SIGTERM; accepted requests are answered first")
    output.result({"http": serving.http, "grpc": serving.grpc, "models": serving.models, "texts": serving.texts})
