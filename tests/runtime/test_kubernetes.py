"""Manifests: they fit the schemas of Kubernetes, and they contain the plan's figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import msgspec.structs
import pytest
import yaml

from onnxsplit.errors import InputError, PlanError
from onnxsplit.plan import CustomOps
from onnxsplit.plan_files import parse_plan
from runtime.deploy.kubernetes import DeployOptions, manifests, name_of, to_yaml, write
from runtime.wire.keys import Keys

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "onnxsplit" / "golden_plan.json"
EXAMPLE = ROOT / "docs" / "deploy" / "kubernetes"
OPTIONS = DeployOptions(name="reader", image="registry.example/onnxsplit:0.1.0", claim="plans")


@pytest.fixture
def plan():
    return parse_plan(GOLDEN.read_bytes(), where=GOLDEN)


def of_kind(files, kind: str) -> dict:
    return {d["metadata"]["name"]: d for documents in files.values() for d in documents if d["kind"] == kind}


@pytest.mark.parametrize("version", ["1.30", "1.34", kubernetes_validate.latest_version()])
def test_every_document_fits_the_schemas_of_kubernetes(plan, version):
    for path, documents in manifests(plan, OPTIONS).items():
        for document in documents:
            if document["kind"] != "Kustomization":
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
    name = f"reader-stage-{cuda.index}"
    (container,) = sets[name]["spec"]["template"]["spec"]["containers"]
    assert sets[name]["spec"]["replicas"] == scalers[name]["spec"]["minReplicas"] == 3
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"]["cpu"] == "2"
    assert container["args"][container["args"].index("--stage") + 1] == str(cuda.index)
    other = sets["reader-stage-0"]["spec"]["template"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in other["resources"]["limits"]


def test_the_words_in_containers_are_ones_that_our_commands_take(plan):
    from onnxsplit.cli.node import command as node
    from onnxsplit.cli.serve import command as serve

    files = manifests(plan, OPTIONS)
    (gateway,) = of_kind(files, "Deployment").values()
    for template, command in [(gateway, serve), *((s, node) for s in of_kind(files, "StatefulSet").values())]:
        words = template["spec"]["template"]["spec"]["containers"][0]["args"]
        command.make_context(words[0], words[1:])


def test_what_is_written_can_be_built_and_its_keys_open_the_links(plan, tmp_path):
    write(plan, OPTIONS, tmp_path / "out")
    keys = tmp_path / "out" / "base" / "keys"
    for stage in plan.stages:
        own = Keys(keys / f"stage-{stage.index}")
        assert own.pair.public in Keys(keys / "coordinator").allowed
        assert own.of("coordinator") == Keys(keys / "coordinator").pair.public
    assert (keys / "stage-0" / "secret.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(PlanError, match="nothing was touched"):
        write(plan, OPTIONS, tmp_path / "out")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: Kustomize did not build it")
    command = ["kubectl", "kustomize", str(tmp_path / "out" / "overlays" / "example")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    documents = list(yaml.safe_load_all(built.stdout))
    secrets = {d["metadata"]["name"] for d in documents if d["kind"] == "Secret"}
    assert len(secrets) == len(plan.stages) + 1
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        if document["kind"] in ("Deployment", "StatefulSet"):
            (used,) = [
                v["secret"]["secretName"] for v in document["spec"]["template"]["spec"]["volumes"] if "secret" in v
            ]
            assert used in secrets, "Kustomize gave it the name with the hash of its content"


def test_the_probes_of_a_node_tell_the_truth(plan, tmp_path):
    from runtime.node.health import write_health

    (container,) = of_kind(manifests(plan, OPTIONS), "StatefulSet")["reader-stage-0"]["spec"]["template"]["spec"][
        "containers"
    ]
    health = tmp_path / "health"

    def passes(probe: str) -> bool:
        shell, _, test = container[probe]["exec"]["command"]
        test = test.replace("/run/onnxsplit/health", str(health))
        return subprocess.run([shell, "-c", test], check=False, capture_output=True).returncode == 0

    assert not passes("livenessProbe")
    write_health(health, "loading")
    assert (passes("livenessProbe"), passes("readinessProbe")) == (True, False)
    write_health(health, "ready")
    assert (passes("livenessProbe"), passes("readinessProbe")) == (True, True)
    subprocess.run(["touch", "-d", "1 minute ago", health], check=True)
    assert not passes("livenessProbe"), "it was not written for a long time"


def test_names_and_options_that_kubernetes_would_refuse_are_refused(plan, tmp_path):
    named = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, name="7 Big_Model.v2.onnx"))
    assert name_of(named) == "big-model-v2"
    for wrong, words in (
        ({"name": "Big"}, "not a name for Kubernetes"),
        ({"image": "a b"}, "not a container image"),
        ({"utilisation": 1.5}, "--utilisation"),
        ({"most_replicas": 0}, "--max-replicas"),
    ):
        with pytest.raises(InputError, match=words):
            manifests(plan, DeployOptions(**{"name": "m", "image": "i", **wrong}))


def test_no_value_changes_the_structure_of_the_manifests(plan):
    image, claim = "a&b*{c}#$d:${name}", "x: [y\n- z"
    files = manifests(plan, replace(OPTIONS, image=image, claim=claim))
    pod = of_kind(files, "Deployment")["reader-gateway"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == image
    assert pod["volumes"][-1]["persistentVolumeClaim"]["claimName"] == claim
    for documents in files.values():
        assert list(yaml.safe_load_all(to_yaml(documents))) == documents


def test_the_example_in_the_docs_is_what_is_written(plan):
    for path, documents in manifests(plan, OPTIONS).items():
        assert (EXAMPLE / path).read_text() == to_yaml(documents), "run: python tests/runtime/test_kubernetes.py"


def test_the_command_says_what_comes_next(chain_plan, tmp_path, python_environment):
    command = [sys.executable, "-P", "-m", "onnxsplit", "deploy", "kubernetes", chain_plan, "--image", "i:1", "-o", "m"]
    done = subprocess.run(
        [*map(str, command), "--json"], env=python_environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["name"] == "model"
    assert (tmp_path / "m" / "base" / "gateway.yaml").is_file()


if __name__ == "__main__":
    for file, found in manifests(parse_plan(GOLDEN.read_bytes(), where=GOLDEN), OPTIONS).items():
        (EXAMPLE / file).parent.mkdir(parents=True, exist_ok=True)
        (EXAMPLE / file).write_text(to_yaml(found))


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
