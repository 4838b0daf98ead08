"""The command ``onnxsplit deploy``."""

from __future__ import annotations

from pathlib import Path

import click

from onnxsplit.cli.help import CommandGroup, OptionTable, add_options, option
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.values import NODES, NumberParam

_PODS = click.IntRange(1, 1000)
_COMMON: OptionTable = [
    (("--image",), {"required": True, "help": "Container image with onnxsplit; docs/hosts.md has a Dockerfile."}),
    (
        ("-o", "--out"),
        {"type": click.Path(path_type=Path), "required": True, "metavar": "DIR", "help": "Folder to write."},
    ),
    (("--name",), {"help": "Prefix of every object's name. Default: the model's name."}),
]
_CUSTOM_OPS: OptionTable = [
    (
        ("--custom-ops", "custom_ops"),
        {
            "multiple": True,
            "metavar": "FILE.so",
            "help": "Custom op library that the plan needs, by its path in the image, or onnxruntime-extensions. "
            "Repeatable.",
        },
    )
]


@click.group(cls=CommandGroup)
def command() -> None:
    """Write files for another system that runs a plan."""


@make_command
@PLAN
@add_options(_COMMON)
@option(
    "--claim",
    metavar="NAME[/FOLDER]",
    help="PersistentVolumeClaim with the plan, and the plan's folder on it. Default: the image holds the plan at "
    "/plans/NAME.plan.",
)
@option("--max-replicas", "most_replicas", type=NODES, default=8, help="Largest number of nodes a stage is scaled to.")
@option(
    "--utilisation",
    type=NumberParam(0, 1, min_open=True),
    default=0.8,
    help="Utilisation of a stage's nodes that scaling aims at.",
)
@add_options(_CUSTOM_OPS)
@option("--token", is_flag=True, help="Require a token of clients: that in DIR/base/keys/token, made if it is missing.")
@option(
    "--tls-secret", metavar="NAME", help="Serve TLS with the certificate of this Secret, of the type kubernetes.io/tls."
)
@option(
    "--network-policy",
    is_flag=True,
    help="Allow connections only as needed: nodes and gateway of this plan among each other, and clients to the "
    "gateway.",
)
@option("--service-monitor", is_flag=True, help="Have the Prometheus operator scrape the gateway.")
@option(
    "--revision",
    default="",
    metavar="TEXT",
    help="Any text. Another one replaces all pods, as for a renewed certificate.",
)
def kubernetes(output: Output, *, plan: Path, out: Path, name: str | None, **values: object) -> None:
    """Write Kubernetes manifests for the plan in DIR.

    They have Kustomize's layout, and new keys for the plan's links. In a folder with manifests of an earlier plan, they
    replace these; keys, token and overlays stay.
    """
    from onnxsplit.plan_files import load_plan
    from runtime.deploy.folder import write
    from runtime.deploy.kubernetes import DeployOptions, replace_commands
    from runtime.deploy.names import name_of

    loaded = load_plan(plan)
    options = DeployOptions(name=name or name_of(loaded), **values)  # type: ignore[arg-type]  # as declared above
    written = write(loaded, options, out)
    apply, prune = replace_commands(options.name, written.release, written.overlay, written.namespace)
    output.line(f"Wrote {len(written.files)} files to {out}, release {written.release}; keep base/keys secret. Next:")
    output.line(f"  {apply}")
    output.line("Then remove other releases, if there are any:")
    output.line(f"  {prune}")
    output.result(
        {
            "folder": out,
            "files": written.files,
            "name": options.name,
            "release": written.release,
            "apply": apply,
            "prune": prune,
        }
    )


@make_command
@PLAN
@add_options(_COMMON)
@option(
    "--storage",
    required=True,
    metavar="URI",
    help="Where KServe finds the plan's folder: pvc://CLAIM/FOLDER, s3://BUCKET/FOLDER, hf://OWNER/NAME, ...",
)
@option("--min-replicas", "least_replicas", type=_PODS, default=1, help="Smallest number of pods.")
@option("--max-replicas", "most_replicas", type=_PODS, help="Largest number of pods. Default: the smallest.")
@add_options(_CUSTOM_OPS)
def kserve(output: Output, *, plan: Path, out: Path, name: str | None, **values: object) -> None:
    """Write objects for KServe, for the plan in DIR.

    They are a ServingRuntime and an InferenceService, which runs all stages in one pod. In a folder with those of an
    earlier plan, they replace these.
    """
    from onnxsplit.plan_files import load_plan
    from runtime.deploy.kserve import KServeOptions, write
    from runtime.deploy.names import name_of

    loaded = load_plan(plan)
    options = KServeOptions(name=name or name_of(loaded), **values)  # type: ignore[arg-type]  # as declared above
    files = write(loaded, options, out)
    output.line(f"Wrote {len(files)} files to {out}. Next: kubectl apply -k {out}")
    output.result({"folder": out, "files": files, "name": options.name})


command.add_command(kubernetes, "kubernetes")
command.add_command(kserve, "kserve")
