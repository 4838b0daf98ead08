"""Kubernetes manifests for a plan, in Kustomize's layout. The cluster starts, restarts and scales the nodes.

    base/kustomization.yaml       the resources, and the secrets that are made of the keys beside it
    base/gateway.yaml             Deployment of the coordinator and its gateway; Services for clients and for nodes
    base/stage-I.yaml             StatefulSet, PodDisruptionBudget and HorizontalPodAutoscaler of a stage
    base/keys/                    CURVE keys of the gateway and of each stage; secret
    overlays/example/             namespace, image and numbers of nodes, to be changed by the user

The documents are written down in ``templates/kubernetes.yaml``. This module computes the values and fills them in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, PlanError
from onnxsplit.numbers import whole_problem
from onnxsplit.plan import Plan, Stage
from onnxsplit.plan_base import MOST_NODES
from runtime.wire.keys import create_for, is_occupied

Document = dict[str, Any]
"""A Kubernetes object as YAML describes it."""

_PROCESS_BYTES = 512 << 20  # memory of a process apart from its stage
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """The options of manifests.

    Attributes:
        name: Name of the model, and the beginning of every object's name.
        image: Container image with onnxsplit.
        claim: PersistentVolumeClaim with the plan, mounted at ``/plans/NAME.plan``. None: the image holds the plan.
        most_replicas: Largest number of nodes to which a stage is scaled.
        utilisation: Utilisation of a stage's nodes at which scaling aims, above 0 and at most 1.
        custom_ops: Libraries of custom ops for nodes of the stages that need some: paths in the image, or
            ``onnxruntime-extensions`` where the image has that package.
    """

    name: str
    image: str
    claim: str | None = None
    most_replicas: int = 8
    utilisation: float = 0.8
    custom_ops: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse values that Kubernetes would refuse.

        Raises:
            InputError: A value is not allowed. The message names it.
        """
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise InputError(
                f"{self.name!r} is not a name for Kubernetes objects; allowed: up to 40 lower-case letters, digits and "
                "'-', beginning with a letter. Give another name with --name"
            )
        if not self.image or any(c.isspace() for c in self.image):
            raise InputError(f"{self.image!r} is not a container image; give a name without spaces, as in NAME:TAG")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation must be above 0 and at most 1, not {self.utilisation:g}")
        problem = whole_problem("--max-replicas", self.most_replicas, 1, MOST_NODES)
        if problem:
            raise InputError(problem)


def name_of(plan: Plan) -> str:
    """A name for Kubernetes objects, made of the model's name."""
    text = re.sub(r"[^a-z0-9]+", "-", plan.model.name.removesuffix(".onnx").lower()).strip("-")
    return re.sub(r"^[^a-z]+", "", text)[:40].rstrip("-") or "model"


def manifests(plan: Plan, options: DeployOptions) -> dict[str, list[Document]]:
    """The documents of every file, by the file's path.

    Raises:
        InputError: An option is not allowed, or the plan needs custom ops and none are named.
        MissingDependency: PyYAML is not installed.
    """
    options.check()
    if plan.custom_ops and not options.custom_ops:
        needed = ", ".join(repr(library.name) for library in plan.custom_ops)
        raise InputError(
            f"nodes of this plan need the custom op libraries {needed}; say where the image has them, with "
            "--custom-ops FILE.so for each, or --custom-ops onnxruntime-extensions"
        )
    templates = _templates()
    names = [f"stage-{stage.index}" for stage in plan.stages]
    documents = {"base/gateway.yaml": _filled(templates["gateway"], _gateway_values(names, options))}
    for stage in plan.stages:
        documents[f"base/stage-{stage.index}.yaml"] = _filled(templates["stage"], _stage_values(stage, options))
    resources = [Path(path).name for path in documents]
    secrets = [_secret(options, "gateway", "coordinator", names)]
    secrets += [_secret(options, name, name, ["coordinator"]) for name in names]
    base = {"resources": resources, "secrets": secrets}
    documents["base/kustomization.yaml"] = _filled(templates["kustomization"], base)
    documents["overlays/example/kustomization.yaml"] = _filled(templates["overlay"], _overlay_values(plan, options))
    return documents


def write(plan: Plan, options: DeployOptions, folder: Path) -> list[Path]:
    """Write the manifests and new keys for them into a new folder.

    Returns:
        The files, without the keys.

    Raises:
        InputError: An option is not allowed.
        PlanError: The folder exists and is not empty, or cannot be written.
        MissingDependency: PyYAML is not installed.
    """
    texts = {path: to_yaml(documents) for path, documents in manifests(plan, options).items()}
    if is_occupied(folder):
        raise PlanError(f"{folder} is there already; nothing was touched. Choose another folder with -o DIR")
    try:
        (folder / "base").mkdir(parents=True)
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}. Choose another folder with -o DIR") from error
    create_for(folder / "base" / "keys", tuple(f"stage-{stage.index}" for stage in plan.stages))
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return [folder / path for path in texts]


def to_yaml(documents: list[Document]) -> str:
    """The text of a file with these documents.

    Raises:
        MissingDependency: PyYAML is not installed.
    """
    yaml = _yaml()
    dumper = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text: str = "---\n".join(yaml.dump(one, Dumper=dumper, sort_keys=False, width=120) for one in documents)
    return text


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("manifests need PyYAML: pip install 'onnxsplit[deploy]'") from error
    return yaml


def _templates() -> dict[str, Any]:
    text = (files(__package__ or "") / "templates" / "kubernetes.yaml").read_text(encoding="utf-8")
    templates: dict[str, Any] = _yaml().safe_load(text)
    return templates


def _filled(template: Any, values: Mapping[str, object]) -> Any:
    """A template with its placeholders filled, as ``templates/kubernetes.yaml`` explains at its top."""
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        items: list[Any] = []
        for entry in template:
            value = _filled(entry, values)
            items += value if isinstance(value, list) else [value]
        return items
    if not isinstance(template, str):
        return template
    if template.startswith("$") and template[1:].isidentifier():
        return values[template[1:]]
    return Template(template).substitute(values)


def _gateway_values(stages: list[str], options: DeployOptions) -> dict[str, object]:
    plan_path = f"/plans/{options.name}.plan"  # the gateway calls the model by it
    mount = {"name": "plan", "mountPath": plan_path, "readOnly": True}
    volume = {"name": "plan", "persistentVolumeClaim": {"claimName": options.claim, "readOnly": True}}
    return {
        "name": options.name,
        "image": options.image,
        "plan_path": plan_path,
        "plan_mounts": [] if options.claim is None else [mount],
        "plan_volumes": [] if options.claim is None else [volume],
        "stage_keys": [{"key": f"{stage}.key", "path": f"allowed/{stage}.key"} for stage in stages],
    }


def _stage_values(stage: Stage, options: DeployOptions) -> dict[str, object]:
    memory = _mebibytes(stage.peak_memory_bytes + _PROCESS_BYTES)
    limits = {"memory": memory}
    if stage.provider.startswith("cuda"):
        limits["nvidia.com/gpu"] = "1"
    # The cache holds the stage's files as fetched, and the packed weights that nodes make of them.
    cache_bytes = 2 * sum(entry.size_bytes for entry in stage.files) + _PROCESS_BYTES
    libraries = options.custom_ops if stage.custom_ops else ()
    return {
        "name": options.name,
        "image": options.image,
        "stage": stage.index,
        "replicas": stage.replicas,
        "most_replicas": max(options.most_replicas, stage.replicas),
        "utilisation": f"{round(options.utilisation * 1000)}m",
        "cpu": stage.threads,
        "memory": memory,
        "limits": limits,
        "cache_size": _mebibytes(cache_bytes),
        "custom_ops_args": [word for library in libraries for word in ("--custom-ops", library)],
    }


def _mebibytes(size_bytes: int) -> str:
    """A size in Kubernetes' unit, rounded up."""
    return f"{-(-size_bytes // _MIB)}Mi"


def _secret(options: DeployOptions, owner: str, folder: str, allowed: list[str]) -> Document:
    """The secret of a pod: its own key pair, and the public keys of the peers it may connect to."""
    sources = [f"secret.key=keys/{folder}/secret.key", f"public.key=keys/{folder}/public.key"]
    sources += [f"{name}.key=keys/{folder}/allowed/{name}.key" for name in allowed]
    return {"name": f"{options.name}-keys-{owner}", "files": sources}


def _overlay_values(plan: Plan, options: DeployOptions) -> dict[str, object]:
    name, colon, tag = options.image.rpartition(":")
    if not colon or "/" in tag:  # the colon belongs to the registry's port
        name, tag = options.image, ""
    return {
        "image_name": name,
        "image_tag": tag or "latest",
        "replica_counts": [{"name": f"{options.name}-stage-{s.index}", "count": s.replicas} for s in plan.stages],
    }
