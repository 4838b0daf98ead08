"""The manifests at work: their commands, environment, volumes and probes, in network namespaces instead of pods."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import threading
import urllib.error
from contextlib import contextmanager

import build
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from cluster import Cluster, Pod, need_namespaces
from rendered import kustomized
from waiting import wait_until

from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import run_stages
from runtime.deploy import kserve
from runtime.deploy.folder import write
from runtime.deploy.kubernetes import DeployOptions
from runtime.wire.keys import revoke

X = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
TENSOR = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": X.ravel().tolist()}
ASKED = json.dumps({"inputs": [TENSOR]}).encode()
INFER = "/v2/models/reader/infer"


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    need_namespaces()


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of one model in two and in three stages, in folders of the same name."""
    folder = tmp_path_factory.mktemp("plans")
    model = build.save(build.chain(), folder)
    for stages in (2, 3):
        (folder / str(stages)).mkdir()
        partition(model, stages=stages, out=folder / str(stages) / "reader.plan", costs="analytic")
    return {f"plans-{stages}": folder / str(stages) / "reader.plan" for stages in (2, 3)}


@pytest.fixture(scope="module")
def wanted(plans):
    plan = plans["plans-2"]
    return run_stages(plan, load_plan(plan), {"x": X}, threads=1)["y"].ravel()


@pytest.fixture
def cluster(plans, python_environment):
    with Cluster(python_environment, plans) as running:
        yield running


def deploy(plans, claim: str, folder, **options):
    """Write the manifests of a plan; the release, and the objects that Kustomize makes of them."""
    options = {"image": "registry.example/onnxsplit:1", "most_replicas": 4, **options}
    written = write(load_plan(plans[claim]), DeployOptions(name="reader", claim=claim, **options), folder)
    return written.release, kustomized(written.overlay)


def passes(pods: list[Pod], probe: str) -> bool:
    return all(pod.probe(probe) for pod in pods)


def certificate(folder) -> dict:
    """A Secret of the type kubernetes.io/tls."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate; install it with: apt-get install openssl")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=reader"]
    subprocess.run(
        [*command, "-keyout", folder / "tls.key", "-out", folder / "tls.crt"], check=True, capture_output=True
    )
    data = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in ("tls.crt", "tls.key")}
    return {"kind": "Secret", "metadata": {"name": "web"}, "type": "kubernetes.io/tls", "data": data}


def test_gateway_and_nodes_serve_with_token_and_tls_at_the_ports_that_policies_name(plans, cluster, wanted, tmp_path):
    _, objects = deploy(
        plans, "plans-2", tmp_path / "m", token=True, tls_secret="web", network_policy=True, service_monitor=True
    )
    cluster.apply([certificate(tmp_path), *objects])
    (gateway,) = cluster.run("Deployment")
    wait_until(lambda: gateway.probe("startupProbe"), every_s=0.2)
    assert not gateway.probe("readinessProbe"), "no node has connected"
    nodes = cluster.run("StatefulSet")
    cluster.wait_until_ready(gateway, *nodes)
    for probe in ("startupProbe", "livenessProbe"):
        assert passes([gateway, *nodes], probe)
    token = (tmp_path / "m" / "base" / "keys" / "token").read_text()
    assert gateway.get("https", 8000, INFER, ASKED)[0] == 401
    status, body = gateway.get("https", 8000, INFER, ASKED, Authorization=f"Bearer {token}")
    assert status == 200, body
    assert np.allclose(json.loads(body)["outputs"][0]["data"], wanted, atol=1e-5)
    (monitor,) = [one for one in objects if one["kind"] == "ServiceMonitor"]
    (endpoint,) = monitor["spec"]["endpoints"]
    status, body = gateway.get(endpoint["scheme"], gateway.ports[endpoint["port"]], endpoint["path"])
    assert status == 401
    secret = endpoint["authorization"]["credentials"]
    (found,) = [d for d in objects if d["kind"] == "Secret" and d["metadata"]["name"] == secret["name"]]
    bearer = base64.b64decode(found["data"][secret["key"]]).decode()
    status, body = gateway.get("https", 8000, "/metrics", Authorization=f"Bearer {bearer}")
    assert (status, b"onnxsplit_node_utilisation_ratio" in body) == (200, True)
    assert gateway.listens() == set(gateway.ports.values()) == {8000, 8001, 5555, 5556, 5557}
    for node in nodes:
        assert node.listens() == set(node.ports.values()) == {5558}
    assert gateway.end() == 0, gateway.log()
    assert [node.end() for node in nodes] == [0] * len(nodes)


@contextmanager
def client(cluster, wanted):
    """A client of the Service that retries connections, and nothing else; yields the number of its answers so far."""
    ended, answers, failures = threading.Event(), [], []

    def run() -> None:
        while not ended.is_set() and not failures:
            for gateway in cluster.endpoints("reader"):
                try:
                    status, body = gateway.get("http", 8000, INFER, ASKED)
                except urllib.error.URLError as error:
                    if isinstance(error.reason, ConnectionRefusedError):
                        continue
                    failures.append(repr(error))
                    break
                right = status == 200 and np.allclose(json.loads(body)["outputs"][0]["data"], wanted, atol=1e-5)
                (answers if right else failures).append(gateway.address if right else (status, body))
                break

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lambda: list(answers)
    finally:
        ended.set()
        thread.join(60)
    assert not failures, failures


@pytest.mark.parametrize(("old", "new"), [("plans-2", "plans-3"), ("plans-3", "plans-2")])
def test_a_plan_with_other_stages_replaces_one_that_serves_and_no_request_fails(
    plans, cluster, wanted, tmp_path, old, new
):
    _, objects = deploy(plans, old, tmp_path / "m")
    cluster.apply(objects)
    (former,), former_nodes = cluster.run("Deployment"), cluster.run("StatefulSet")
    wait_until(lambda: cluster.endpoints("reader") == [former], former.log(), every_s=0.2)
    with client(cluster, wanted) as answers:
        wait_until(lambda: len(answers()) > 2)
        release, objects = deploy(plans, new, tmp_path / "m")
        cluster.apply(objects)
        (gateway,), nodes = cluster.run("Deployment"), cluster.run("StatefulSet")
        assert (len(former_nodes), len(nodes)) == (int(old[-1]), int(new[-1]))
        cluster.wait_until_ready(gateway, *nodes)
        assert cluster.endpoints("reader") == [former, gateway]
        assert former.end() == 0, former.log()
        wait_until(lambda: gateway.address in answers())
        version = "app.kubernetes.io/version"
        pruned = cluster.delete(lambda labels: version in labels and labels[version] != release)
        assert pruned == former_nodes
        for node in pruned:
            node.end()
        count = len(answers())
        wait_until(lambda: len(answers()) > count + 2)
    assert gateway.end() == 0, gateway.log()


def test_a_key_that_is_revoked_in_the_config_map_ends_its_nodes_without_a_restart(plans, cluster, wanted, tmp_path):
    _, objects = deploy(plans, "plans-2", tmp_path / "m")
    cluster.apply(objects)
    (gateway,), nodes = cluster.run("Deployment"), cluster.run("StatefulSet")
    cluster.wait_until_ready(gateway, *nodes)
    (revoked,) = [node for node in nodes if node.labels["onnxsplit/stage"] == "1"]
    keys = tmp_path / "m" / "base" / "keys"
    revoke(keys / "coordinator", "stage-1")
    shutil.rmtree(keys / "stage-1")
    _, objects = deploy(plans, "plans-2", tmp_path / "m")
    cluster.apply(objects)
    assert revoked.process.wait(60) == 1, revoked.log()
    assert "had its key revoked" in revoked.log()
    assert gateway.probe("readinessProbe"), "the grace covers the restart of a node"
    (template,) = [
        d["spec"]["template"]
        for d in objects
        if d["kind"] == "StatefulSet" and d["spec"]["template"]["metadata"]["labels"] == revoked.labels
    ]
    again = cluster.start(template)
    status, body = gateway.get("http", 8000, INFER, ASKED)
    assert status == 200, body
    assert np.allclose(json.loads(body)["outputs"][0]["data"], wanted, atol=1e-5)
    cluster.wait_until_ready(again, gateway)


def test_the_container_of_kserve_serves_the_plan_that_is_mounted(plans, cluster, wanted):
    options = kserve.KServeOptions(name="reader", image="onnxsplit:1", storage="pvc://plans/reader")
    runtime, service = kserve.documents(load_plan(plans["plans-2"]), options)["kserve.yaml"]
    spec = runtime["spec"]
    spec["containers"][0]["volumeMounts"].append({"name": "models", "mountPath": "/mnt/models"})  # as KServe does
    spec["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": "plans-2"}})
    spec["terminationGracePeriodSeconds"] = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    pod = cluster.start({"metadata": {"labels": {}}, "spec": spec})
    cluster.wait_until_ready(pod)
    assert passes([pod], "startupProbe")
    assert passes([pod], "livenessProbe")
    status, body = pod.get("http", 8080, INFER, ASKED)
    assert status == 200, body
    assert np.allclose(json.loads(body)["outputs"][0]["data"], wanted, atol=1e-5)
    assert pod.listens() == {8080, 9000}
    assert pod.end() == 0, pod.log()
