"""The pages about several hosts, followed with stand-ins: hosts are folders of this one, their addresses its ports."""

from __future__ import annotations

import re
import shutil
import tomllib
from contextlib import ExitStack
from typing import Any

import build
import kubernetes_validate
import numpy as np
import pages
import ports
import pytest
import yaml

pytest.importorskip("uvicorn", reason="needs the extra serve")

from reader import Reader

from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.home import sweep
from runtime.wire.keys import create_for

ROW = {"inputs": [{"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32}]}
X = {"x": np.ones((2, 32), np.float32)}


@pytest.fixture
def reader(tmp_path, python_environment):
    """A reader in a folder that has ``model.onnx``, and ``docs`` as in a checkout."""
    build.save(build.chain(8), tmp_path)
    (tmp_path / "docs").symlink_to(pages.ROOT / "docs")
    with ExitStack() as opened:
        opened.callback(sweep)
        moved = {f" /{folder}/": f" {tmp_path}/{folder}/" for folder in ("etc", "opt")}
        yield Reader(tmp_path, {**python_environment, "ONNXSPLIT_PARTITION_ROUNDS": "0"}, opened, moved=moved)


def follow(reader: Reader, blocks: list[tuple[str, str]]) -> None:
    for kind, block in blocks:
        reader.follow(kind, block)


def section(page: str, title: str) -> list[tuple[str, str]]:
    text = (pages.ROOT / page).read_text().split(f"## {title}\n")[1]
    return pages.blocks(text.split("\n## ")[0])


def applied(reader: Reader) -> list[dict[str, Any]]:
    """The objects that Kubernetes was given last."""
    return [*yaml.safe_load_all((reader.folder / "applied.yaml").read_text())]


def fitting(documents: list[dict[str, Any]]) -> list[str]:
    """The kinds of objects, all of which fit the schemas of Kubernetes."""
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    return [document["kind"] for document in documents]


def allowed(reader: Reader) -> dict[str, str]:
    """The keys that the gateway in Kubernetes allows, by their files."""
    (found,) = (one for one in applied(reader) if one["kind"] == "ConfigMap")
    return found["data"]


def test_from_one_host_to_three_in_a_few_lines(reader):
    blocks = section("docs/hosts.md", "From one host to three")
    pages.block_of("docs/hosts.md", 'caller = "local"')
    assert len(pages.commands(pages.block_of("docs/hosts.md", "$ onnxsplit keys new keys"))) <= 13
    follow(reader, blocks)
    assert reader.server.json("/v2/models/model/infer", ROW)["outputs"][0]["shape"] == [1, 32]
    links = tomllib.loads((reader.folder / "cluster.toml").read_text())["link"]
    assert len(links) == 3


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_what_kubernetes_is_given_fits_its_schemas(reader):
    for stages, plan in ((2, "model.plan"), (3, "new.plan")):
        partition(reader.folder / "model.onnx", stages=stages, out=reader.folder / plan, costs="analytic")
    reader.follow("console", pages.block_of("docs/hosts.md", "$ pip install -e '.[cpu,deploy]'"))
    assert fitting(applied(reader)).count("StatefulSet") == 2
    reader.follow("console", pages.block_of("docs/hosts.md", "$ onnxsplit deploy kubernetes new.plan"))
    reader.follow("output", pages.block_of("docs/hosts.md", "Wrote "))
    for command in re.findall(r"^ +(kubectl .+)$", reader.said, re.MULTILINE):
        reader.type(command)
    assert fitting(applied(reader)).count("StatefulSet") == 3
    asked = (reader.folder / "kubectl.log").read_text()
    assert re.findall(r"^-n default (\w+)", asked, re.MULTILINE) == ["rollout", "wait", "delete"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubernetes_is_given_a_new_key_for_one_that_is_revoked(reader):
    partition(reader.folder / "model.onnx", stages=2, out=reader.folder / "model.plan", costs="analytic")
    reader.follow("console", pages.block_of("docs/hosts.md", "$ pip install -e '.[cpu,deploy]'"))
    before = allowed(reader)
    reader.follow("console", pages.block_of("docs/hosts.md", "$ onnxsplit keys revoke manifests"))
    after = allowed(reader)
    assert [name for name in before if after[name] != before[name]] == ["stage-1.key"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kserve_is_given_a_runtime_and_a_service(reader):
    partition(reader.folder / "model.onnx", stages=2, out=reader.folder / "model.plan", costs="analytic")
    reader.follow("console", pages.block_of("docs/hosts.md", "$ onnxsplit deploy kserve"))
    runtime, service = sorted(applied(reader), key=lambda one: one["kind"], reverse=True)
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert (model["runtime"], model["storageUri"]) == (runtime["metadata"]["name"], "pvc://plans/model.plan")


def test_nodes_that_ssh_starts_serve(reader):
    shutil.copy(pages.ROOT / "docs" / "deploy" / "nodes-by-ssh.sh", reader.folder)
    follow(reader, pages.blocks_of("docs/deploy/ssh.md"))
    assert reader.server.json("/v2/models/model/infer", ROW)["outputs"][0]["shape"] == [1, 32]
    reader.type("onnxsplit status --once --json")
    assert {"host-a", "host-b"} <= set(re.findall(r"host-\w", reader.said))


def test_a_job_of_slurm_answers(reader):
    http_port = ports.free_port()
    reader.environment |= {
        "PORT": str(ports.free_port()),
        "ONNXSPLIT_SERVE_HTTP_PORT": str(http_port),
        "ONNXSPLIT_SERVE_GRPC_PORT": "off",
    }
    reader.moved |= {":8000/": f":{http_port}/"}
    shutil.copy(pages.ROOT / "docs" / "deploy" / "onnxsplit.sbatch", reader.folder)
    follow(reader, pages.blocks_of("docs/deploy/slurm.md"))


def test_a_unit_of_systemd_runs_a_node_of_its_stage(reader):
    partition(reader.folder / "model.onnx", stages=1, out=reader.folder / "model.plan", costs="analytic")
    create_for(reader.folder / "keys", ["host-b"])
    (reader.folder / "keys" / "host-b").rename(reader.folder / "host-b")
    (reader.folder / "etc" / "systemd" / "system").mkdir(parents=True)
    follow(reader, pages.blocks_of("docs/deploy/systemd.md"))
    address = f"tcp://{reader.addresses['10.0.0.1:5555']}"
    keys = reader.folder / "keys" / "coordinator"
    with Pipeline.listen(reader.folder / "model.plan", bind=address, keys=keys, start_timeout=60) as pipeline:
        assert pipeline.run(X)["y"].shape == (2, 32)
        assert [node.stage for node in pipeline.nodes] == [0]


def test_a_key_made_for_a_host_opens_its_link(reader):
    partition(reader.folder / "model.onnx", stages=1, out=reader.folder / "model.plan", costs="analytic")
    follow(reader, pages.blocks_of("docs/security.md"))
    assert "ready" in reader.said
