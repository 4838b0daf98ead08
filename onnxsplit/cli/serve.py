"""``onnxsplit serve``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.output import Output, make_command, option
from onnxsplit.cli.running import keywords, serving_options
from onnxsplit.cli.settings import different
from onnxsplit.cli.values import NumberParam, SizeParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE, parse_whole

if TYPE_CHECKING:
    from runtime.gateway.server import Serving
    from runtime.launch.ray import Placement
    from runtime.pipeline import Pipeline


def _port(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text == "off":
        return None
    port = parse_whole(text, 65535)
    if port is None:
        raise click.BadParameter(f"{text!r} is no port; allowed: 0 to 65535, or off", context, parameter)
    return port


@make_command
@click.argument("plans", type=click.Path(path_type=Path), metavar="DIR...", nargs=-1, required=True)
@option("--host", default="127.0.0.1", help="Where to listen. Others than this host can ask only with another.")
@option("--http-port", type=click.IntRange(0, 65535), default=8000, help="Port of HTTP, metrics and the page; 0: any.")
@option("--grpc-port", default="8001", callback=_port, metavar="N|off", help="Port of gRPC; 0: any.")
@serving_options
@option("--max-batch", type=click.IntRange(1, MOST_SIZE), default=1, help="Join requests to so many rows at most.")
@option("--max-delay", type=NumberParam(0, 60_000), default=0.0, help="Milliseconds to wait for more to join.")
@option("--max-queue", type=click.IntRange(1, 1_000_000), default=256, help="Requests that may wait; more are refused.")
@option("--max-queue-bytes", type=SizeParam(), default="1G", help="Bytes of requests that may wait.")
@option("--max-body", type=SizeParam(), default="256M", help="Bytes a request may have.")
@option("--versions", type=click.IntRange(1, 1000), default=1, help="How many of the newest versions to load.")
@option("--tls-cert", type=click.Path(path_type=Path), metavar="FILE.pem", help="Certificate chain; then TLS only.")
@option("--tls-key", type=click.Path(path_type=Path), metavar="FILE.pem", help="Its key.")
@option(
    "--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Tokens, one a line; clients must show one."
)
@option(
    "--shared-memory",
    is_flag=False,
    flag_value="",
    metavar="[PREFIX]",
    help="Let clients of this host register shared memory of this user whose name begins with PREFIX; any without it.",
)
@option("--drain", type=NumberParam(0, MOST_SECONDS), default=30.0, help="Seconds for accepted requests at the end.")
@option("--otel", is_flag=True, help="Send spans to OpenTelemetry, as OTEL_* variables say.")
@option(
    "--launcher",
    type=click.Choice(["local", "ray", "none"]),
    default="local",
    help="Start nodes on this host, on a Ray cluster, or wait at --bind for nodes started by hand.",
)
@option(
    "--placement",
    type=click.Choice(["spread", "strict-spread", "pack"]),
    default="spread",
    help="How Ray spreads nodes over hosts.",
)
@option(
    "--elastic",
    is_flag=True,
    help="With --launcher none: take more nodes of a stage than the plan has, if they name it with --stage.",
)
@option("--bind", metavar="ADDR", help="tcp://HOST:PORT or ipc://PATH for nodes started by hand.")
@option("--keys", type=click.Path(path_type=Path), metavar="DIR", help="Keys for links by tcp to those nodes.")
@option("--insecure", is_flag=True, help="Let plain links to those nodes leave this host.")
def command(
    output: Output,
    *,
    plans: tuple[Path, ...],
    host: str,
    http_port: int,
    grpc_port: int | None,
    max_batch: int,
    max_delay: float,
    max_queue: int,
    max_queue_bytes: int,
    max_body: int,
    versions: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    token_file: Path | None,
    shared_memory: str | None,
    drain: float,
    otel: bool,
    launcher: str,
    placement: Placement,
    elastic: bool,
    bind: str | None,
    keys: Path | None,
    insecure: bool,
    **running: Any,
) -> None:
    """Serve the plans in DIR... to clients of the Open Inference Protocol (KServe v2, Triton), until SIGTERM.

    A folder of numbered folders serves those as versions of one model. SIGTERM answers what was accepted, and ends.
    """
    if launcher == "none" and (bind is None or len(plans) > 1):
        raise click.UsageError("--launcher none waits for the nodes of one plan: name where with --bind, and one DIR")
    if launcher == "none" and running["custom_ops"]:
        raise click.UsageError(
            "nodes that are started by hand are told themselves: onnxsplit node --custom-ops FILE.so"
        )
    if launcher != "none" and (bind is not None or elastic):
        raise click.UsageError("--bind and --elastic are for nodes started by hand; add --launcher none")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nodes are started by exec: nobody uses gRPC in between
    try:
        from runtime.gateway.server import ServeOptions, serve
    except ImportError as error:
        from onnxsplit.errors import InputError

        raise InputError(f"serving needs more packages: pip install 'onnxsplit[serve]' ({error})") from error
    from onnxsplit.custom_ops import check_wanted, find_libraries, needed_libraries
    from onnxsplit.plan_files import load_plan
    from runtime import Pipeline
    from runtime.gateway.repository import find_versions
    from runtime.options import RunOptions, memory_for_requests_bytes

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    chosen = different(click.get_current_context())
    if chosen:
        output.note("settings that differ from the defaults: " + ", ".join(chosen))
    for pem in (tls_cert, tls_key):
        if pem is not None:
            _check_pem(pem)
    options = keywords(output, running)
    if max_batch > 1 and options["micro_batch"] is None:
        options["micro_batch"] = max_batch
    found = find_versions(plans)
    custom_ops = options.pop("custom_ops")
    if launcher == "local":
        given = find_libraries(custom_ops)
        check_wanted(given, [version.plan for version in found])
    if len(found) > 1:  # they share this host
        from onnxsplit.session import threads_per_node

        nodes = sum(sum(RunOptions(replicas=options["replicas"]).counts(version.plan)) for version in found)
        options["threads"] = options["threads"] or threads_per_node(nodes)
        options["inflight_bytes"] = options["inflight_bytes"] or memory_for_requests_bytes() // len(found)

    def start(folder: Path, abandoned: Callable[[], bool]) -> Pipeline:
        if launcher == "none":
            assert bind is not None
            output.note(f"waiting for nodes: onnxsplit node --connect {bind}")
            return Pipeline.listen(
                folder, bind=bind, keys=keys, insecure=insecure, elastic=elastic, abandoned=abandoned, **options
            )
        if launcher == "ray":
            from runtime.launch.ray import RayLauncher

            plan = load_plan(folder)
            counts = RunOptions(replicas=options["replicas"]).counts(plan)
            ray = RayLauncher(plan, placement=placement, replicas=counts, custom_ops=custom_ops)
            return Pipeline.launch(folder, launcher=ray, abandoned=abandoned, **options)
        names = [library.path for library in needed_libraries(given, load_plan(folder))]
        return Pipeline.launch(folder, abandoned=abandoned, custom_ops=names, **options)

    serve(
        plans,
        ServeOptions(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            max_batch=max_batch,
            max_delay_ms=max_delay,
            max_queue=max_queue,
            max_queue_bytes=max_queue_bytes,
            max_body=max_body,
            newest=versions,
            tls_cert=tls_cert,
            tls_key=tls_key,
            token_file=token_file,
            shared_memory=shared_memory,
            drain_s=drain,
            spans=otel,
        ),
        start,
        told=lambda serving: _tell(output, serving, secret=token_file is not None, open_=host),
        progress=output.say,
    )


def _check_pem(file: Path) -> None:
    """Refuse what OpenSSL would wait for, or read without end."""
    from onnxsplit.errors import InputError
    from onnxsplit.files import MOST_TEXT_BYTES, check_regular

    try:
        check_regular(file, most_bytes=MOST_TEXT_BYTES)
    except FileNotFoundError:
        raise InputError(f"no such file: {file}") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _tell(output: Output, serving: Serving, *, secret: bool, open_: str) -> None:
    from runtime.gateway.access import LOOPBACK

    output.done()
    models = ", ".join(f"{name} (version {', '.join(numbers)})" for name, numbers in serving.models.items())
    first = next(iter(serving.models))
    token = " -H 'Authorization: Bearer TOKEN'" if secret else ""
    if open_ not in LOOPBACK and not (secret and serving.http.startswith("https")):
        output.note(f"{open_} can be reached from other hosts, and " + ("TLS" if secret else "a token") + " is not set")
    output.line(f"Serving {models}")
    output.line(f"  HTTP   {serving.http}" + (f"   gRPC {serving.grpc}" if serving.grpc else ""))
    output.line(f"  Page   {serving.http}/   Metrics {serving.http}/metrics")
    output.line(f"  Try    curl -s{token} {serving.http}/v2/models/{first}")
    output.line("  Stop   Ctrl-C, or SIGTERM: what was accepted is answered first")
    output.result({"http": serving.http, "grpc": serving.grpc, "models": serving.models})
