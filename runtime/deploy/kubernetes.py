"""Kubernetes manifests for a plan, in Kustomize's layout. The cluster starts, restarts and scales the nodes.

    base/kustomization.yaml       the resources, and the Secrets and the ConfigMap that are made of the keys beside it
    base/gateway.yaml             Deployment of the coordinator and its gateway; Services for clients and for nodes
    base/stage-I.yaml             StatefulSet, PodDisruptionBudget and HorizontalPodAutoscaler of a stage
    base/network.yaml             NetworkPolicies, by option
    base/monitor.yaml             ServiceMonitor, by option
    base/keys/                    CURVE keys of the gateway and of each stage, and the token; secret
    overlays/example/             namespace, to be changed by the user

A *release* is the short identity of a plan and its pods. Objects of nodes carry it in their names and labels, so that
those of two releases stand side by side while the gateway of one replaces that of the other.

The documents are written down in ``templates/kubernetes.yaml``. This module computes the values and fills them in.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxsplit.errors import InputError
from onnxsplit.numbers import whole_problem
from onnxsplit.plan import Plan, Stage
from onnxsplit.plan_base import MOST_NODES
from runtime.deploy.documents import Document, filled, templates
from runtime.deploy.names import check_name, check_object, pull_policy
from runtime.deploy.sizes import node_sizes, quantity, restart_s, states_bytes

_RELEASE_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """The options of manifests.

    Attributes:
        name: Name of the model, and the beginning of every object's name.
        image: Container image with onnxsplit.
        claim: PersistentVolumeClaim with the plan, and after a ``/`` the plan's folder on it; mounted at
            ``/plans/NAME.plan``. None: the image holds the plan.
        most_replicas: Largest number of nodes to which a stage is scaled.
        utilisation: Utilisation of a stage's nodes at which scaling aims, above 0 and at most 1.
        custom_ops: Libraries of custom ops for nodes of the stages that need some: paths in the image, or
            ``onnxruntime-extensions`` where the image has that package.
        token: Whether requests must carry the token that lies among the keys.
        tls_secret: Secret of the type ``kubernetes.io/tls`` with which the gateway serves; None serves without TLS.
        network_policy: Whether only the pods of a release may reach each other, and clients only the gateway.
        service_monitor: Whether the Prometheus operator is told of the gateway's metrics.
        revision: Any text. Another one makes another release of the same plan.
    """

    name: str
    image: str
    claim: str | None = None
    most_replicas: int = 8
    utilisation: float = 0.8
    custom_ops: tuple[str, ...] = ()
    token: bool = False
    tls_secret: str | None = None
    network_policy: bool = False
    service_monitor: bool = False
    revision: str = ""

    def check(self) -> None:
        """Refuse values that Kubernetes would refuse.

        Raises:
            InputError: A value is not allowed. The message names it.
        """
        check_name(self.name)
        pull_policy(self.image)
        if self.claim is not None:
            name, _, folder = self.claim.partition("/")
            check_object("--claim", name)
            if self.claim.endswith("/") or folder.startswith("/") or ".." in folder.split("/"):
                raise InputError(f"--claim {self.claim!r} must be NAME, or NAME/FOLDER with a folder inside the volume")
        if self.tls_secret is not None:
            check_object("--tls-secret", self.tls_secret)
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation must be above 0 and at most 1, not {self.utilisation:g}")
        problem = whole_problem("--max-replicas", self.most_replicas, 1, MOST_NODES)
        if problem:
            raise InputError(problem)


def check_custom_ops(plan: Plan, libraries: Sequence[str]) -> None:
    """Refuse a plan whose libraries of custom ops are not named.

    Raises:
        InputError: The plan needs custom ops and none are named.
    """
    if plan.custom_ops and not libraries:
        needed = ", ".join(repr(library.name) for library in plan.custom_ops)
        raise InputError(
            f"nodes of this plan need the custom op libraries {needed}; say where the image has them, with "
            "--custom-ops FILE.so for each, or --custom-ops onnxruntime-extensions"
        )


def stage_names(plan: Plan) -> tuple[str, ...]:
    """The names of the stages, as their keys have them."""
    return tuple(f"stage-{stage.index}" for stage in plan.stages)


def manifests(
    plan: Plan, options: DeployOptions, *, allowed: Sequence[str] | None = None, token: str = ""
) -> tuple[str, dict[str, list[Document]]]:
    """The release, and the documents of every file by the file's path.

    Args:
        plan: The plan.
        options: How to deploy it.
        allowed: Names of the keys that the gateway allows; those of the plan's stages when None.
        token: The token, if there is one; another token makes another release, because a gateway reads it once.

    Raises:
        InputError: An option is not allowed, or the plan needs custom ops and none are named.
        MissingDependency: PyYAML is not installed.
    """
    options.check()
    check_custom_ops(plan, options.custom_ops)
    release = _release(plan, options, token)
    documents = _pods(plan, options, release)
    names = stage_names(plan)
    values: dict[str, object] = {"name": options.name, "release": release, "endpoints": [_endpoint(options)]}
    found = templates("kubernetes")
    if options.network_policy:
        documents["base/network.yaml"] = filled(found["network"], values)
    if options.service_monitor:
        documents["base/monitor.yaml"] = filled(found["monitor"], values)
    values["resources"] = [Path(path).name for path in documents]
    values["allowed_files"] = [
        f"{name}.key=keys/coordinator/allowed/{name}.key" for name in (names if allowed is None else allowed)
    ]
    values["secrets"] = [
        _secret(options, "gateway", "coordinator", [], release),
        *(_secret(options, name, name, ["coordinator"], release) for name in names),
        *([_token_secret(options)] if options.token else []),
    ]
    documents["base/kustomization.yaml"] = filled(found["kustomization"], values)
    documents["overlays/example/kustomization.yaml"] = filled(found["overlay"], values)
    return release, documents


def replace_commands(name: str, release: str, overlay: Path, namespace: str) -> tuple[str, str]:
    """The commands that follow ``deploy``: the first applies a release and waits for it, the second removes others."""
    kubectl = f"kubectl -n {shlex.quote(namespace)}"
    label = "app.kubernetes.io"
    others = f"{label}/name={name},{label}/version,{label}/version!={release}"
    kinds = "statefulsets,horizontalpodautoscalers,poddisruptionbudgets,networkpolicies,services,secrets"
    return (
        f"kubectl apply -k {shlex.quote(str(overlay))} && {kubectl} rollout status deployment/{name}-gateway",
        f"{kubectl} wait --for=delete pods -l '{others},{label}/component=gateway' --timeout=5m && "
        f"{kubectl} delete {kinds} -l '{others}'",
    )


def _release(plan: Plan, options: DeployOptions, token: str) -> str:
    """The identity of a plan and of all that its pods are made of. It begins with a letter, so YAML reads a text."""
    pods = [
        document["spec"]
        for documents in _pods(plan, options, "").values()
        for document in documents
        if document["kind"] in ("Deployment", "StatefulSet")
    ]
    text = json.dumps([hashlib.sha256(plan.to_json()).hexdigest(), pods, token, options.revision], sort_keys=True)
    return f"r{hashlib.sha256(text.encode()).hexdigest()[:_RELEASE_DIGITS]}"


def _pods(plan: Plan, options: DeployOptions, release: str) -> dict[str, list[Document]]:
    """The documents of the gateway and of each stage."""
    found = templates("kubernetes")
    common = {
        "name": options.name,
        "image": options.image,
        "pull_policy": pull_policy(options.image),
        "release": release,
    }
    documents = {"base/gateway.yaml": filled(found["gateway"], common | _gateway_values(plan, options))}
    for stage in plan.stages:
        values = common | _stage_values(plan, stage, options)
        documents[f"base/stage-{stage.index}.yaml"] = filled(found["stage"], values)
    return documents


def _gateway_values(plan: Plan, options: DeployOptions) -> dict[str, object]:
    plan_path = f"/plans/{options.name}.plan"  # the gateway calls the model by it
    claim, _, folder = (options.claim or "").partition("/")
    plan_mount = {"name": "plan", "mountPath": plan_path, "readOnly": True} | ({"subPath": folder} if folder else {})
    plan_volume = {"name": "plan", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    states = states_bytes(plan)
    token, tls = options.token, options.tls_secret is not None
    access = ["--token-file", "/keys/own/token"] if token else []
    access += ["--tls-cert", "/tls/tls.crt", "--tls-key", "/tls/tls.key"] if tls else []
    return {
        "plan_path": plan_path,
        "plan_mounts": [plan_mount] if claim else [],
        "plan_volumes": [plan_volume] if claim else [],
        "cache_args": ["--cache-bytes", str(states)] if states else [],
        "ready_grace": restart_s(plan),
        "access_args": access,
        "copy_token": " && cp -L /token/token /keys/own/token" if token else "",
        "token_mounts": [_mount("token")] if token else [],
        "token_volumes": [_secret_volume("token", f"{options.name}-token")] if token else [],
        "tls_mounts": [_mount("tls")] if tls else [],
        "tls_volumes": [_secret_volume("tls", options.tls_secret)] if tls else [],
        "scheme": "HTTPS" if tls else "HTTP",
    }


def _mount(name: str) -> Document:
    return {"name": name, "mountPath": f"/{name}", "readOnly": True}


def _secret_volume(name: str, secret: str | None) -> Document:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": 0o440}}


def _stage_values(plan: Plan, stage: Stage, options: DeployOptions) -> dict[str, object]:
    sizes = node_sizes(plan, stage)
    memory, disk = quantity(sizes.memory), quantity(sizes.disk)
    limits = {"memory": memory, "ephemeral-storage": disk}
    if stage.provider.startswith("cuda"):
        limits["nvidia.com/gpu"] = "1"
    libraries = options.custom_ops if stage.custom_ops else ()
    return {
        "stage": stage.index,
        "replicas": stage.replicas,
        "most_replicas": max(options.most_replicas, stage.replicas),
        "utilisation": f"{round(options.utilisation * 1000)}m",
        "cpu": stage.threads,
        "memory": memory,
        "disk": disk,
        "limits": limits,
        "cache": sizes.cache,
        "cache_volume": quantity(sizes.cache_volume),
        "custom_ops_args": [word for library in libraries for word in ("--custom-ops", library)],
    }


def _secret(options: DeployOptions, owner: str, folder: str, allowed: list[str], release: str) -> Document:
    """The secret of a pod: its own key pair, and the public keys of the peers that it knows from the start."""
    sources = [f"secret.key=keys/{folder}/secret.key", f"public.key=keys/{folder}/public.key"]
    sources += [f"{name}.key=keys/{folder}/allowed/{name}.key" for name in allowed]
    labels = {"app.kubernetes.io/name": options.name, "app.kubernetes.io/version": release}
    return {"name": f"{options.name}-keys-{owner}", "files": sources, "options": {"labels": labels}}


def _token_secret(options: DeployOptions) -> Document:
    """The secret of the token, under a name that a ServiceMonitor can know."""
    stable = {"disableNameSuffixHash": True, "labels": {"app.kubernetes.io/name": options.name}}
    return {"name": f"{options.name}-token", "files": ["token=keys/token"], "options": stable}


def _endpoint(options: DeployOptions) -> Document:
    """Where and how Prometheus finds the metrics."""
    endpoint: Document = {"port": "http", "path": "/metrics"}
    if options.tls_secret is not None:  # the certificate is for the clients' name of the gateway
        endpoint |= {"scheme": "https", "tlsConfig": {"insecureSkipVerify": True}}
    if options.token:
        credentials = {"name": f"{options.name}-token", "key": "token"}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    return endpoint
