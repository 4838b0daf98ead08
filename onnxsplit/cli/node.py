"""``onnxsplit node``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.output import Output, custom_ops_option, make_command, option, threads_option
from onnxsplit.cli.values import STAGE, NumberParam, SizeParam
from onnxsplit.numbers import MOST_SECONDS


@make_command
@option(
    "--connect",
    required=True,
    metavar="ADDR",
    help="Address of the waiting pipeline, tcp://HOST:PORT or ipc://PATH.",
)
@option(
    "--stage",
    type=STAGE,
    help="The stage to execute. Without it: any that is free; a pipeline with --elastic makes no new place for it.",
)
@option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Own copy of the plan. Without it: the pipeline's folder, or its stage's files are fetched from there.",
)
@option("--fetch", is_flag=True, help="Fetch them also where the pipeline's folder is seen from here.")
@option("--cache", type=SizeParam(least=0), default="64G", help="Bytes that fetched stage files may take on this host.")
@option("--host", metavar="NAME", help="This host in the cluster file. Without it: its own name.")
@option("--bind", metavar="ADDR", help="Where to take tensors. Without it: any free port or path.")
@option("--provider", help="cpu or cuda[:N]. Without it: the pipeline's choice.")
@threads_option
@custom_ops_option
@option(
    "--keys",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keys that protect links by tcp. Without it: ~/.config/onnxsplit/keys, when it is there.",
)
@option("--insecure", is_flag=True, help="Let plain links leave this host.")
@option("--advertise", metavar="ADDR", help="Where others reach --bind, when that is elsewhere, as behind a proxy.")
@option(
    "--rejoin",
    type=NumberParam(0, MOST_SECONDS),
    default=60.0,
    help="Seconds to look for a pipeline that fell silent, or to wait for a place at one that has none, before ending.",
)
@option("--shared-memory/--no-shared-memory", default=True, help="Whether tensors cross in shared memory on one host.")
@option("--health", type=click.Path(path_type=Path), metavar="FILE", help="Tell probes how the node is, in this file.")
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
    """Execute one stage for a pipeline that waits at ADDR (Pipeline.listen), until it ends."""
    import logging

    from onnxsplit.custom_ops import find_libraries
    from runtime.node.options import DEFAULT_MEMORY_BYTES, NodeOptions
    from runtime.node.serve import serve
    from runtime.wire.keys import default_folder

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
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
