"""Manifests: they fit the schemas of Kubernetes, and they contain the plan's figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import msgspec.structs
import pytest
import yaml
from rendered import kustomized, of_kind, pods, word_after

from onnxsplit.errors import InputError
from onnxsplit.plan import CustomOps
from onnxsplit.plan_files import parse_plan
from runtime.deploy import kubernetes
from runtime.deploy.documents import to_yaml
from runtime.deploy.folder import write
from runtime.deploy.kubernetes import DeployOptions
from runtime.deploy.names import name_of
from runtime.wire.keys import Keys

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "onnxsplit" / "golden_plan.json"
REWRITE = "run: PYTHONPATH=.:tests/support python tests/runtime/test_kubernetes.py"
EXAMPLE = ROOT / "docs" / "deploy" / "kubernetes"
OPTIONS = DeployOptions(name="reader", image="registry.example/onnxsplit:0.1.0", claim="plans")
ALL = replace(OPTIONS, token=True, tls_secret="web", network_policy=True, service_monitor=True)
OWN_KINDS = ("Kustomization", "ServiceMonitor")  # whose schemas are not those of Kubernetes


@pytest.fixture
def plan():
    return parse_plan(GOLDEN.read_bytes(), where=GOLDEN)


def manifests(plan, options) -> dict:
    return kubernetes.manifests(plan, options)[1]


@pytest.mark.parametrize("version", ["1.30", "1.34", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("options", [OPTIONS, ALL])
def test_every_document_fits_the_schemas_of_kubernetes(plan, version, options):
    for path, documents in manifests(plan, options).items():
        for document in documents:
            if document["kind"] not in OWN_KINDS:
                kubernetes_validate.validate(document, version, strict=True)
            assert "\t" not in to_yaml([document]), path


def test_a_document_with_a_mistake_does_not_fit(plan):
    service = of_kind(manifests(plan, OPTIONS), "Service")["reader"]
    service["spec"]["port"] = 80
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, kubernetes_validate.latest_version(), strict=True)


def test_each_stage_has_what_the_plan_says_it_needs(plan):
    cuda = msgspec.structs.replace(plan.stages[-1], provider="cuda:0", replicas=3, threads=2)
    plan = msgspec.structs.replace(plan, stages=(*plan.stages[:-1], cuda))
    files = manifests(plan, OPTIONS)
    sets, scalers = of_kind(files, "StatefulSet"), of_kind(files, "HorizontalPodAutoscaler")
    assert len(sets) == len(of_kind(files, "PodDisruptionBudget")) == len(plan.stages)
    release, _ = kubernetes.manifests(plan, OPTIONS)
    name = f"reader-stage-{cuda.index}-{release}"
    (container,) = sets[name]["spec"]["template"]["spec"]["containers"]
    assert scalers[name]["spec"]["minReplicas"] == 3
    assert scalers[name]["spec"]["scaleTargetRef"]["name"] == name
    assert not any("replicas" in one["spec"] for one in sets.values()), "applying them would undo the scaling"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["cpu"] == "2"
    assert container["args"][container["args"].index("--stage") + 1] == str(cuda.index)
    other = sets[f"reader-stage-0-{release}"]["spec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in other["resources"]["limits"]


@pytest.mark.parametrize("options", [OPTIONS, ALL])
def test_the_words_in_containers_are_ones_that_our_commands_take(plan, options):
    from onnxsplit.cli.node import command as node
    from onnxsplit.cli.serve import command as serve

    files = manifests(plan, options)
    (gateway,) = of_kind(files, "Deployment").values()
    for template, command in [(gateway, serve), *((s, node) for s in of_kind(files, "StatefulSet").values())]:
        words = template["spec"]["template"]["spec"]["containers"][0]["args"]
        command.make_context(words[0], words[1:])


@pytest.mark.parametrize("options", [OPTIONS, ALL])
def test_what_is_written_can_be_built_and_its_keys_open_the_links(plan, tmp_path, options):
    written = write(plan, options, tmp_path / "out")
    keys = tmp_path / "out" / "base" / "keys"
    for stage in plan.stages:
        own = Keys(keys / f"stage-{stage.index}")
        assert own.pair.public in Keys(keys / "coordinator").allowed
        assert own.of("coordinator") == Keys(keys / "coordinator").pair.public
    assert (keys / "stage-0" / "secret.key").stat().st_mode & 0o777 == 0o600
    documents = kustomized(written.overlay)
    named = {(d["kind"], d["metadata"]["name"]) for d in documents} | {("Secret", "web")}
    for document in documents:
        if document["kind"] not in OWN_KINDS:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        if document["kind"] in ("Deployment", "StatefulSet"):
            volumes = document["spec"]["template"]["spec"]["volumes"]
            used = {("Secret", v["secret"]["secretName"]) for v in volumes if "secret" in v}
            used |= {("ConfigMap", v["configMap"]["name"]) for v in volumes if "configMap" in v}
            assert used <= named, "Kustomize gave them the names with the hashes of their contents"
    (allowed,) = [d for d in documents if d["kind"] == "ConfigMap"]
    assert set(allowed["data"]) == {f"stage-{stage.index}.key" for stage in plan.stages}


def test_pods_run_without_rights_and_within_limits(plan):
    for pod in pods(manifests(plan, ALL)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec["initContainers"], *spec["containers"]):
            security = container["securityContext"]
            assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
            assert security["capabilities"] == {"drop": ["ALL"]}
            for resources in (container["resources"]["requests"], container["resources"]["limits"]):
                assert resources["memory"]
                assert resources["ephemeral-storage"]
        for container in spec["containers"]:
            startup, liveness = container["startupProbe"], container["livenessProbe"]
            assert startup["failureThreshold"] * startup["periodSeconds"] >= 300
            assert liveness["failureThreshold"] * liveness["periodSeconds"] <= 30
        assert spec["terminationGracePeriodSeconds"] > 30  # what onnxsplit takes to answer accepted requests
    (gateway,) = of_kind(manifests(plan, ALL), "Deployment").values()
    (container,) = gateway["spec"]["template"]["spec"]["containers"]
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    longest_s = pause_s + float(word_after(container, "--drain"))
    assert gateway["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > longest_s
    assert float(word_after(container, "--ready-grace")) >= 60


def size(text: str) -> int:
    assert text.endswith("Mi")
    return int(text.removesuffix("Mi")) << 20


@pytest.mark.parametrize("size_bytes", [0, 1, 5 << 20, 70_000_000_001])
def test_a_stage_fits_the_disk_and_the_memory_of_its_pod(plan, size_bytes):
    entry = msgspec.structs.replace(plan.stages[0].files[0], size_bytes=size_bytes)
    stage = msgspec.structs.replace(plan.stages[0], files=(entry,), peak_memory_bytes=2 * size_bytes)
    plan = msgspec.structs.replace(plan, stages=(stage, *plan.stages[1:]))
    spec = pods(manifests(plan, OPTIONS))[1]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume.get("emptyDir") for volume in spec["volumes"]}
    limit, cache = size(volumes["cache"]["sizeLimit"]), int(word_after(container, "--cache"))
    assert size_bytes <= cache < limit
    on_disk = sum(size(v["sizeLimit"]) for v in volumes.values() if v and "medium" not in v)
    for resources in (container["resources"]["requests"], container["resources"]["limits"]):
        assert size(resources["ephemeral-storage"]) > on_disk
        assert size(resources["memory"]) > 2 * size_bytes
    gateway = pods(manifests(plan, OPTIONS))[0]["spec"]["containers"][0]
    assert float(word_after(gateway, "--ready-grace")) >= 60 + size_bytes / (50 << 20)


def test_the_probes_of_a_node_tell_the_truth(plan, tmp_path):
    from runtime.node.health import write_health

    (container,) = pods(manifests(plan, OPTIONS))[1]["spec"]["containers"]
    health = tmp_path / "health"

    def passes(probe: str) -> bool:
        shell, _, test = container[probe]["exec"]["command"]
        test = test.replace("/run/onnxsplit/health", str(health))
        return subprocess.run([shell, "-c", test], check=False, capture_output=True).returncode == 0

    assert not passes("livenessProbe")
    write_health(health, "loading")
    assert [passes(probe) for probe in ("livenessProbe", "readinessProbe", "startupProbe")] == [True, False, False]
    write_health(health, "ready")
    assert [passes(probe) for probe in ("livenessProbe", "readinessProbe", "startupProbe")] == [True, True, True]
    subprocess.run(["touch", "-d", "1 minute ago", health], check=True)
    assert not passes("livenessProbe"), "it was not written for a long time"


def test_names_and_options_that_kubernetes_would_refuse_are_refused(plan, tmp_path):
    named = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, name="7 Big_Model.v2.onnx"))
    assert name_of(named) == "big-model-v2"
    for wrong, words in (
        ({"name": "Big"}, "not a name for Kubernetes"),
        ({"name": "a" * 33}, "up to 32"),
        ({"image": "a b"}, "not a container image"),
        ({"claim": "Plans"}, "--claim 'Plans' is not the name"),
        ({"claim": "plans/../x"}, "a folder inside the volume"),
        ({"tls_secret": ""}, "--tls-secret '' is not the name"),
        ({"utilisation": 1.5}, "--utilisation"),
        ({"most_replicas": 0}, "--max-replicas"),
    ):
        with pytest.raises(InputError, match=words):
            manifests(plan, DeployOptions(**{"name": "m", "image": "i", **wrong}))


def test_no_value_changes_the_structure_of_the_manifests(plan):
    library, folder = "a&b*{c}#$d:${name}", "x: [y\n- z"
    first = msgspec.structs.replace(plan.stages[0], custom_ops=("a",))
    plan = msgspec.structs.replace(plan, stages=(first, *plan.stages[1:]))
    files = manifests(plan, replace(OPTIONS, custom_ops=(library,), claim=f"plans/{folder}"))
    gateway, node, *_ = pods(files)
    assert library in node["spec"]["containers"][0]["args"]
    assert gateway["spec"]["volumes"][-1]["persistentVolumeClaim"]["claimName"] == "plans"
    assert gateway["spec"]["containers"][0]["volumeMounts"][-1]["subPath"] == folder
    for documents in files.values():
        assert list(yaml.safe_load_all(to_yaml(documents))) == documents


def test_the_example_in_the_docs_is_what_is_written(plan):
    for path, documents in manifests(plan, OPTIONS).items():
        assert (EXAMPLE / path).read_text() == to_yaml(documents), REWRITE


def test_the_command_says_what_comes_next(chain_plan, tmp_path, python_environment):
    command = [sys.executable, "-P", "-m", "onnxsplit", "deploy", "kubernetes", chain_plan, "--image", "i:1", "-o", "m"]
    done = subprocess.run(
        [*map(str, command), "--json"], env=python_environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["name"] == "model"
    assert said["release"] in said["prune"]
    assert (tmp_path / "m" / "base" / "gateway.yaml").is_file()
    again = subprocess.run(
        [*map(str, command)], env=python_environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said["apply"] in again.stdout
    assert said["prune"] in again.stdout


def test_nodes_of_stages_with_custom_ops_name_their_libraries(plan):
    first = msgspec.structs.replace(plan.stages[0], custom_ops=("libops.so",))
    library = CustomOps(name="libops.so", sha256="0" * 64)
    plan = msgspec.structs.replace(plan, stages=(first, *plan.stages[1:]), custom_ops=(library,))
    with pytest.raises(InputError, match=r"libops\.so.*where the image has them"):
        manifests(plan, OPTIONS)
    files = manifests(plan, replace(OPTIONS, custom_ops=("/opt/libops.so",)))
    sets = of_kind(files, "StatefulSet").values()
    words = [one["spec"]["template"]["spec"]["containers"][0]["args"] for one in sets]
    assert ["/opt/libops.so" in one for one in words] == [True] + [False] * (len(plan.stages) - 1)


if __name__ == "__main__":
    for file, found in manifests(parse_plan(GOLDEN.read_bytes(), where=GOLDEN), OPTIONS).items():
        (EXAMPLE / file).parent.mkdir(parents=True, exist_ok=True)
        (EXAMPLE / file).write_text(to_yaml(found))
