"""The command ``onnxsplit node``."""

from __future__ import annotations

import functools
from pathlib import Path

from onnxsplit.cli.help import MODELS, NETWORK, NODES, SECURITY, option, path_option
from onnxsplit.cli.model_options import custom_ops_option, threads_option
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.values import STAGE, NumberParam, SizeParam
from onnxsplit.numbers import MOST_SECONDS


@make_command
@option(
    "--connect",
    section=NETWORK,
    required=True,
    metavar="ADDR",
    help="Address of the pipeline that waits for nodes: tcp://HOST:PORT or ipc://PATH.",
)
@option(
    "--stage",
    section=NODES,
    type=STAGE,
    metavar="I",
    help="Stage to execute. Without it: any stage that lacks a node. An --elastic pipeline adds a place only for "
    "nodes with --stage.",
)
@path_option(
    "--plan",
    section=MODELS,
    metavar="DIR",
    help="Own copy of the plan. Without it: the pipeline's folder if it is visible here, else the files are fetched.",
)
@option(
    "--fetch",
    section=MODELS,
    is_flag=True,
    help="Fetch the stage's files even if the pipeline's folder is visible here.",
)
@option(
    "--cache",
    section=MODELS,
    type=SizeParam(least=0),
    default="64G",
    help="Most bytes that fetched stage files may take on this host.",
)
@option(
    "--host", section=NETWORK, metavar="NAME", help="Name of this host in the cluster file. Without it: its host name."
)
@option(
    "--bind", section=NETWORK, metavar="ADDR", help="Address to receive tensors at. Without it: any free port or path."
)
@option(
    "--provider",
    section=NODES,
    metavar="PROVIDER",
    help="Execution provider: cpu, cuda[:N], openvino or webgpu. Without it: the pipeline's choice.",
)
@functools.partial(threads_option, section=NODES)
@functools.partial(custom_ops_option, section=MODELS)
@path_option(
    "--keys",
    section=SECURITY,
    metavar="DIR",
    help="Folder with the keys that protect TCP links. Without it: ~/.config/onnxsplit/keys, if it exists.",
)
@option("--insecure", section=SECURITY, is_flag=True, help="Allow unencrypted links to other hosts.")
@option(
    "--advertise",
    section=NETWORK,
    metavar="ADDR",
    help="Address at which others reach this node, if not at --bind, as behind a proxy.",
)
@option(
    "--rejoin",
    section=NODES,
    type=NumberParam(0, MOST_SECONDS),
    default=60.0,
    metavar="SECONDS",
    help="Time to look for a silent pipeline, or to wait for a free place, before this node ends.",
)
@option(
    "--shared-memory/--no-shared-memory",
    section=NODES,
    default=True,
    help="Send tensors through shared memory between nodes of one host.",
)
@path_option("--health", metavar="FILE", help="File in which the node reports its health, for liveness probes.")
def command(
    output: Output,
    *,
    connect: str,
    stage: int | None,
    plan: Path | None,
    fetch: bool,
    cache: int,
    host: str | None,
    bind: str | None,
    provider: str | None,
    threads: int | None,
    custom_ops: tuple[str, ...],
    keys: Path | None,
    insecure: bool,
    advertise: str | None,
    rejoin: float,
    shared_memory: bool,
    health: Path | None,
) -> None:
    """Execute one stage for the pipeline that waits at ADDR (Pipeline.listen), until that pipeline ends."""
    import logging

    from onnxsplit.custom_ops import find_libraries
    from runtime.node.options import DEFAULT_MEMORY_BYTES, NodeOptions
    from runtime.node.serve import serve
    from runtime.wire.keys import default_folder
    from runtime.wire.security import Security, check_address

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    check_address(connect, Security(insecure=True))  # only its form: the node itself checks whether it is safe
    libraries = find_libraries(custom_ops)
    output.note(f"Waiting for the pipeline at {connect}. Stop with Ctrl-C.")
    code = serve(
        NodeOptions(
            connect=connect,
            bind=bind,
            stage=-1 if stage is None else stage,
            plan=plan,
            fetch=fetch,
            cache_bytes=cache,
            host=host,
            health=health,
            provider=provider,
            threads=threads or 0,
            custom_ops=libraries,
            keys=keys or (None if insecure else default_folder()),
            insecure=insecure,
            advertise=advertise,
            rejoin_s=rejoin,
            memory_bytes=DEFAULT_MEMORY_BYTES if shared_memory else 0,
        )
    )
    output.result({"exit_code": code})
    raise SystemExit(code)
