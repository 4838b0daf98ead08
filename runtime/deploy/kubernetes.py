"""A plan as Kubernetes manifests, laid out for Kustomize: the cluster starts, restarts and scales the nodes.

    base/kustomization.yaml       what there is, and the secrets made of the keys beside it
    base/gateway.yaml             Deployment of the coordinator with the gateway; Services for clients and for nodes
    base/stage-I.yaml             StatefulSet, PodDisruptionBudget, HorizontalPodAutoscaler of a stage
    base/keys/                    CURVE keys of the gateway and of each stage; secret
    overlays/example/             where to say namespace, image and numbers of one's own

Pure but for :func:`write`: a plan and wishes in, documents out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, PlanError
from onnxsplit.numbers import whole_problem
from onnxsplit.plan import MOST_NODES, Plan, Stage
from runtime.wire.keys import create_for, is_occupied

Document = dict[str, Any]

PORT, HTTP_PORT, GRPC_PORT = 5555, 8000, 8001
_USER = 10001
_ROOM_BYTES = 512 << 20  # of a process beside its stage
_QUEUE = "512M"  # of requests that wait at the gateway; those in flight have a quarter of what is free
_HEALTH = "/run/onnxsplit/health"
_FRESH_S = 15
_MI = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """What manifests are to say beyond the plan.

    Attributes:
        name: of all objects, and of the model.
        image: that has onnxsplit.
        claim: a PersistentVolumeClaim with the plan, mounted at ``/plans/NAME.plan``; None where the image has it.
        most_replicas: up to which a stage is scaled.
        utilisation: of a stage's nodes, that scaling aims at.
        custom_ops: libraries of custom ops, for nodes of stages that need some: by their paths in the image, or
            ``onnxruntime-extensions``, which the image has installed.
    """

    name: str
    image: str
    claim: str | None = None
    most_replicas: int = 8
    utilisation: float = 0.8
    custom_ops: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what Kubernetes would.

        Raises:
            InputError: naming the wish.
        """
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise InputError(
                f"{self.name!r} is no name for Kubernetes; allowed: up to 40 small letters, digits and '-', beginning "
                "with a letter. Give another with --name"
            )
        if not self.image or any(c.isspace() for c in self.image):
            raise InputError(f"{self.image!r} is no image")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation is above 0 and at most 1, not {self.utilisation:g}")
        problem = whole_problem("--max-replicas", self.most_replicas, 1, MOST_NODES)
        if problem:
            raise InputError(problem)


def name_of(plan: Plan) -> str:
    """A name for Kubernetes made of the model's."""
    text = re.sub(r"[^a-z0-9]+", "-", plan.model.name.removesuffix(".onnx").lower()).strip("-")
    return re.sub(r"^[^a-z]+", "", text)[:40].rstrip("-") or "model"


def manifests(plan: Plan, wishes: DeployOptions) -> dict[str, list[Document]]:
    """The documents of every file, by path.

    Raises:
        InputError: a wish cannot be.
    """
    wishes.check()
    if plan.custom_ops and not wishes.custom_ops:
        names = ", ".join(repr(library.name) for library in plan.custom_ops)
        raise InputError(
            f"nodes of this plan need the custom op libraries {names}; say where the image has them, with --custom-ops "
            "FILE.so for each, or --custom-ops onnxruntime-extensions"
        )
    stages = [f"stage-{stage.index}" for stage in plan.stages]
    files = {"base/gateway.yaml": _gateway(wishes, stages)}
    for stage in plan.stages:
        files[f"base/stage-{stage.index}.yaml"] = _stage(stage, wishes)
    files["base/kustomization.yaml"] = [_kustomization(stages, wishes, [Path(path).name for path in files])]
    files["overlays/example/kustomization.yaml"] = [_overlay(plan, wishes)]
    return files


def write(plan: Plan, wishes: DeployOptions, folder: Path) -> list[Path]:
    """Write manifests, and new keys for them; the files without the keys.

    Raises:
        InputError: a wish cannot be.
        PlanError: there is something at ``folder``.
        MissingDependency: PyYAML is not installed.
    """
    files = manifests(plan, wishes)
    if is_occupied(folder):
        raise PlanError(f"{folder} is there already; nothing was touched. Choose another place with -o DIR")
    texts = {path: to_yaml(documents) for path, documents in files.items()}
    try:
        (folder / "base").mkdir(parents=True)
    except OSError as error:
        raise PlanError(f"cannot write {folder}: {error.strerror}. Choose another place with -o DIR") from error
    create_for(folder / "base" / "keys", tuple(f"stage-{stage.index}" for stage in plan.stages))
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return [folder / path for path in texts]


def to_yaml(documents: list[Document]) -> str:
    """Documents of one file.

    Raises:
        MissingDependency: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("manifests need PyYAML: pip install 'onnxsplit[deploy]'") from error

    dumper = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text: str = "---\n".join(yaml.dump(one, Dumper=dumper, sort_keys=False, width=120) for one in documents)
    return text


def _place(wishes: DeployOptions) -> str:
    """Where the plan is in the gateway's container; the model is called by it."""
    return f"/plans/{wishes.name}.plan"


def _labels(wishes: DeployOptions, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": wishes.name, "app.kubernetes.io/component": part}


def _object(kind: str, version: str, name: str, labels: Mapping[str, str], spec: Document) -> Document:
    metadata = {"name": name, "labels": dict(labels)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


# The gateway


def _gateway(wishes: DeployOptions, stages: list[str]) -> list[Document]:
    labels = _labels(wishes, "gateway")
    words = [
        "serve",
        _place(wishes),
        "--launcher",
        "none",
        "--elastic",
        "--bind",
        f"tcp://0.0.0.0:{PORT}",
        "--keys",
        "/keys/own",
    ]
    words += ["--max-queue-bytes", _QUEUE]
    words += ["--host", "0.0.0.0", "--http-port", str(HTTP_PORT), "--grpc-port", str(GRPC_PORT)]  # noqa: S104
    ports = {"http": HTTP_PORT, "grpc": GRPC_PORT, "nodes": PORT}
    container = _container("gateway", wishes, words) | {
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "startupProbe": _http("live", every=2, failures=30),
        "livenessProbe": _http("live", every=10, failures=3),
        "readinessProbe": _http("ready", every=2, failures=1),
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    }
    volumes = []
    if wishes.claim is not None:
        container["volumeMounts"].append({"name": "plan", "mountPath": _place(wishes), "readOnly": True})
        volumes.append({"name": "plan", "persistentVolumeClaim": {"claimName": wishes.claim, "readOnly": True}})
    return [
        _object(
            "Deployment",
            "apps/v1",
            f"{wishes.name}-gateway",
            labels,
            {
                "replicas": 1,  # two coordinators would share the nodes of none
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": _pod(labels, wishes, container, f"{wishes.name}-keys-gateway", stages, volumes, grace_s=45),
            },
        ),
        _object(
            "Service",
            "v1",
            wishes.name,
            labels,
            {
                "selector": labels,
                "ports": [{"name": n, "port": ports[n], "targetPort": n} for n in ("http", "grpc")],
            },
        ),
        _object(
            "Service",
            "v1",
            f"{wishes.name}-coordinator",
            labels,
            {
                "clusterIP": "None",  # nodes reach all ports of the pod itself
                "publishNotReadyAddresses": True,  # it is ready when they have come
                "selector": labels,
                "ports": [{"name": "nodes", "port": PORT, "targetPort": "nodes"}],
            },
        ),
    ]


def _http(what: str, *, every: int, failures: int) -> Document:
    return {
        "httpGet": {"path": f"/v2/health/{what}", "port": "http"},
        "periodSeconds": every,
        "failureThreshold": failures,
        "timeoutSeconds": 2,
    }


# A stage


def _stage(stage: Stage, wishes: DeployOptions) -> list[Document]:
    name, labels = f"{wishes.name}-stage-{stage.index}", _labels(wishes, f"stage-{stage.index}")
    words = ["node", "--connect", f"tcp://{wishes.name}-coordinator:{PORT}", "--stage", str(stage.index)]
    words += ["--keys", "/keys/own", "--health", _HEALTH, "--rejoin", "3600", "--no-shared-memory"]
    words += [word for library in wishes.custom_ops if stage.custom_ops for word in ("--custom-ops", library)]
    container = _container("node", wishes, words) | {
        "livenessProbe": _shell(
            f"test $(($(date +%s) - $(stat -c %Y {_HEALTH}))) -lt {_FRESH_S}", every=5, failures=3, first=20
        ),
        "readinessProbe": _shell(f"grep -qx ready {_HEALTH}", every=2, failures=2),
        "resources": _resources(stage),
    }
    container["volumeMounts"] += [
        {"name": "cache", "mountPath": "/cache"},
        {"name": "run", "mountPath": "/run/onnxsplit"},
    ]
    container["env"].append({"name": "XDG_CACHE_HOME", "value": "/cache"})
    size = 2 * sum(entry.size_bytes for entry in stage.files) + _ROOM_BYTES  # fetched, and packed
    volumes = [
        {"name": "cache", "emptyDir": {"sizeLimit": f"{-(-size // _MI)}Mi"}},
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    pod = _pod(
        labels, wishes, container, f"{wishes.name}-keys-stage-{stage.index}", ["coordinator"], volumes, grace_s=40
    )
    apart = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    pod["spec"]["affinity"] = {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": apart}]
        }
    }
    return [
        _object(
            "StatefulSet",
            "apps/v1",
            name,
            labels,
            {
                "serviceName": f"{wishes.name}-coordinator",
                "replicas": stage.replicas,
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": labels},
                "template": pod,
            },
        ),
        _object(
            "PodDisruptionBudget",
            "policy/v1",
            name,
            labels,
            {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
        ),
        _object("HorizontalPodAutoscaler", "autoscaling/v2", name, labels, _autoscaler(stage, name, wishes)),
    ]


def _autoscaler(stage: Stage, name: str, wishes: DeployOptions) -> Document:
    """By our own metric, which the gateway has for every node: the share of time its session ran."""
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name},
        "minReplicas": stage.replicas,
        "maxReplicas": max(wishes.most_replicas, stage.replicas),
        "metrics": [
            {
                "type": "External",
                "external": {
                    "metric": {
                        "name": "onnxsplit_node_utilisation_ratio",
                        "selector": {"matchLabels": {"model": wishes.name, "stage": str(stage.index)}},
                    },
                    "target": {"type": "AverageValue", "averageValue": f"{round(wishes.utilisation * 1000)}m"},
                },
            }
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
    }


def _resources(stage: Stage) -> Document:
    memory = f"{-(-(stage.peak_memory_bytes + _ROOM_BYTES) // _MI)}Mi"
    limits = {"memory": memory}
    if stage.provider.startswith("cuda"):
        limits["nvidia.com/gpu"] = "1"
    return {"requests": {"cpu": str(stage.threads), "memory": memory}, "limits": limits}


def _shell(test: str, *, every: int, failures: int, first: int = 0) -> Document:
    probe: Document = {"exec": {"command": ["sh", "-c", test]}, "periodSeconds": every, "failureThreshold": failures}
    return probe | ({"initialDelaySeconds": first} if first else {})


# What both have


def _container(name: str, wishes: DeployOptions, words: list[str]) -> Document:
    return {
        "name": name,
        "image": wishes.image,
        "args": words,
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108  of the container
        "volumeMounts": [{"name": "keys", "mountPath": "/keys"}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod(
    labels: Mapping[str, str],
    wishes: DeployOptions,
    container: Document,
    secret: str,
    allowed: list[str],
    volumes: list[Document],
    *,
    grace_s: int,
) -> Document:
    """A pod. Keys are copied out of the secret's volume: its folder can be read by all, which onnxsplit refuses."""
    copy = (
        "umask 077 && mkdir -p /keys/own && cp -RL /secret/*.key /secret/allowed /keys/own/ && chmod -R go= /keys/own"
    )
    taking = _container("keys", wishes, []) | {"command": ["sh", "-c", copy]}
    del taking["args"]
    taking["volumeMounts"].append({"name": "secret", "mountPath": "/secret", "readOnly": True})
    return {
        "metadata": {"labels": dict(labels)},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": grace_s,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [taking],
            "containers": [container],
            "volumes": [
                {"name": "secret", "secret": {"secretName": secret, "defaultMode": 0o440, "items": _items(allowed)}},
                {"name": "keys", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "tmp", "emptyDir": {}},
                *volumes,
            ],
        },
    }


def _items(allowed: list[str]) -> list[Document]:
    """Where the keys of a secret go."""
    own = [{"key": name, "path": name} for name in ("secret.key", "public.key")]
    return own + [{"key": f"{name}.key", "path": f"allowed/{name}.key"} for name in allowed]


def _kustomization(stages: list[str], wishes: DeployOptions, resources: list[str]) -> Document:
    secrets = [_secret(wishes, "gateway", "coordinator", stages)]
    secrets += [_secret(wishes, name, name, ["coordinator"]) for name in stages]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": resources,
        "secretGenerator": secrets,
    }


def _secret(wishes: DeployOptions, of: str, folder: str, allowed: list[str]) -> Document:
    files = [f"secret.key=keys/{folder}/secret.key", f"public.key=keys/{folder}/public.key"]
    files += [f"{name}.key=keys/{folder}/allowed/{name}.key" for name in allowed]
    return {"name": f"{wishes.name}-keys-{of}", "files": files}


def _overlay(plan: Plan, wishes: DeployOptions) -> Document:
    image, _, tag = wishes.image.rpartition(":") if ":" in wishes.image.rpartition("/")[2] else (wishes.image, "", "")
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "default",
        "resources": ["../../base"],
        "images": [{"name": image, "newTag": tag or "latest"}],
        "replicas": [{"name": f"{wishes.name}-stage-{s.index}", "count": s.replicas} for s in plan.stages],
    }
