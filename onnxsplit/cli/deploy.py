"""The command ``onnxsplit deploy``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.help import CommandGroup, option
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.values import NODES, NumberParam


@click.group(cls=CommandGroup)
def command() -> None:
    """Write files for another system that runs a plan."""


@make_command
@PLAN
@option("--image", required=True, help="Container image with onnxsplit; docs/hosts.md has a Dockerfile.")
@option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write.")
@option("--name", help="Prefix of every object's name. Default: the model's name.")
@option(
    "--claim",
    metavar="NAME",
    help="PersistentVolumeClaim with the plan. Default: the image holds the plan at /plans/NAME.plan.",
)
@option("--max-replicas", "most_replicas", type=NODES, default=8, help="Largest number of nodes a stage is scaled to.")
@option(
    "--utilisation",
    type=NumberParam(0, 1, min_open=True),
    default=0.8,
    help="Utilisation of a stage's nodes that scaling aims at.",
)
@option(
    "--custom-ops",
    "custom_ops",
    multiple=True,
    metavar="FILE.so",
    help="Custom op library that the plan needs, by its path in the image, or onnxruntime-extensions. Repeatable.",
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
    """Write Kubernetes manifests for the plan in DIR.

    They have Kustomize's layout, and new keys for the plan's links.
    """
    from onnxsplit.plan_files import load_plan
    from runtime.deploy.kubernetes import DeployOptions, name_of, write

    loaded = load_plan(plan)
    deploy_options = DeployOptions(
        name=name or name_of(loaded),
        image=image,
        claim=claim,
        most_replicas=most_replicas,
        utilisation=utilisation,
        custom_ops=custom_ops,
    )
    files = write(loaded, deploy_options, out)
    output.line(
        f"Wrote {len(files)} files to {out}; keep base/keys secret. Next: kubectl apply -k {out}/overlays/example"
    )
    output.result({"folder": out, "files": files, "name": deploy_options.name})


command.add_command(kubernetes, "kubernetes")
