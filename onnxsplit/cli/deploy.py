"""``onnxsplit deploy``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.output import PLAN, Output, make_command, option
from onnxsplit.cli.values import NODES, NumberParam


@click.group()
def command() -> None:
    """Write what other systems need to run a plan."""


@make_command
@PLAN
@option("--image", required=True, help="The container image that has onnxsplit; see docs/hosts.md for a Dockerfile.")
@option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The folder to write.")
@option("--name", help="Of all objects. Without it: the model's.")
@option(
    "--claim",
    metavar="NAME",
    help="PersistentVolumeClaim with the plan. Without it: the image has it at /plans/NAME.plan.",
)
@option("--max-replicas", "most_replicas", type=NODES, default=8, help="Up to which a stage is scaled.")
@option(
    "--utilisation",
    type=NumberParam(0, 1, min_open=True),
    default=0.8,
    help="Of a stage's nodes, that scaling aims at.",
)
@option(
    "--custom-ops",
    "custom_ops",
    multiple=True,
    metavar="FILE.so",
    help="Where the image has a custom op library that the plan needs, or onnxruntime-extensions. Repeatable.",
)
def kubernetes(
    output: Output,
    *,
    plan: Path,
    image: str,
    out: Path,
    name: str | None,
    claim: str | None,
    most_replicas: int,
    utilisation: float,
    custom_ops: tuple[str, ...],
) -> None:
    """Write manifests for the plan in DIR, in Kustomize's layout, with new keys for its links."""
    from onnxsplit.plan_files import load_plan
    from runtime.deploy.kubernetes import DeployOptions, name_of, write

    loaded = load_plan(plan)
    wishes = DeployOptions(
        name=name or name_of(loaded),
        image=image,
        claim=claim,
        most_replicas=most_replicas,
        utilisation=utilisation,
        custom_ops=custom_ops,
    )
    files = write(loaded, wishes, out)
    output.line(
        f"Wrote {len(files)} files in {out}; base/keys is secret. Next: kubectl apply -k {out}/overlays/example"
    )
    output.result({"folder": out, "files": files, "name": wishes.name})


command.add_command(kubernetes, "kubernetes")
