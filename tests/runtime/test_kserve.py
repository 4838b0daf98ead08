"""Objects for KServe: they have the fields that its definitions allow, and the plan's figures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import msgspec.structs
import pytest
from jsonschema import Draft202012Validator, ValidationError
from rendered import kustomized, of_kind, word_after

from onnxsplit.errors import InputError, PlanError
from onnxsplit.plan_files import parse_plan
from runtime.deploy.kserve import KServeOptions, documents, write

GOLDEN = Path(__file__).parents[1] / "onnxsplit" / "golden_plan.json"
OPTIONS = KServeOptions(name="reader", image="registry.example/onnxsplit:0.1.0", storage="pvc://plans/reader.plan")

TEXT, TEXTS, COUNT = (
    {"type": "string"},
    {"type": "object", "additionalProperties": {"type": "string"}},
    {"type": "integer"},
)


def fields(*required: str, **properties: object) -> dict:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


# The fields used here of KServe's definitions (config/crd/full, version 0.20). Containers, volumes and other fields of
# pods are checked against the schemas of Kubernetes.
FORMAT = fields("name", name=TEXT, version=TEXT)
RUNTIME = fields(
    "containers",
    annotations=TEXTS,
    labels=TEXTS,
    supportedModelFormats={
        "type": "array",
        "items": fields("name", name=TEXT, version=TEXT, autoSelect={"type": "boolean"}, priority=COUNT),
    },
    protocolVersions={"type": "array", "items": TEXT},
    containers={"type": "array"},
    volumes={"type": "array"},
)
SERVICE = fields(
    "predictor",
    predictor=fields(
        minReplicas=COUNT,
        maxReplicas=COUNT,
        terminationGracePeriodSeconds=COUNT,
        model=fields("modelFormat", modelFormat=FORMAT, protocolVersion=TEXT, runtime=TEXT, storageUri=TEXT),
    ),
)
KINDS = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): RUNTIME,
    ("serving.kserve.io/v1beta1", "InferenceService"): SERVICE,
}


@pytest.fixture
def plan():
    return parse_plan(GOLDEN.read_bytes(), where=GOLDEN)


def check(document: dict) -> None:
    schema = KINDS[document["apiVersion"], document["kind"]]
    Draft202012Validator(schema).validate(document["spec"])
    if document["kind"] == "ServingRuntime":
        pod = {name: document["spec"][name] for name in ("containers", "volumes")}
        meta = {"name": document["metadata"]["name"], "annotations": document["spec"]["annotations"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def both(plan, options=OPTIONS) -> tuple[dict, dict]:
    files = documents(plan, options)
    ((runtime,), (service,)) = (of_kind(files, kind).values() for _, kind in KINDS)
    return runtime, service


def test_the_objects_have_the_fields_that_kserve_defines(plan, tmp_path):
    write(plan, OPTIONS, tmp_path / "out")
    objects = kustomized(tmp_path / "out")
    assert {(one["apiVersion"], one["kind"]) for one in objects} == KINDS.keys()
    for one in objects:
        check(one)
        wrong = copy.deepcopy(one)
        wrong["spec"]["modelFormat"] = "onnxsplit"
        with pytest.raises(ValidationError):
            check(wrong)


def test_the_service_uses_the_runtime_with_the_plan_of_the_storage(plan):
    runtime, service = both(plan, replace(OPTIONS, least_replicas=2, most_replicas=5))
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert predictor["model"]["modelFormat"] in runtime["spec"]["supportedModelFormats"]
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert predictor["model"]["storageUri"] == "pvc://plans/reader.plan"
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 5)
    assert both(plan)[1]["spec"]["predictor"]["maxReplicas"] == 1
    assert predictor["terminationGracePeriodSeconds"] > 5 + 30


def test_the_container_serves_over_http_first_and_has_room_for_all_stages(plan):
    cuda = msgspec.structs.replace(plan.stages[-1], provider="cuda:0", replicas=2, threads=3)
    stages = (msgspec.structs.replace(plan.stages[0], threads=2, replicas=1), cuda)
    runtime, _ = both(msgspec.structs.replace(plan, stages=stages))
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    first, second = container["ports"]
    assert (first["containerPort"], second["containerPort"]) == (8080, 9000)
    assert "grpc" in second["name"]
    assert "grpc" not in first["name"]
    assert (word_after(container, "--http-port"), word_after(container, "--grpc-port")) == ("8080", "9000")
    resources = container["resources"]
    assert resources["requests"]["cpu"] == str(2 + 2 * 3)
    needed = sum(stage.replicas * stage.peak_memory_bytes for stage in stages)
    for part in ("requests", "limits"):
        assert int(resources[part]["memory"].removesuffix("Mi")) << 20 > needed
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    assert "{{" not in json.dumps(container), "KServe would fill it"


def test_the_words_in_the_container_are_ones_that_serve_takes(plan):
    from onnxsplit.cli.serve import command as serve

    first = msgspec.structs.replace(plan.stages[0], custom_ops=("a.so",))
    plan = msgspec.structs.replace(plan, stages=(first, *plan.stages[1:]))
    runtime, _ = both(plan, replace(OPTIONS, custom_ops=("/opt/a.so",)))
    words = runtime["spec"]["containers"][0]["args"]
    assert serve.make_context(words[0], words[1:]).params["custom_ops"] == ("/opt/a.so",)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "Reader"}, "not a name for Kubernetes"),
        ({"image": "a b"}, "not a container image"),
        ({"storage": "/mnt/plans"}, r"--storage '/mnt/plans' is not the address.*pvc://"),
        ({"storage": "pvc://a b"}, "--storage"),
        ({"storage": "pvc://{{.Name}}"}, "without spaces and braces"),
        ({"least_replicas": 0}, "--min-replicas"),
        ({"least_replicas": 3, "most_replicas": 2}, "--max-replicas"),
    ],
)
def test_what_kserve_would_refuse_is_refused(plan, wrong, words):
    with pytest.raises(InputError, match=words):
        documents(plan, replace(OPTIONS, **wrong))


def test_a_folder_with_something_else_in_it_is_not_touched(plan, tmp_path):
    (tmp_path / "dear.txt").touch()
    with pytest.raises(PlanError, match="nothing was touched"):
        write(plan, OPTIONS, tmp_path)
    write(plan, OPTIONS, tmp_path / "out")
    files = write(plan, replace(OPTIONS, image="onnxsplit:2"), tmp_path / "out")
    assert "onnxsplit:2" in files[0].read_text()


def test_the_command_says_what_comes_next(chain_plan, tmp_path, python_environment):
    command = [sys.executable, "-P", "-m", "onnxsplit", "deploy", "kserve", str(chain_plan)]
    options = ["--image", "i:1", "--storage", "s3://models/chain", "--max-replicas", "3", "-o", "m"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        whole = [*command, *words]
        return subprocess.run(whole, env=python_environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(*options)
    assert (done.returncode, "kubectl apply -k m" in done.stdout) == (0, True)
    assert json.loads(run(*options, "--json").stdout)["name"] == "model"
    refused = run("--image", "i:1", "-o", "m")
    assert (refused.returncode, "--storage" in refused.stderr) == (2, True)
