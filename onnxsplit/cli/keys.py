"""The command ``onnxsplit keys``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.help import CommandGroup, option
from onnxsplit.cli.output import Output, make_command


@click.group(cls=CommandGroup)
def command() -> None:
    """Make and manage the keys that protect links between hosts."""


@make_command
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@option(
    "--node", "nodes", multiple=True, metavar="NAME", help="Name of a node to make keys for, in DIR/NAME. Repeatable."
)
def new(output: Output, *, folder: Path, nodes: tuple[str, ...]) -> None:
    """Make a key pair in DIR.

    With --node, makes a pair for a coordinator and one for each node, which allow each other.
    """
    from runtime.wire.keys import create, create_for

    if not nodes:
        create(folder)
        output.line(
            f"Wrote {folder}. Give {folder / 'public.key'} to the owners of processes that this one connects to,"
        )
        output.line(f"and allow theirs with: onnxsplit keys allow {folder} THEIR.key --name NAME")
        output.result({"folders": [folder]})
        return
    made = create_for(folder, nodes)
    for one in made:
        output.line(f"Wrote {one}")
    output.line(f"Move each node's folder to its host; start it with: onnxsplit node --keys {made[1].name} ...")
    output.result({"folders": made})


@make_command
@click.argument("folder", type=click.Path(path_type=Path, exists=True), metavar="DIR")
@click.argument("public", type=click.Path(path_type=Path, exists=True), metavar="PUBLIC.key")
@option("--name", required=True, help="Name for the owner of the key; for a node's coordinator it is 'coordinator'.")
def allow_one(output: Output, *, folder: Path, public: Path, name: str) -> None:
    """Allow the owner of a public key to connect.

    It may then connect to the process whose keys are in DIR.
    """
    from runtime.wire.keys import Keys, allow

    Keys(folder)
    allow(folder, public, name)
    output.line(f"{name} is allowed in {folder}.")
    output.result({"allowed": name})


@make_command
@click.argument("folder", type=click.Path(path_type=Path, exists=True), metavar="DIR")
@click.argument("name")
def revoke_one(output: Output, *, folder: Path, name: str) -> None:
    """Stop allowing the owner of a key to connect.

    NAME may no longer connect to the process whose keys are in DIR. A running pipeline drops it at once.
    """
    from runtime.wire.keys import Keys, revoke

    Keys(folder)
    revoke(folder, name)
    output.line(f"{name} is no longer allowed in {folder}.")
    output.result({"revoked": name})


command.add_command(new, "new")
command.add_command(allow_one, "allow")
command.add_command(revoke_one, "revoke")
